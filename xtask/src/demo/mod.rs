//! `cargo xtask demo`: a client of one domain pings an endpoint of another, before the reader's eyes.
//!
//! Everything is real: two agents, an endpoint and a client, each a process of its own; a DNS server that is asked; a VXLAN
//! link that the kernel carries; BPF programs that count. What the demo claims it has looked up: counters from the agents'
//! status, the DNS answer from the server's log, leaks from the kernel after all processes have ended.

mod check;
mod fault;
mod report;
mod transcript;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use nsm_world::{Agent, Client, Cloud, Endpoint, Pod, World, interrupt};
use serde_json::Value;

pub(crate) use self::{
    check::{check, check_faults},
    fault::forget_tunnel,
};
use crate::{
    cargo::{self, Programs},
    packages,
};
use report::{Bpf, Connection, Counters, Dns, Leaked, Ping, Report};
use transcript::Transcript;

const CLIENT_DOMAIN: &str = "cluster-1.example";
const ENDPOINT_DOMAIN: &str = "cluster-2.example";
const SERVICE: &str = "icmp-responder";
const ENDPOINT_CIDR: &str = "172.16.1.0/24";
const PINGS: u32 = 20;

/// A Request takes milliseconds; on a machine that is busy with a build it may take seconds.
const CONNECT_DEADLINE: Duration = Duration::from_secs(30);

/// Each process closes what it has; the slowest, an agent, within its own deadline.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// Counters are per packet, but read after the ping has ended.
const SETTLE_DEADLINE: Duration = Duration::from_secs(5);

/// The arguments of `cargo xtask demo`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// How nodes come by public addresses: directly on their link, or by 1:1 NAT in front of a private one.
    #[arg(long, value_enum, default_value_t = CloudShape::Packet)]
    cloud: CloudShape,
    /// Leave everything running, with the commands to look around, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Break the way between the nodes while a ping runs, and show how the agent reports it: blackhole, one-way, mtu,
    /// vni-mismatch, firewall-4789, nat-replies-only, loss=PERCENT.
    #[arg(long, value_name = "KIND")]
    fault: Option<fault::Kind>,
    /// Print what was found as JSON on standard output; the transcript goes to standard error.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CloudShape {
    Packet,
    Aws,
}

/// Builds what is needed, runs the demo and checks what is left at its end.
///
/// # Errors
/// When something is missing, a step fails, a ping is lost, counters do not show it, or anything is left behind.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        packages::is_root(),
        "the demo makes network namespaces, links and BPF programs: run it as root (sudo -E env PATH=$PATH cargo xtask demo)"
    );
    packages::ensure(packages::DEMO)?;
    let programs = programs()?;
    let report = run_on(arguments, &programs)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(())
}

/// The programs of the release profile, or those that the environment names.
pub(crate) fn programs() -> Result<Programs> {
    let named = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
    if let (Some(agent), Some(dns)) = (named("PROXY_NSMGR_BIN"), named("NSM_WORLD_DNS_BIN")) {
        return Ok(Programs { agent, dns });
    }
    eprintln!(
        "==> building {} and {} (release)",
        cargo::AGENT,
        cargo::WORLD_DNS
    );
    cargo::build_programs(&[
        "--release",
        "--package",
        cargo::AGENT,
        "--package",
        cargo::WORLD_DNS,
    ])
}

/// Everything that runs, in the order in which it must end: what is dropped first stands first.
struct Scene {
    client: Client,
    endpoint: Endpoint,
    client_agent: Agent,
    endpoint_agent: Agent,
    client_pod: Pod,
    endpoint_pod: Pod,
    world: World,
}

fn run_on(arguments: &Arguments, programs: &Programs) -> Result<Report> {
    let mut transcript = Transcript::begin(arguments.json);
    let (scene, connected) = set_up(arguments, programs, &mut transcript)?;
    let shown = show(&scene, &connected, &mut transcript).inspect_err(|_| {
        eprintln!("the last lines of each process:\n{}", scene.world.logs());
    })?;
    let fault = match arguments.fault {
        Some(kind) => {
            let reported = fault::show(kind, &scene, &shown.address, &mut transcript);
            Some(reported.inspect_err(|_| {
                eprintln!("the last lines of each process:\n{}", scene.world.logs());
            })?)
        }
        None => None,
    };
    if arguments.keep {
        transcript.text(&ways_to_look_around(&scene, programs, &shown.address));
        let signal = interrupt::wait();
        transcript.step(&format!("{signal}: tearing down"));
    }
    let leaked = tear_down(scene, &mut transcript)?;
    let report = Report {
        connection: shown.connection,
        setup_ms: report::setup_ms(&connected)?,
        dns: shown.dns,
        ping: shown.ping,
        counters: shown.counters,
        bpf: shown.bpf,
        fault,
        leaked,
    };
    report.check(PINGS)?;
    transcript.step("done");
    Ok(report)
}

/// What is seen while everything runs.
struct Shown {
    connection: Connection,
    /// The endpoint's, in the tunnel.
    address: String,
    dns: Dns,
    ping: Ping,
    counters: Counters,
    bpf: Bpf,
}

fn show(scene: &Scene, connected: &Value, transcript: &mut Transcript) -> Result<Shown> {
    let dns = dns_answer(&scene.world, connected, transcript)?;
    let connection = connection(connected, transcript)?;
    let address = report::endpoint_address(connected)?;
    let ping = ping(&scene.client_pod, &address)?;
    transcript.step(&format!(
        "ping {address}: {} of {} answered, round trip {} µs (p50)",
        ping.received, ping.sent, ping.rtt_us_p50
    ));
    let counters = Counters {
        client_node: counters_of(&scene.client_agent, connection.vni, &ping)?,
        endpoint_node: counters_of(&scene.endpoint_agent, connection.vni, &ping)?,
    };
    let bpf = report::bpf(&scene.client_agent.status()?)?;
    let sides = [
        (&scene.client_agent, &counters.client_node),
        (&scene.endpoint_agent, &counters.endpoint_node),
    ];
    for (agent, counters) in sides {
        let node = agent.node().name();
        transcript.step(&format!(
            "BPF ({}) on {node}: {} packets out, {} in",
            bpf.hook, counters.tx_packets, counters.rx_packets
        ));
        transcript.text(&agent.status_table()?);
    }
    Ok(Shown {
        connection,
        address,
        dns,
        ping,
        counters,
        bpf,
    })
}

/// World, agents, endpoint and client; with the client's own words about its connection.
fn set_up(
    arguments: &Arguments,
    programs: &Programs,
    transcript: &mut Transcript,
) -> Result<(Scene, Value)> {
    let cloud = match arguments.cloud {
        CloudShape::Packet => Cloud::Packet,
        CloudShape::Aws => Cloud::Aws,
    };
    let world = World::builder("demo")
        .cloud(cloud)
        .dns_program(&programs.dns)
        .domain(CLIENT_DOMAIN, |domain| {
            domain.node("node-1").pod("client").srv(5005, 5006)
        })
        .domain(ENDPOINT_DOMAIN, |domain| {
            domain.node("node-2").pod("endpoint").srv(5005, 5006)
        })
        .build()?;
    transcript.step("two domains and an internet with DNS stand:");
    for node in world.nodes() {
        let address = if node.private_ip() == node.public_ip() {
            node.public_ip().to_string()
        } else {
            format!("{} behind {}", node.private_ip(), node.public_ip())
        };
        let pods: Vec<_> = node
            .pods()
            .iter()
            .map(|pod| pod.name().to_owned())
            .collect();
        transcript.detail(&format!(
            "{}: {} at {address}, with pod {}",
            node.domain(),
            node.name(),
            pods.join(", ")
        ));
    }

    let start_agent =
        |name: &str| Agent::start(&world, &world.node(name)?, &programs.agent, |_| {});
    let (client_agent, endpoint_agent) = (start_agent("node-1")?, start_agent("node-2")?);
    for agent in [&client_agent, &endpoint_agent] {
        agent.wait_ready()?;
        transcript.step(&format!(
            "agent on {} is ready (pid {})",
            agent.node().name(),
            agent.process.pid()
        ));
    }

    let (client_pod, endpoint_pod) = (world.pod("client")?, world.pod("endpoint")?);
    let endpoint =
        endpoint_agent.endpoint(&world, &endpoint_pod, SERVICE, ENDPOINT_CIDR, |_| {})?;
    transcript.step(&format!(
        "endpoint for {SERVICE} is registered in {ENDPOINT_DOMAIN}, with {ENDPOINT_CIDR}"
    ));

    let service = format!("{SERVICE}@{ENDPOINT_DOMAIN}");
    transcript.step(&format!("client in {CLIENT_DOMAIN} asks for {service}"));
    let client = client_agent.connect(&world, &client_pod, &service, |_| {})?;
    let connected = client.wait_for_event("connected", CONNECT_DEADLINE)?;
    let scene = Scene {
        client,
        endpoint,
        client_agent,
        endpoint_agent,
        client_pod,
        endpoint_pod,
        world,
    };
    Ok((scene, connected))
}

/// The DNS answer that the client reports. The log of the world's server must have the question.
fn dns_answer(world: &World, connected: &Value, transcript: &mut Transcript) -> Result<Dns> {
    let queries = world.dns().queries()?;
    let mut answered = false;
    for query in queries
        .iter()
        .filter(|query| query.name.ends_with(ENDPOINT_DOMAIN))
    {
        answered |= !query.answer.is_empty();
        let answer = if query.answer.is_empty() {
            query.outcome.clone()
        } else {
            query.answer.join(" ")
        };
        transcript.detail(&format!("DNS: {} {} is {answer}", query.name, query.kind));
    }
    ensure!(
        answered,
        "the DNS server answered no question about {ENDPOINT_DOMAIN}"
    );
    report::dns(connected)
}

/// The connection as the client reports it.
fn connection(connected: &Value, transcript: &mut Transcript) -> Result<Connection> {
    let connection = report::connection(connected)?;
    let setup = report::setup_ms(connected)?;
    transcript.step(&format!(
        "connected to {} within {setup} ms: {} VNI {}, MTU {}",
        connection.endpoint, connection.mechanism, connection.vni, connection.mtu
    ));
    transcript.detail(&format!("path: {}", connection.path.join(" → ")));
    Ok(connection)
}

fn ping(pod: &Pod, address: &str) -> Result<Ping> {
    let count = PINGS.to_string();
    let output = pod
        .command("ping")?
        .args(["-c", &count, "-i", "0.01", "-W", "2", address])
        .output();
    let output = output.context("cannot start ping")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let printed = String::from_utf8_lossy(&output.stderr);
    Ping::parse(&text)
        .with_context(|| format!("ping printed neither sent nor received: {text}{printed}"))
}

/// Packets of the tunnel as BPF counted them on an agent's node, once they cover the ping.
fn counters_of(agent: &Agent, vni: u32, ping: &Ping) -> Result<report::NodeCounters> {
    let mut last = Ok(None);
    let waited = nsm_world::wait_until("counters that cover the ping", SETTLE_DEADLINE, || {
        last = agent.status().map(|status| report::counters(&status, vni));
        matches!(&last, Ok(Some(counters)) if counters.cover(ping))
    });
    match (last?, waited) {
        (Some(counters), Ok(())) => Ok(counters),
        (Some(counters), Err(_)) => bail!(
            "{} pings were answered, but BPF on {} counted only {counters:?}",
            ping.received,
            agent.node().name()
        ),
        (None, _) => bail!(
            "the agent on {} shows no counters for VNI {vni}",
            agent.node().name()
        ),
    }
}

/// Ends everything in order, counts what the processes left behind, tears the world down and counts again.
fn tear_down(scene: Scene, transcript: &mut Transcript) -> Result<Leaked> {
    let Scene {
        client,
        endpoint,
        client_agent,
        endpoint_agent,
        world,
        ..
    } = scene;
    client.close(END_DEADLINE).context("close the connection")?;
    transcript.step("client has closed its connection");
    endpoint.stop(END_DEADLINE).context("end the endpoint")?;
    for agent in [&client_agent, &endpoint_agent] {
        agent
            .drain(END_DEADLINE)
            .with_context(|| format!("end the agent on {}", agent.node().name()))?;
    }
    // Tearing down would remove what agents forgot, and so hide it.
    let left_by_processes = world.leaks()?;
    world.tear_down();
    let left_at_all = world.leaks()?;
    let leaked = Leaked {
        links: left_by_processes.links.len() + left_at_all.links.len(),
        pins: left_by_processes.pins.len() + left_at_all.pins.len(),
        netns: left_at_all.netns.len(),
        processes: left_at_all.processes.len(),
    };
    transcript.step(&format!(
        "torn down; left behind: {} links, {} pins, {} namespaces, {} processes",
        leaked.links, leaked.pins, leaked.netns, leaked.processes
    ));
    if !left_by_processes.links.is_empty() || !left_by_processes.pins.is_empty() {
        transcript.detail(&format!(
            "{:?} {:?}",
            left_by_processes.links, left_by_processes.pins
        ));
    }
    Ok(leaked)
}

fn ways_to_look_around(scene: &Scene, programs: &Programs, address: &str) -> String {
    let mut text = String::from("everything keeps running; in another shell, as root:\n");
    let mut line =
        |what: &str, command: String| text.push_str(&format!("\n  # {what}\n  {command}\n"));
    let (client, endpoint) = (
        scene.client_pod.netns_name(),
        scene.endpoint_pod.netns_name(),
    );
    line(
        "ping through the tunnel",
        format!("ip netns exec {client} ping {address}"),
    );
    line(
        "the client's end of the tunnel",
        format!("ip -n {client} -d addr show nsm-1"),
    );
    line("the endpoint's", format!("ip -n {endpoint} -d addr"));
    for agent in [&scene.client_agent, &scene.endpoint_agent] {
        let node = agent.node();
        line(
            &format!("what the agent on {} has", node.name()),
            format!(
                "{} status --admin {}",
                programs.agent.display(),
                agent.admin_url()
            ),
        );
        line(
            &format!("what BPF counts on {}", node.name()),
            format!(
                "bpftool map dump pinned {}/COUNTERS",
                node.pin_dir().display()
            ),
        );
        line(
            &format!("packets on the underlay of {}", node.name()),
            format!(
                "ip netns exec {} tcpdump -ni {} udp port 4789",
                node.netns_name(),
                node.interface()
            ),
        );
    }
    line(
        "logs",
        format!("tail -n 50 {}/log/*", scene.world.run_dir().display()),
    );
    text.push_str("\nCtrl-C tears all of it down.\n");
    text
}
