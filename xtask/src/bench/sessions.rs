//! What sessions cost: the traffic beside them, the node that keeps many, and how fast a busy node answers.

use std::time::Duration;

use anyhow::{Result, ensure};
use nsm_stats::p99_name;
use nsm_world::{World, wait_until};
use serde::Deserialize;

use super::{
    Setting,
    processes::run_json,
    programs::{Program, Programs},
    report::{Bar::AtMost, Row},
    scene::Domains,
    sink::Sink,
    throughput::{Protocol, compare, connection, packets_counted},
};

/// Of the throughput without sessions: 40 packets a second beside some hundred thousand must not show.
const RATIO: f64 = 0.99;

const REFLECTION_P99_US: f64 = 50.0;
const CPU_PERCENT: f64 = 5.0;

/// A new session is up with the first answer.
const UP_DEADLINE: Duration = Duration::from_secs(10);

/// The program sets up fifty nodes one after the other, before it measures for the time of its argument.
const SET_UP_DEADLINE: Duration = Duration::from_secs(180);

/// A saturated tunnel of agents that probe, against the same of agents that do not; BPF counts in both.
pub(super) fn throughput(setting: &Setting<'_>, programs: &Programs, sink: &Sink) -> Result<()> {
    sink.step("traffic with and without sessions");
    // The bar is nearer to 1 than one round is to the next: it takes many.
    let (rounds, seconds) = setting.size.pick((40, 1), (2, 1), (1, 1));
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
    let ends = [&probed, &unprobed];
    sink.rows(compare(Protocol::Tcp, ends, Some(RATIO), rounds, seconds)?);
    let counted = [packets_counted(&with)?, packets_counted(&without)?];
    sink.note(format!(
            "sessions: iperf3 in two worlds, {rounds} rounds of {seconds} s each in turn, medians; without is `reachability: off` on both \
             agents; BPF counted {} and {} packets of the connections",
            counted[0], counted[1]
    ));
    Ok(())
}

/// What the program prints.
#[derive(Debug, Deserialize)]
struct Cost {
    plane: String,
    seconds: f64,
    cpu_percent: f64,
    probes_per_second: f64,
    us_per_probe: f64,
    /// Programs of earlier revisions do not say it.
    #[serde(default)]
    reflections: u64,
    reflection_p50_us: f64,
    reflection_p99_us: f64,
    false_alarms: u64,
}

/// Load of the program.
struct Load {
    peers: u32,
    connections: u32,
    busy: usize,
    seconds: u64,
}

/// The prober of one node among many, and their reflectors.
pub(super) fn prober(setting: &Setting<'_>, busy: usize, sink: &Sink) -> Result<()> {
    let seconds = setting.size.pick(20, 2, 3);
    let (peers, connections) = setting.size.pick((50, 10_000), (50, 10_000), (20, 1_000));
    let few = Load {
        peers: 10,
        connections: 10,
        busy,
        seconds,
    };
    let many = Load {
        peers,
        connections,
        busy: 0,
        seconds,
    };
    sink.step("reflection beside busy processes");
    let answers = few.measure(setting)?;
    let (what, n) = (format!("reflection, {busy} busy"), answers.reflections);
    let p99 = format!("{what}, {}", p99_name(n));
    sink.row(Row::new(p99, answers.reflection_p99_us, "µs", n).bar(AtMost(REFLECTION_P99_US)));
    let p50 = format!("{what}, p50");
    sink.row(Row::new(p50, answers.reflection_p50_us, "µs", n));

    sink.step("many peers");
    let cost = many.measure(setting)?;
    let of = format!("{peers} peers, {connections} connections");
    sink.row(
        Row::new(format!("{of}, of a core"), cost.cpu_percent, "%", 1).bar(AtMost(CPU_PERCENT)),
    );
    let probes = (cost.probes_per_second * cost.seconds).round() as u64;
    let a_probe = format!("{of}, a probe");
    sink.row(Row::new(a_probe, cost.us_per_probe, "µs", probes));
    sink.note(format!(
        "reflection: from ingress to egress of the management link, {} nodes; of a core: a node's two threads within {seconds} s, \
         with what the kernel does for the round trip in the peer's namespace",
        few.peers
    ));
    Ok(())
}

impl Load {
    fn measure(&self, setting: &Setting<'_>) -> Result<Cost> {
        let name = Program::HealthCost.name();
        // The program has namespaces and pins that go with it; the world is here to end it whatever happens.
        let world = World::builder("bench-sessions")
            .domain("cluster-1.example", |domain| domain.node("node"))
            .without_dns()
            .build()?;
        let program = setting.built.get(Program::HealthCost)?;
        let mut command = world.node("node")?.command(program)?;
        command
            .arg(format!("peers={}", self.peers))
            .arg(format!("connections={}", self.connections))
            .arg(format!("busy={}", self.busy))
            .arg(format!("seconds={}", self.seconds));
        let deadline = SET_UP_DEADLINE + Duration::from_secs(self.seconds);
        let cost: Cost = run_json(&world, name, command, deadline)?;
        ensure!(cost.plane == "Bpf", "the programs do not answer: {cost:?}");
        ensure!(
            cost.false_alarms == 0,
            "paths that nobody cut were down: {cost:?}"
        );
        Ok(cost)
    }
}
