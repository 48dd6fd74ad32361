//! Client and endpoint on one node: what becomes of the connection when the agent dies, and when the endpoint is on another node for a while.

use std::time::Instant;

use anyhow::{Result, ensure};
use nsm_e2e::{
    CIDR, SERVICE, close, endpoint_address, health, links_go, nth_event,
    pings::{all_came_back, answered, flows_on, link_index, pings},
    started,
};
use nsm_world::{Agent, Cloud, Endpoint, Fault, World, binary};
use serde_json::Value;

const VXLAN: Fault = Fault::BlockUdp { port: 4789 };

/// One domain of two nodes that share a registry, with a client on the first and a pod for an endpoint on each.
fn two_nodes(name: &str) -> Result<(World, [Agent; 2])> {
    let world = World::builder(name)
        .cloud(Cloud::Packet)
        .domain("cluster-1.example", |domain| {
            domain
                .node("node-1")
                .pod("client")
                .pod("endpoint-1")
                .node("node-2")
                .pod("endpoint-2")
        })
        .build()?;
    let one = started(&world, "node-1", |_| {})?;
    let registry = format!("tcp://{}:5005", one.node().private_ip());
    let two = started(&world, "node-2", |command| {
        command.args(["--registry-url", &registry]);
    })?;
    Ok((world, [one, two]))
}

fn endpoint(world: &World, agent: &Agent, pod: &str) -> Result<Endpoint> {
    Ok(agent.endpoint(world, &world.pod(pod)?, SERVICE, CIDR, |_| {})?)
}

fn used(connected: &Value) -> &str {
    let name = connected["connection"]["endpoint"].as_str();
    name.unwrap_or_default()
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_pair_loses_no_packet_when_its_agent_is_killed_and_started_again() -> Result<()> {
    let (world, [mut agent, _other]) = two_nodes("killed-pair")?;
    let _endpoint = endpoint(&world, &agent, "endpoint-1")?;
    let pods = [world.pod("client")?, world.pod("endpoint-1")?];
    let client = agent.connect(&world, &pods[0], SERVICE, |_| {})?;
    let connected = nth_event(&client, "connected", 1)?;
    let links = [link_index(&pods[0])?, link_index(&pods[1])?];
    let pings = pings(&world, &pods[0], &endpoint_address(&connected)?)?;

    let node = agent.node().clone();
    agent.process.kill9();
    flows_on(&pings, 10)?;
    agent = Agent::start(&world, &node, &binary("proxy-nsmgr")?, |_| {})?;
    agent.wait_ready()?;
    nth_event(&client, "connected", 2)?;
    flows_on(&pings, 10)?;
    pings.terminate(nsm_e2e::PATIENCE)?;
    all_came_back(&pings)?;
    ensure!(links == [link_index(&pods[0])?, link_index(&pods[1])?]);
    close(&client)?;
    links_go(&world)
}

/// The path to the endpoint of the other node is lost, and the one of this node is taken; then that one's process dies, and the other one
/// is taken again. The client's interface is the same all the time.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_client_keeps_its_interface_when_it_heals_to_its_own_node_and_back() -> Result<()> {
    let (world, [near, far]) = two_nodes("heal-pair")?;
    let _far_endpoint = endpoint(&world, &far, "endpoint-2")?;
    let pod = world.pod("client")?;
    let client = near.connect(&world, &pod, SERVICE, |_| {})?;
    let connected = nth_event(&client, "connected", 1)?;
    let there = used(&connected).to_owned();
    let index = link_index(&pod)?;
    health(&near, "the path to be proved", |it| it["state"] == "up")?;
    let address = endpoint_address(&connected)?;
    let pings = pings(&world, &pod, &address)?;

    let near_endpoint = endpoint(&world, &near, "endpoint-1")?;
    let fault = world.inject(near.node(), far.node(), VXLAN)?;
    let injected = Instant::now();
    let again = nth_event(&client, "connected", 2)?;
    ensure!(used(&again) != there, "the same endpoint: {again}");
    ensure!(endpoint_address(&again)? == address, "{again}");
    flows_on(&pings, 10)?;
    println!("traffic flows to this node after {:?}", injected.elapsed());
    ensure!(link_index(&pod)? == index, "another interface");
    fault.heal();

    // Nobody serves the connection any more, but packets pass until another endpoint is there.
    near_endpoint.process.kill9();
    let before = answered(&pings).len();
    // The endpoint that is lost is asked for during ten seconds, and the last wait between two tries can take as long again.
    let third = || nth_event(&client, "connected", 3);
    let back = third().or_else(|_| third())?;
    ensure!(used(&back) == there, "not the endpoint of before: {back}");
    flows_on(&pings, 10)?;
    ensure!(link_index(&pod)? == index, "another interface");
    pings.terminate(nsm_e2e::PATIENCE)?;
    let numbers = answered(&pings);
    let flown = &numbers[before..];
    let lost = flown[flown.len() - 1] - flown[0] + 1 - flown.len() as u64;
    println!("{lost} of {} pings were lost on the way back", flown.len());
    ensure!(lost == 0, "{}", pings.stdout());
    close(&client)?;
    links_go(&world)
}
