//! Agents and endpoints that die: what they held is gone, or theirs again, once they are back.

use anyhow::{Result, ensure};
use nsm_e2e::{
    PATIENCE, Pair, Served, connection, endpoint_address, events, nth_event,
    pings::{all_came_back, flows_on, link_index, pings},
};
use nsm_world::{Agent, Cloud, Signal, binary, wait_until};
use serde_json::Value;

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_killed_agent_comes_back_and_its_client_is_connected_again() -> Result<()> {
    let mut pair = Served::start("killed-agent", Cloud::Aws, 1)?;
    let (client, connected) = pair.connect(0)?;
    let node = pair.near.node().clone();
    pair.near.process.kill9();
    client.wait_for_event("down", PATIENCE)?;
    // The kernel carries what stands, whichever process made it.
    pair.assert_pings(0, &connected, 5)?;

    pair.pair.near = Agent::start(&pair.world, &node, &binary("proxy-nsmgr")?, |_| {})?;
    pair.near.wait_ready()?;
    wait_until("the agent to know the connection again", PATIENCE, || {
        let known = |status: Value| {
            status["connections"]
                .as_array()
                .is_some_and(|all| all.len() == 1)
        };
        pair.near.status().is_ok_and(known)
    })?;
    pair.assert_pings(0, &connected, 5)?;
    pair.close([client])
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn an_agent_that_is_drained_takes_its_links_and_pins_along() -> Result<()> {
    let pair = Pair::start("ended-agent", Cloud::Packet, 1)?;
    let _endpoint = pair.endpoint()?;
    let (_client, _) = pair.connect(0)?;
    pair.near.drain(PATIENCE)?;
    let pod = pair.client_pod(0)?;
    let links = pod.links()?;
    ensure!(links.iter().all(|link| link.name == "lo"), "{links:?}");
    let left = pair.world.leaks()?;
    let pins: Vec<_> = left
        .pins
        .iter()
        .filter(|pin| pin.starts_with(pair.near.node().pin_dir()))
        .collect();
    ensure!(pins.is_empty(), "{pins:?}");
    // It closes its connections at the far agent before it ends.
    wait_until("the far side to close", PATIENCE, || {
        pair.far
            .status()
            .is_ok_and(|status| status["connections"].as_array().is_none_or(Vec::is_empty))
    })?;
    pair.assert_quiet()
}

/// The kernels carry what stands, the agents look after it: while the far one is away the client waits for it, and its next life takes
/// over what it finds.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_killed_far_agent_is_waited_for_while_traffic_flows() -> Result<()> {
    let mut pair = Served::start("killed-far", Cloud::Aws, 1)?;
    let (client, connected) = pair.connect(0)?;
    let pods = [pair.client_pod(0)?, pair.world.pod("endpoint")?];
    let links = [link_index(&pods[0])?, link_index(&pods[1])?];
    let pings = pings(&pair.world, &pods[0], &endpoint_address(&connected)?)?;

    let node = pair.far.node().clone();
    pair.far.process.kill9();
    let down = nth_event(&client, "down", 1)?;
    let reason = down["reason"].as_str().unwrap_or_default();
    let url = format!("tcp://{}:5006", node.public_ip());
    for word in ["not heard any more", &url] {
        ensure!(reason.contains(word), "{word:?} is not in {down}");
    }
    // Asked for again, in vain, and nothing is touched.
    nth_event(&client, "error", 2)?;
    flows_on(&pings, 10)?;
    let status = pair.near.status()?;
    let shown = &status["connections"][0];
    let why = shown["down_reason"].as_str().unwrap_or_default();
    ensure!(shown["state"] == "DOWN", "{shown:#}");
    for word in ["not heard any more", &url, "the path is good"] {
        ensure!(why.contains(word), "{word:?} is not in {shown:#}");
    }
    println!("event: {down}\nstatus: {why}");
    let table = pair.near.status_table()?;
    ensure!(table.contains(why), "{table}");

    pair.pair.far = Agent::start(&pair.world, &node, &binary("proxy-nsmgr")?, |_| {})?;
    let again = nth_event(&client, "connected", 2)?;
    for fact in ["endpoint", "vni", "id"] {
        ensure!(
            again["connection"][fact] == connected["connection"][fact],
            "another {fact}: {again}"
        );
    }
    pair.far.wait_ready()?;
    for agent in [&pair.near, &pair.far] {
        connection(agent, "the connection to be UP", |it| {
            it["state"] == "UP" && it["health"]["state"] == "up"
        })?;
    }
    flows_on(&pings, 10)?;
    pings.terminate(PATIENCE)?;
    println!("{}", client.process.stdout());
    // Neither link was touched: every single ping came back, once and in order.
    all_came_back(&pings)?;
    ensure!(links == [link_index(&pods[0])?, link_index(&pods[1])?]);
    ensure!(
        events(&client, "down").len() == 1,
        "{}",
        client.process.stdout()
    );

    pair.close([client])
}

/// An update: the next agent is started at once, as long as the first one still ends. No packet is lost, at neither end of a
/// tunnel, and nothing is made anew.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn an_agent_that_is_stopped_leaves_what_stands_to_the_next() -> Result<()> {
    let mut pair = Served::start("stopped", Cloud::Aws, 1)?;
    let (client, connected) = pair.connect(0)?;
    let pods = [pair.client_pod(0)?, pair.world.pod("endpoint")?];
    let links = [link_index(&pods[0])?, link_index(&pods[1])?];
    let pings = pings(&pair.world, &pods[0], &endpoint_address(&connected)?)?;
    flows_on(&pings, 5)?;
    for is_near in [true, false] {
        let agent = if is_near { &pair.near } else { &pair.far };
        let node = agent.node().clone();
        agent.process.signal(Signal::SIGTERM);
        let next = Agent::start(&pair.world, &node, &binary("proxy-nsmgr")?, |_| {})?;
        ensure!(agent.process.wait(PATIENCE)?.success(), "it ended badly");
        next.wait_ready()?;
        *(if is_near {
            &mut pair.pair.near
        } else {
            &mut pair.pair.far
        }) = next;
        flows_on(&pings, 5)?;
    }
    for agent in [&pair.near, &pair.far] {
        connection(agent, "the connection to be known and UP", |it| {
            it["state"] == "UP"
        })?;
    }
    let status = pair.near.status()?;
    ensure!(
        status["connections"][0]["tunnel"]["vni"] == connected["connection"]["vni"],
        "another tunnel: {status:#}"
    );
    flows_on(&pings, 5)?;
    pings.terminate(PATIENCE)?;
    all_came_back(&pings)?;
    ensure!(links == [link_index(&pods[0])?, link_index(&pods[1])?]);
    pair.close([client])
}
