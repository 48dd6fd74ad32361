//! What sessions cost: the traffic beside them, the node that keeps many, and how fast a busy node answers.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nsm_world::{World, wait_until};
use serde::Deserialize;

use super::{
    Found,
    processes::run_json,
    programs::Programs,
    report::{Bar::AtMost, Row},
    scene::Domains,
    throughput::{Protocol, compare, connection, packets_counted},
};
use crate::cargo::{executables, named};

/// Of the throughput without sessions: 40 packets a second beside some hundred thousand must not show.
const RATIO: f64 = 0.99;

const REFLECTION_P99_US: f64 = 50.0;
const CPU_PERCENT: f64 = 5.0;

/// A new session is up with the first answer.
const UP_DEADLINE: Duration = Duration::from_secs(10);

const PROGRAM: &str = "health_cost";

/// The program sets up fifty nodes one after the other, before it measures for as long as it is told.
const SET_UP_DEADLINE: Duration = Duration::from_secs(180);

/// A saturated tunnel of agents that probe, against the same of agents that do not; BPF counts in both.
pub(super) fn throughput(programs: &Programs, quick: bool) -> Result<Found> {
    // The bar is nearer to 1 than one round is to the next: it takes many.
    let (rounds, seconds) = if quick { (2, 1) } else { (40, 1) };
    let with = Domains::build(programs)?;
    let without = Domains::build_with(programs, &["--reachability", "off"])?;
    let (probed, _, _client) = connection(&with, "with sessions")?;
    let (unprobed, _, _other_client) = connection(&without, "without")?;
    let state = |domains: &Domains| -> Result<Option<String>> {
        let health = &domains.client_agent.status()?["connections"][0]["health"];
        Ok(health["state"].as_str().map(str::to_owned))
    };
    wait_until("the session to be up", UP_DEADLINE, || {
        state(&with).is_ok_and(|state| state.as_deref() == Some("up"))
    })?;
    let probes = state(&without)?;
    ensure!(
        probes.is_none(),
        "the agents that should not probe say that the path is {probes:?}"
    );
    let rows = compare(Protocol::Tcp, [&probed, &unprobed], RATIO, rounds, seconds)?;
    let counted = [packets_counted(&with)?, packets_counted(&without)?];
    Ok(Found {
        rows,
        notes: vec![format!(
            "sessions: iperf3 in two worlds, {rounds} rounds of {seconds} s each in turn, medians; without is `reachability: off` on both \
             agents; BPF counted {} and {} packets of the connections",
            counted[0], counted[1]
        )],
    })
}

/// What the program prints.
#[derive(Debug, Deserialize)]
struct Cost {
    plane: String,
    cpu_percent: f64,
    us_per_probe: f64,
    reflection_p50_us: f64,
    reflection_p99_us: f64,
    false_alarms: u64,
}

/// Load of the program.
struct Load {
    peers: u32,
    connections: u32,
    busy: usize,
}

/// The prober of one node among many, and their reflectors.
pub(super) fn prober(quick: bool, busy: usize) -> Result<Found> {
    let seconds: u64 = if quick { 2 } else { 20 };
    let built = executables(&[
        "build",
        "--release",
        "--package",
        "nsm-dataplane",
        "--example",
        PROGRAM,
    ])?;
    let program = named(&built, PROGRAM)?;
    // The program has namespaces and pins that go with it; the world is here to end it whatever happens.
    let world = World::builder("bench-sessions")
        .domain("cluster-1.example", |domain| domain.node("node"))
        .without_dns()
        .build()?;
    let measure = |load: &Load| -> Result<Cost> {
        let mut command = world.node("node")?.command(&program)?;
        command
            .arg(format!("peers={}", load.peers))
            .arg(format!("connections={}", load.connections))
            .arg(format!("busy={}", load.busy))
            .arg(format!("seconds={seconds}"));
        let deadline = SET_UP_DEADLINE + Duration::from_secs(seconds);
        let cost: Cost = run_json(&world, PROGRAM, command, deadline)?;
        ensure!(cost.plane == "Bpf", "the programs do not answer: {cost:?}");
        ensure!(
            cost.false_alarms == 0,
            "paths that nobody cut were down: {cost:?}"
        );
        Ok(cost)
    };
    let loaded = Load {
        peers: 10,
        connections: 10,
        busy,
    };
    let many = Load {
        peers: 50,
        connections: 10_000,
        busy: 0,
    };
    let answers = measure(&loaded).context("reflection beside busy processes")?;
    let cost = measure(&many).context("many peers")?;
    let what = format!("reflection, {busy} busy");
    let of = format!("{} peers, {} connections", many.peers, many.connections);
    Ok(Found {
        rows: vec![
            Row::new(format!("{what}, p99"), answers.reflection_p99_us, "µs")
                .bar(AtMost(REFLECTION_P99_US)),
            Row::new(format!("{what}, p50"), answers.reflection_p50_us, "µs"),
            Row::new(format!("{of}, of a core"), cost.cpu_percent, "%").bar(AtMost(CPU_PERCENT)),
            Row::new(format!("{of}, a probe"), cost.us_per_probe, "µs"),
        ],
        notes: vec![format!(
            "reflection: from ingress to egress of the management link, {} nodes; of a core: a node's two threads within {seconds} s, \
             with what the kernel does for the round trip in the peer's namespace",
            loaded.peers
        )],
    })
}
