//! A path that is lost: who is told, which way, why, and what becomes of the connection.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{
    CIDR, PATIENCE, Pair, REMOTE_SERVICE, SERVICE, endpoint_address, events, nth_event, ping,
};
use nsm_world::{Agent, Cloud, Fault, World, binary, wait_until};
use serde_json::Value;

const VXLAN: Fault = Fault::BlockUdp { port: 4789 };

/// The only connection's health, once it is as `wanted` says.
fn health(agent: &Agent, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    let found = wait_until(what, PATIENCE, || {
        let status = agent.status().unwrap_or_default();
        last = status["connections"][0]["health"].clone();
        wanted(&last)
    });
    found.with_context(|| format!("{}: {last:#}", agent.node().name()))?;
    Ok(last)
}

fn lost_one_way(name: &str, outward: bool) -> Result<()> {
    let pair = Pair::start(name, Cloud::Packet, 1)?;
    let _endpoint = pair.endpoint()?;
    let before = pair.footprint()?;
    let (client, connected) = pair.connect(0)?;
    let address = endpoint_address(&connected)?;
    let pod = pair.client_pod(0)?;
    ensure!(
        connected["connection"]["path_down"].is_null(),
        "{connected}"
    );
    let proved = health(&pair.near, "the path to be proved", |it| {
        it["state"] == "up"
    })?;
    ensure!(proved["round_trip_p50_ns"].as_u64().is_some(), "{proved}");
    health(&pair.far, "the far side to know too", |it| {
        it["state"] == "up"
    })?;

    let (near, far) = (pair.near.node(), pair.far.node());
    let (from, to) = if outward { (near, far) } else { (far, near) };
    let injected = Instant::now();
    let fault = pair.world.inject(from, to, VXLAN)?;
    let down = nth_event(&client, "down", 1)?;
    println!(
        "{name}: told at the client {:?} after the injection began",
        injected.elapsed()
    );
    let reason = down["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("UDP 4789"), "{down}");
    let (in_, out) = if outward {
        ("up", "down")
    } else {
        // The peer's agent says that our probes come in.
        ("down", "up")
    };
    let told = health(&pair.near, "the way to be told", |it| {
        it["in"]["state"] == in_ && it["out"]["state"] == out
    })?;
    println!("{told:#}");
    // There is no other endpoint: the tunnel stays, and what the client has says that nothing passes.
    let granted = nth_event(&client, "connected", 2)?;
    ensure!(granted["connection"]["path_down"].is_string(), "{granted}");

    fault.heal();
    health(&pair.near, "the path to be back", |it| it["state"] == "up")?;
    ensure!(ping(&pod, &address, 5, &[])? == 5, "the tunnel stands");
    ensure!(
        client.close(PATIENCE)?.success(),
        "the client did not end well"
    );
    pair.assert_clean(&before)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_path_that_is_lost_outwards_is_told_at_the_client() -> Result<()> {
    lost_one_way("lost-out", true)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_path_that_is_lost_inwards_is_told_at_the_client() -> Result<()> {
    lost_one_way("lost-in", false)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn where_proof_is_required_a_blocked_path_is_refused_with_the_evidence() -> Result<()> {
    let world = Pair::world("required", Cloud::Packet, 1)?;
    let program = binary("proxy-nsmgr")?;
    let start = |node: &str| {
        Agent::start(&world, &world.node(node)?, &program, |command| {
            command.args(["--reachability", "require"]);
        })
    };
    let (near, far) = (start("node-1")?, start("node-2")?);
    near.wait_ready()?;
    far.wait_ready()?;
    let pair = Pair { near, far, world };
    let _endpoint = pair.endpoint()?;
    let before = pair.footprint()?;
    let fault = pair
        .world
        .inject(pair.near.node(), pair.far.node(), VXLAN)?;
    let said = pair.refused(REMOTE_SERVICE, PATIENCE, |_| {})?;
    let far_address = pair.far.node().public_ip().to_string();
    for word in [far_address.as_str(), "UDP 4789", "reachability: require"] {
        ensure!(said.contains(word), "{word:?} is not in: {said}");
    }
    pair.assert_clean(&before)?;
    fault.heal();
    let (client, _) = pair.connect(0)?;
    ensure!(
        client.close(PATIENCE)?.success(),
        "the client did not end well"
    );
    pair.assert_clean(&before)
}

/// The endpoint's domain has two nodes with an endpoint each; all traffic to the one in use is lost, the control plane's too.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_lost_path_is_left_for_another_endpoint() -> Result<()> {
    let world = World::builder("heal")
        .cloud(Cloud::Packet)
        .domain("cluster-1.example", |domain| {
            domain.node("node-1").pod("client-0")
        })
        .domain("cluster-2.example", |domain| {
            domain
                .node("node-2")
                .node("node-3")
                .pod("endpoint-3")
                .node("node-4")
                .pod("endpoint-4")
        })
        .build()?;
    let program = binary("proxy-nsmgr")?;
    let registry = format!("tcp://{}:5005", world.node("node-2")?.private_ip());
    let near = Agent::start(&world, &world.node("node-1")?, &program, |_| {})?;
    let gate = Agent::start(&world, &world.node("node-2")?, &program, |_| {})?;
    near.wait_ready()?;
    gate.wait_ready()?;
    let mut servers = Vec::new();
    for number in [3, 4] {
        let node = world.node(&format!("node-{number}"))?;
        let agent = Agent::start(&world, &node, &program, |command| {
            command.args(["--registry-url", &registry]);
        })?;
        agent.wait_ready()?;
        let pod = world.pod(&format!("endpoint-{number}"))?;
        let endpoint = agent.endpoint(&world, &pod, SERVICE, CIDR, |_| {})?;
        servers.push((agent, endpoint));
    }
    let pod = world.pod("client-0")?;
    let client = near.connect(&world, &pod, REMOTE_SERVICE, |_| {})?;
    let connected = nth_event(&client, "connected", 1)?;
    health(&near, "the path to be proved", |it| it["state"] == "up")?;
    let used = connected["connection"]["endpoint"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let at = servers
        .iter()
        .position(|(agent, _)| used.starts_with(&agent.node().name().replace("node", "endpoint")))
        .with_context(|| format!("whose endpoint is {used}?"))?;

    let injected = Instant::now();
    let lost = servers[at].0.node();
    let faults = [
        world.inject(near.node(), lost, Fault::DropAll)?,
        world.inject(lost, near.node(), Fault::DropAll)?,
    ];
    nth_event(&client, "down", 1)?;
    println!("told after {:?}", injected.elapsed());
    let again = nth_event(&client, "connected", 2)?;
    let address = endpoint_address(&again)?;
    wait_until("traffic to flow again", PATIENCE, || {
        ping(&pod, &address, 1, &[]).is_ok_and(|answered| answered == 1)
    })?;
    println!("traffic flows again after {:?}", injected.elapsed());
    let now = again["connection"]["endpoint"].as_str().unwrap_or_default();
    ensure!(now != used, "the same endpoint again: {again}");
    ensure!(again["connection"]["path_down"].is_null(), "{again}");
    drop(faults);
    ensure!(
        client.close(PATIENCE)?.success(),
        "the client did not end well"
    );
    Ok(())
}

/// The path comes to carry less than the links do, and no ICMP says so: the MTU of both ends follows.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn the_mtu_follows_a_path_that_shrinks() -> Result<()> {
    let pair = Pair::start("mtu-hole", Cloud::Packet, 1)?;
    let _endpoint = pair.endpoint()?;
    let before = pair.footprint()?;
    let (client, connected) = pair.connect(0)?;
    let address = endpoint_address(&connected)?;
    let pod = pair.client_pod(0)?;
    health(&pair.near, "the path to be measured", |it| {
        it["path_mtu"] == 1450
    })?;
    let hole = Fault::MtuBlackHole { max: 1280 };
    let (near, far) = (pair.near.node(), pair.far.node());
    let faults = [
        pair.world.inject(near, far, hole)?,
        pair.world.inject(far, near, hole)?,
    ];
    let injected = Instant::now();
    for agent in [&pair.near, &pair.far] {
        // 1,280 less what VXLAN adds; the search ends when it is close.
        wait_until("the MTU to follow", PATIENCE, || {
            let status = agent.status().unwrap_or_default();
            let mtu = status["connections"][0]["mtu"].as_u64();
            mtu.is_some_and(|mtu| (1226..=1230).contains(&mtu))
        })
        .with_context(|| format!("{:#}", agent.status().unwrap_or_default()))?;
    }
    println!("both ends follow after {:?}", injected.elapsed());
    let links = format!("{}", 1226 - 28);
    ensure!(ping(&pod, &address, 5, &["-M", "do", "-s", &links])? == 5);
    ensure!(
        events(&client, "down").is_empty(),
        "small packets pass all the time"
    );
    // The control plane's large packets are lost as well, a Close among them.
    drop(faults);
    ensure!(
        client.close(PATIENCE)?.success(),
        "the client did not end well"
    );
    pair.assert_clean(&before)
}
