//! Links of pods that somebody else changes: noticed, repaired, or DOWN with the reason.

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{
    CIDR, PATIENCE, SERVICE, Served, client_address, close, connection, endpoint_address, events,
    nth_event, ping, started,
};
use nsm_world::{Cloud, Pod, World, wait_until};
use serde_json::Value;

/// Runs `ip` in a pod, a line a command, as root of the pod would.
fn ip(pod: &Pod, lines: &str) -> Result<()> {
    for line in lines.lines() {
        let mut command = pod.command("ip")?;
        let output = command.args(line.split_whitespace()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "ip {line} in {}: {said}",
            pod.name()
        );
    }
    Ok(())
}

/// The only link of a connection in a pod, as `ip` shows it.
fn link(pod: &Pod) -> Result<Value> {
    let mut command = pod.command("ip")?;
    let output = command.args(["-json", "-details", "link"]).output()?;
    let links: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let mut ours = links
        .into_iter()
        .filter(|it| it["linkinfo"]["info_kind"] == "veth");
    ours.next()
        .with_context(|| format!("no link in {}", pod.name()))
}

fn name(pod: &Pod) -> Result<String> {
    Ok(link(pod)?["ifname"].as_str().context("a name")?.to_owned())
}

/// What is done to a link LINK whose own address is OWN and whose other end has OTHER.
const CHANGES: [(&str, &str); 8] = [
    ("it is set down", "link set LINK down"),
    ("its route is deleted", "route del OTHER dev LINK"),
    ("its address is deleted", "address del OWN/32 dev LINK"),
    ("its neighbour is deleted", "neigh del OTHER dev LINK"),
    (
        "its neighbour is changed",
        "neigh replace OTHER lladdr 02:00:00:00:00:99 nud permanent dev LINK",
    ),
    (
        "it has another Ethernet address",
        "link set LINK address 02:00:00:00:00:99",
    ),
    (
        "it is renamed",
        "link set LINK down\nlink set LINK name other\nlink set other up",
    ),
    ("it is deleted", "link del LINK"),
];

/// At one end each change is repaired by itself: packets pass again long before a refresh, and where the link stands, the client is not asked
/// for anything.
fn changes_are_repaired(
    name_of_test: &str,
    is_client: bool,
    some: &[(&'static str, &'static str)],
) -> Result<()> {
    let pair = Served::start(name_of_test, Cloud::Packet, 1)?;
    let (client, connected) = pair.connect(0)?;
    let (ours, theirs) = (client_address(&connected)?, endpoint_address(&connected)?);
    let (pod, own, other) = if is_client {
        (pair.client_pod(0)?, &ours, &theirs)
    } else {
        (pair.world.pod("endpoint")?, &theirs, &ours)
    };
    for (what, lines) in some {
        let link = name(&pod)?;
        let lines = lines
            .replace("LINK", &link)
            .replace("OWN", own)
            .replace("OTHER", other);
        let changed = std::time::Instant::now();
        // The agent may be quicker than the second of several commands.
        wait_until(*what, PATIENCE, || ip(&pod, &lines).is_ok())?;
        wait_until(*what, PATIENCE, || {
            ping(&pair.client_pod(0).expect("a pod"), &theirs, 3, &[]).is_ok_and(|it| it == 3)
        })
        .with_context(|| format!("{}\n{}", client.process.stdout(), pair.world.logs()))?;
        println!("{what}: packets pass after {:?}", changed.elapsed());
        ensure!(name(&pod)? == link, "another name");
    }
    // A link that has to be made anew may be missed by the peer meanwhile: it counts what comes for no tunnel.
    let is_anew = some
        .iter()
        .any(|(what, _)| ["it is renamed", "it is deleted"].contains(what));
    ensure!(
        is_anew || events(&client, "down").is_empty(),
        "{}",
        client.process.stdout()
    );
    pair.close([client])
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn what_takes_something_off_a_clients_link_is_undone() -> Result<()> {
    changes_are_repaired("changed-1", true, &CHANGES[..2])?;
    changes_are_repaired("changed-2", true, &CHANGES[2..4])
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn what_makes_a_clients_link_another_is_undone() -> Result<()> {
    changes_are_repaired("changed-3", true, &CHANGES[4..6])?;
    changes_are_repaired("changed-4", true, &CHANGES[6..])
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn what_is_done_to_an_endpoints_link_is_undone() -> Result<()> {
    changes_are_repaired("changed-5", false, &CHANGES[..2])?;
    changes_are_repaired("changed-6", false, &CHANGES[6..])
}

/// The pod's owner means it: DOWN at both ends of the path to the client, with the reason, and UP when it is right.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn what_is_undone_again_and_again_is_down_with_the_reason() -> Result<()> {
    let pair = Served::start("changed-fight", Cloud::Packet, 1)?;
    let (client, _) = pair.connect(0)?;
    let pod = pair.world.pod("endpoint")?;
    let link = name(&pod)?;
    let down = format!("link set {link} down");
    let mut shown = Value::Null;
    wait_until("the far agent to give up", PATIENCE, || {
        let _ = ip(&pod, &down);
        shown = pair.far.status().unwrap_or_default();
        shown["connections"][0]["state"] == "DOWN"
    })?;
    let why = shown["connections"][0]["down_reason"]
        .as_str()
        .unwrap_or_default();
    for word in [&link, "it is down", "undone again"] {
        ensure!(why.contains(word), "{word:?} is not in {shown:#}");
    }
    let event = nth_event(&client, "down", 1)?;
    let reason = event["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("it is down"), "{event}");
    // The client's next Request makes it right.
    nth_event(&client, "connected", 2)?;
    for agent in [&pair.near, &pair.far] {
        connection(agent, "the connection to be UP", |it| it["state"] == "UP")?;
    }
    pair.close([client])
}

/// The pod is gone, and its client with it: closed on both sides, long before a token ends.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn the_connection_of_a_pod_that_is_gone_is_closed_on_both_sides() -> Result<()> {
    let pair = Served::start("changed-gone", Cloud::Packet, 1)?;
    let (client, _) = pair.connect(0)?;
    client.process.kill9();
    let pod = pair.client_pod(0)?;
    let removed = std::process::Command::new("umount")
        .arg("--lazy")
        .arg(pod.netns())
        .status()?;
    ensure!(removed.success(), "the namespace stays");
    for agent in [&pair.near, &pair.far] {
        wait_until("the connection to be closed", PATIENCE, || {
            let status = agent.status();
            status.is_ok_and(|it| it["connections"].as_array().is_none_or(Vec::is_empty))
        })?;
    }
    pair.assert_quiet()
}

/// Both pods are on one node: each has a link of the same kind, and either is repaired.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn the_links_of_a_pair_are_repaired_too() -> Result<()> {
    let world = World::builder("changed-pair")
        .domain("cluster-1.example", |domain| {
            domain.node("node-1").pod("client").pod("endpoint")
        })
        .build()?;
    let agent = started(&world, "node-1", |_| {})?;
    let pods = [world.pod("client")?, world.pod("endpoint")?];
    let _endpoint = agent.endpoint(&world, &pods[1], SERVICE, CIDR, |_| {})?;
    let client = agent.connect(&world, &pods[0], SERVICE, |_| {})?;
    let theirs = endpoint_address(&nth_event(&client, "connected", 1)?)?;
    // As many as are repaired within a minute.
    for (pod, change) in [
        (&pods[0], "link set LINK down"),
        (&pods[1], "link set LINK down"),
        (&pods[1], "link del LINK"),
    ] {
        ip(pod, &change.replace("LINK", &name(pod)?))?;
        wait_until(change, PATIENCE, || {
            ping(&pods[0], &theirs, 3, &[]).is_ok_and(|it| it == 3)
        })
        .with_context(|| format!("{}\n{}", client.process.stdout(), world.logs()))?;
    }
    close(&client)
}
