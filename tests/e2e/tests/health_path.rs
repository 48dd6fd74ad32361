//! A path that is lost: what the client and `status` report, in which direction, why, and what becomes of the connection.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{
    CIDR, PATIENCE, Pair, REMOTE_SERVICE, SERVICE, Served, close, endpoint_address, events, health,
    nth_event, ping, started,
};
use nsm_world::{Cloud, Fault, World, wait_until};

const VXLAN: Fault = Fault::BlockUdp { port: 4789 };

fn lost_one_way(name: &str, outward: bool) -> Result<()> {
    let pair = Served::start(name, Cloud::Packet, 1)?;
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
        "{name}: DOWN at the client {:?} after the injection began",
        injected.elapsed()
    );
    let reason = down["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("UDP 4789"), "{down}");
    let (in_, out) = if outward {
        ("up", "down")
    } else {
        // The peer's agent reports that our probes come in.
        ("down", "up")
    };
    let lost = health(&pair.near, "the lost direction in `status`", |it| {
        it["in"]["state"] == in_ && it["out"]["state"] == out
    })?;
    println!("{lost:#}");
    // There is no other endpoint: the tunnel stays, and what the client has says that nothing passes.
    let granted = nth_event(&client, "connected", 2)?;
    ensure!(granted["connection"]["path_down"].is_string(), "{granted}");

    fault.heal();
    health(&pair.near, "the path to be back", |it| it["state"] == "up")?;
    // A reselection that began while the path was down may still be on its way.
    wait_until("the tunnel to pass all", PATIENCE, || {
        ping(&pod, &address, 5, &[]).is_ok_and(|answers| answers == 5)
    })?;
    pair.close([client])
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_path_that_is_lost_outwards_is_down_at_the_client() -> Result<()> {
    lost_one_way("lost-out", true)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_path_that_is_lost_inwards_is_down_at_the_client() -> Result<()> {
    lost_one_way("lost-in", false)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn where_proof_is_required_a_blocked_path_is_refused_with_the_evidence() -> Result<()> {
    let world = Pair::world("required", Cloud::Packet, 1)?;
    let pair = Served::by(Pair::start_with(world, |command| {
        command.args(["--reachability", "require"]);
    })?)?;
    let fault = pair
        .world
        .inject(pair.near.node(), pair.far.node(), VXLAN)?;
    let said = pair.refused(REMOTE_SERVICE, PATIENCE, |_| {})?;
    let far_address = pair.far.node().public_ip().to_string();
    for word in [far_address.as_str(), "UDP 4789", "reachability: require"] {
        ensure!(said.contains(word), "{word:?} is not in: {said}");
    }
    pair.assert_as_before()?;
    fault.heal();
    let (client, _) = pair.connect(0)?;
    pair.close([client])
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
    let near = started(&world, "node-1", |_| {})?;
    let gate = started(&world, "node-2", |_| {})?;
    let registry = format!("tcp://{}:5005", gate.node().private_ip());
    let mut servers = Vec::new();
    for number in [3, 4] {
        let agent = started(&world, &format!("node-{number}"), |command| {
            command.args(["--registry-url", &registry]);
        })?;
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
    println!("DOWN after {:?}", injected.elapsed());
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
    close(&client)
}

/// The path comes to carry less than the links do, and no ICMP says so: the MTU of both ends follows.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn the_mtu_follows_a_path_that_shrinks() -> Result<()> {
    let pair = Served::start("mtu-hole", Cloud::Packet, 1)?;
    let (client, connected) = pair.connect(0)?;
    let address = endpoint_address(&connected)?;
    let pod = pair.client_pod(0)?;
    health(&pair.near, "the path to be measured", |it| {
        it["path_mtu"] == 1450
    })?;
    let faults = pair.narrow(1280)?;
    let injected = Instant::now();
    pair.mtu_follows(1280)?;
    println!("both ends follow after {:?}", injected.elapsed());
    let links = format!("{}", 1226 - 28);
    ensure!(ping(&pod, &address, 5, &["-M", "do", "-s", &links])? == 5);
    ensure!(
        events(&client, "down").is_empty(),
        "small packets pass all the time"
    );
    // The control plane's large packets are lost as well, a Close among them.
    drop(faults);
    pair.close([client])
}
