//! Traffic of a connection of ours against a bare VXLAN link.
//!
//! Two worlds of one shape stand at the same time: one with agents, their BPF programs on the underlay and a connection; one with
//! nothing but two VXLAN links that `ip` made, of the same MTU and with neighbours as static. Only one carries traffic at a time, in
//! turn, the other first in every second round; a round gives one ratio, and the median of them is what counts. So neither the
//! programs nor what else the machine does at the time falls on one side alone. Sender and receiver each keep a CPU: where the
//! scheduler happens to put them makes more of a difference than any link.

use std::{net::Ipv4Addr, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity},
    unistd::Pid,
};
use nsm_stats::median;
use nsm_world::{Client, Node, Pod, Process, World};
use serde_json::Value;

use super::{
    Setting,
    processes::run_json,
    report::{Bar::AtLeast, Row},
    scene::{Domains, two_nodes},
    sink::Sink,
};

const TCP_RATIO: f64 = 1.0;
const UDP_RATIO: f64 = 1.0;

/// The least part of the frames from our pod that takes the fast path, or the ratios are of another thing.
const FAST_PART: f64 = 0.9;

/// Sends every packet by the slow path.
const SLOW_ONLY: [&str; 2] = ["--tunnel-respect-host-firewall", "true"];

/// Bytes in a UDP datagram.
const DATAGRAM: f64 = 64.0;

const CONNECT_DEADLINE: Duration = Duration::from_secs(30);
const SERVER_DEADLINE: Duration = Duration::from_secs(10);

/// Beyond the seconds that iperf3 sends: it connects, and exchanges results.
const IPERF_SLACK: Duration = Duration::from_secs(20);

const BARE_VNI: &str = "4242";
const BARE_INTERFACE: &str = "bare-1";

pub(super) fn measure(setting: &Setting<'_>, sink: &Sink) -> Result<()> {
    let (rounds, seconds) = setting.size.pick((15, 1), (2, 1), (1, 1));
    sink.step("two domains");
    let domains = Domains::build(&setting.built.world()?)?;
    let (ours, mtu, client) = connection(&domains, "ours")?;
    sink.step("a bare link");
    let world = two_nodes("bench-bare").without_dns().build()?;
    let bare = bare_link(&world, mtu)?;

    for (protocol, bar) in [(Protocol::Tcp, TCP_RATIO), (Protocol::Udp, UDP_RATIO)] {
        sink.step(format!("{protocol:?}"));
        sink.rows(compare(
            protocol,
            [&ours, &bare],
            Some(bar),
            rounds,
            seconds,
        )?);
    }
    sink.step("what BPF counted");
    // Had the programs been off the path, the ratio would say nothing.
    let counted = packets_counted(&domains)?;
    let fast = fast_part(&domains)?;
    ensure!(
        fast >= FAST_PART,
        "only {fast:.3} of our frames took the fast path"
    );
    drop((client, ours));
    drop(domains);
    slow(setting, sink, &bare, (rounds, seconds))?;
    sink.note(format!(
        "iperf3, {rounds} rounds of {seconds} s each in turn, medians; MTU {mtu}; BPF counted {counted} packets of our connection, \
         {fast:.4} of the client's frames took the fast path"
    ));
    sink.note("the bare link is in a world of its own, without agents and BPF on its underlay");
    Ok(())
}

/// The same by agents that have no fast path, for the difference.
fn slow(
    setting: &Setting<'_>,
    sink: &Sink,
    bare: &Ends<'_>,
    (rounds, seconds): (usize, u64),
) -> Result<()> {
    sink.step("two domains without the fast path");
    let domains = Domains::build_with(&setting.built.world()?, &SLOW_ONLY)?;
    let (slow, _, client) = connection(&domains, "slow path")?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        sink.step(format!("{protocol:?}"));
        sink.rows(compare(protocol, [&slow, bare], None, rounds, seconds)?);
    }
    let fast = fast_part(&domains)?;
    ensure!(
        fast == 0.0,
        "{fast:.3} of the frames took the fast path, which was turned off"
    );
    drop(client);
    Ok(())
}

/// Both ends of a link.
pub(super) struct Ends<'a> {
    name: &'static str,
    world: &'a World,
    client_pod: Pod,
    /// The endpoint's address on the link.
    address: String,
    _server: Process,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Protocol {
    Tcp,
    Udp,
}

/// Our connection between the pods of two domains, with its MTU; it ends with the client.
pub(super) fn connection<'a>(
    domains: &'a Domains,
    name: &'static str,
) -> Result<(Ends<'a>, u64, Client)> {
    let world = &domains.world;
    let client =
        domains
            .client_agent
            .connect(world, &domains.client_pod, &Domains::service(), |_| {})?;
    let connected = client.wait_for_event("connected", CONNECT_DEADLINE)?;
    let connection = &connected["connection"];
    let mtu = connection["mtu"].as_u64().context("no MTU in the answer")?;
    let address = connection["dst_addresses"][0].as_str();
    let address = address.context("no address of the endpoint in the answer")?;
    let ends = Ends {
        name,
        world,
        client_pod: domains.client_pod.clone(),
        address: address.split('/').next().unwrap_or(address).to_owned(),
        _server: serve(world, &domains.endpoint_pod)?,
    };
    Ok((ends, mtu, client))
}

/// A VXLAN link between the pods of a world without agents, made by `ip`.
fn bare_link(world: &World, mtu: u64) -> Result<Ends<'_>> {
    let (client, endpoint) = (world.node("node-1")?, world.node("node-2")?);
    let (client_pod, endpoint_pod) = (world.pod("client")?, world.pod("endpoint")?);
    let end = |last: u8| {
        (
            Ipv4Addr::new(172, 16, 1, last),
            format!("02:00:00:00:00:{last:02x}"),
        )
    };
    let (near, far) = (end(1), end(2));
    bare_end([&client, &endpoint], &client_pod, [&near, &far], mtu)?;
    bare_end([&endpoint, &client], &endpoint_pod, [&far, &near], mtu)?;
    Ok(Ends {
        name: "bare",
        world,
        client_pod,
        address: far.0.to_string(),
        _server: serve(world, &endpoint_pod)?,
    })
}

/// One end; of the pairs the first is this one, the second the other.
fn bare_end(
    nodes: [&Node; 2],
    pod: &Pod,
    [(address, mac), (far_address, far_mac)]: [&(Ipv4Addr, String); 2],
    mtu: u64,
) -> Result<()> {
    let link = BARE_INTERFACE;
    let (netns, node) = (pod.netns_name(), nodes[0].netns_name());
    let [local, remote] = nodes.map(Node::private_ip);
    ip(&format!(
        "-n {node} link add {link} netns {netns} mtu {mtu} address {mac} type vxlan id {BARE_VNI} \
         local {local} remote {remote} dstport 4789"
    ))?;
    ip(&format!("-n {netns} link set {link} up"))?;
    ip(&format!("-n {netns} address add {address}/32 dev {link}"))?;
    ip(&format!("-n {netns} route add {far_address}/32 dev {link}"))?;
    ip(&format!(
        "-n {netns} neighbour replace {far_address} lladdr {far_mac} nud permanent dev {link}"
    ))
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .context("cannot start ip")?;
    ensure!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn serve(world: &World, pod: &Pod) -> Result<Process> {
    let mut command = pod.command("iperf3")?;
    command.args(["--server", "--forceflush"]);
    let server = world.spawn("iperf3-server", command)?;
    server.wait_for_line("Server listening", SERVER_DEADLINE)?;
    Ok(server)
}

/// The rates of two links in turn, the ratio of the first to the second with its bar in front.
pub(super) fn compare(
    protocol: Protocol,
    [one, other]: [&Ends<'_>; 2],
    bar: Option<f64>,
    rounds: usize,
    seconds: u64,
) -> Result<Vec<Row>> {
    let names = [one.name, other.name];
    let (mut sent, mut received) = (Measured::default(), Measured::default());
    for round in 0..rounds {
        let rate = |ends| rate(protocol, ends, seconds);
        let (of_one, of_other) = if round % 2 == 0 {
            let first = rate(one)?;
            (first, rate(other)?)
        } else {
            let first = rate(other)?;
            (rate(one)?, first)
        };
        sent.add(of_one.sent, of_other.sent);
        received.add(of_one.received, of_other.received);
    }
    let (name, unit) = match protocol {
        Protocol::Tcp => ("TCP", "Gbit/s"),
        Protocol::Udp => ("UDP of 64 bytes", "1000/s"),
    };
    let mut rows = received.rows(&format!("{name} received"), names, unit)?;
    if let Some(bar) = bar {
        rows[0] = rows[0].clone().bar(AtLeast(bar));
    }
    if matches!(protocol, Protocol::Udp) {
        // A receiver that is slower than the link hides what the link costs the sender.
        rows.extend(sent.rows(&format!("{name} sent"), names, unit)?);
    }
    Ok(rows)
}

/// Rates of all rounds, of both links.
#[derive(Default)]
struct Measured {
    one: Vec<f64>,
    other: Vec<f64>,
}

impl Measured {
    fn add(&mut self, one: f64, other: f64) {
        self.one.push(one);
        self.other.push(other);
    }

    /// The median of the ratios first, then those of the rates.
    fn rows(&self, what: &str, names: [&str; 2], unit: &'static str) -> Result<Vec<Row>> {
        let ratios: Vec<_> = self
            .one
            .iter()
            .zip(&self.other)
            .map(|(one, other)| one / other)
            .collect();
        let [one, other] = names;
        let row = |text: String, values: &[f64], unit| {
            median(values)
                .map(|value| Row::new(text, value, unit, values.len() as u64))
                .context("no round was measured")
        };
        Ok(vec![
            row(format!("{what}, {one} to {other}"), &ratios, "")?,
            row(format!("{what}, {one}"), &self.one, unit)?,
            row(format!("{what}, {other}"), &self.other, unit)?,
        ])
    }
}

/// Gbit/s for TCP, thousands of datagrams a second for UDP.
struct Rate {
    sent: f64,
    received: f64,
}

fn rate(protocol: Protocol, ends: &Ends<'_>, seconds: u64) -> Result<Rate> {
    let mut command = ends.client_pod.command("iperf3")?;
    command
        .args([
            "--json",
            "--client",
            &ends.address,
            "--connect-timeout",
            "5000",
        ])
        .args(["--time", &seconds.to_string()]);
    if let Some([sender, receiver]) = two_cpus() {
        command.args(["--affinity", &format!("{sender},{receiver}")]);
    }
    if matches!(protocol, Protocol::Udp) {
        command.args(["--udp", "--bitrate", "0", "--length", "64"]);
    }
    let deadline = Duration::from_secs(seconds) + IPERF_SLACK;
    let output: Value = run_json(ends.world, "iperf3", command, deadline)
        .with_context(|| format!("{protocol:?} through the link that is {}", ends.name))?;
    read_rate(protocol, &output)
        .with_context(|| format!("iperf3 has measured nothing: {}", output["end"]))
}

/// The first two CPUs that we may use.
fn two_cpus() -> Option<[usize; 2]> {
    let ours = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let mut allowed = (0..CpuSet::count()).filter(|&cpu| ours.is_set(cpu) == Ok(true));
    Some([allowed.next()?, allowed.next()?])
}

fn read_rate(protocol: Protocol, output: &Value) -> Option<Rate> {
    let of = |sum: &str| {
        let sum = &output["end"][sum];
        let bits = sum["bits_per_second"].as_f64().filter(|&bits| bits > 0.0)?;
        Some(match protocol {
            Protocol::Tcp => bits / 1e9,
            Protocol::Udp => bits / 8.0 / DATAGRAM / 1e3,
        })
    };
    Some(Rate {
        sent: of("sum_sent")?,
        received: of("sum_received")?,
    })
}

/// Packets of our connection that BPF on the client's node has counted, both ways.
///
/// # Errors
/// When there are none: the programs are off the path, and a ratio says nothing of them.
pub(super) fn packets_counted(domains: &Domains) -> Result<u64> {
    let status = domains.client_agent.status()?;
    let connections = status["connections"].as_array();
    let counters = connections
        .and_then(|connections| connections.first())
        .map(|connection| &connection["tunnel"]["counters"])
        .context("the client's agent shows no connection")?;
    let count = |name: &str| counters[name].as_u64().unwrap_or_default();
    let counted = count("tx_packets") + count("rx_packets");
    ensure!(
        counted > 0,
        "BPF on node-1 has counted no packet of the connection"
    );
    Ok(counted)
}

/// The part of the frames from the client's pod that took the fast path.
fn fast_part(domains: &Domains) -> Result<f64> {
    let status = domains.client_agent.status()?;
    let frames = &status["bpf"]["frames"];
    let count = |name: &str| frames[name].as_f64().unwrap_or_default();
    let (fast, slow) = (count("fast_out"), count("slow_out"));
    ensure!(
        fast + slow > 0.0,
        "the client's agent shows no frames: {frames}"
    );
    Ok(fast / (fast + slow))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rates_are_read() {
        let output = json!({"end": {
            "sum_sent": {"bits_per_second": 1e9}, "sum_received": {"bits_per_second": 512e6}}});
        let tcp = read_rate(Protocol::Tcp, &output).unwrap();
        assert_eq!((tcp.sent, tcp.received), (1.0, 0.512));
        let udp = read_rate(Protocol::Udp, &output).unwrap();
        assert_eq!(udp.received, 1000.0);
        let nothing = json!({"end": {"sum_sent": {"bits_per_second": 1e9},
            "sum_received": {"bits_per_second": 0.0}}});
        assert!(read_rate(Protocol::Udp, &nothing).is_none());
    }

    #[test]
    fn ratios_are_of_one_round() {
        let mut measured = Measured::default();
        // The machine was half as fast in the second round, for both.
        for (one, other) in [(9.0, 10.0), (4.5, 5.0), (9.0, 10.0)] {
            measured.add(one, other);
        }
        let names = ["ours", "bare"];
        let rows = measured.rows("TCP received", names, "Gbit/s").unwrap();
        assert_eq!(rows[0], Row::new("TCP received, ours to bare", 0.9, "", 3));
        assert!(
            Measured::default()
                .rows("TCP received", names, "Gbit/s")
                .is_err()
        );
    }
}
