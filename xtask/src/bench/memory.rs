//! Memory of open connections, and after many that were closed.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Deserialize;

use super::{
    LOAD_DEADLINE, Setting,
    processes::rss_kib,
    programs::Programs,
    report::{Bar::AtMost, Row},
    scene::Pair,
    sink::Sink,
};

const KIB_A_CONNECTION: f64 = 10.0;

/// What an agent may grow by a pair that is closed again. The least that a connection could leave behind is its id, 36 characters and so
/// one small allocation of 40 bytes: that alone misses the bar. What an allocator keeps for itself was below 12 over 20,000 pairs.
pub(super) const BYTES_A_PAIR: f64 = 32.0;

/// Pairs before the first look, so that peers are connected and pools are filled.
const WARM_UP: u64 = 500;

/// The longest that a person should wait for `status`, whatever the number of connections.
const STATUS_MS: f64 = 2_000.0;

const END_DEADLINE: Duration = Duration::from_secs(10);

pub(super) fn measure(setting: &Setting<'_>, sink: &Sink) -> Result<()> {
    let (connections, pairs) = setting
        .size
        .pick((10_000, 20_000), (1_000, 2_000), (2_000, 4_000));
    let programs = setting.built.world()?;
    open_connections(&programs, connections, sink)?;
    closed_connections(&programs, pairs, sink)?;
    sink.note("resident memory of agents without a datapath (proxy role), before and after: one difference, divided by N");
    Ok(())
}

/// What `nsm-load hold` says.
#[derive(Debug, Deserialize)]
struct Held {
    failed: u64,
    endpoint_holds: u64,
}

fn open_connections(programs: &Programs, connections: u32, sink: &Sink) -> Result<()> {
    sink.step("two agents");
    // Agents of its own: memory that others freed would hide what these take.
    let pair = Pair::start(programs)?;
    pair.pairs(WARM_UP, 0, 8)?;
    let agents = [&pair.client_agent, &pair.endpoint_agent];
    let before = [rss_kib(agents[0])?, rss_kib(agents[1])?];
    sink.step(format!("{connections} open connections"));
    let mut command = pair.load("hold")?;
    command.args(["--connections", &connections.to_string()]);
    let load = pair.world.spawn("hold", command)?;
    let held: Held = load.wait_for("the connections it holds", LOAD_DEADLINE, |line| {
        serde_json::from_str(line).ok()
    })?;
    ensure!(
        held.failed == 0 && held.endpoint_holds == u64::from(connections),
        "of {connections} connections {} failed and {} are open:\n{}",
        held.failed,
        held.endpoint_holds,
        pair.world.logs()
    );
    for (agent, before) in agents.into_iter().zip(before) {
        let what = format!("open connection of {connections}, {}", agent.name());
        let each = (rss_kib(agent)? - before) / f64::from(connections);
        sink.row(Row::new(what, each, "KiB", connections.into()).bar(AtMost(KIB_A_CONNECTION)));
    }
    sink.step("status");
    // After the look at memory, for the answer takes some.
    for agent in agents {
        let began = Instant::now();
        let status = pair.status(programs, agent)?;
        let took = began.elapsed();
        let shown = status["connections"].as_array().map_or(0, Vec::len);
        ensure!(
            shown == connections as usize,
            "`status` of {} shows {shown} connections of {connections}",
            agent.name()
        );
        let what = format!("`status --json` with {connections} open, {}", agent.name());
        sink.row(Row::new(what, took.as_secs_f64() * 1e3, "ms", 1).bar(AtMost(STATUS_MS)));
    }
    load.terminate(END_DEADLINE)?;
    Ok(())
}

fn closed_connections(programs: &Programs, pairs: u32, sink: &Sink) -> Result<()> {
    sink.step(format!("{pairs} closed pairs"));
    let pair = Pair::start(programs)?;
    // A tenth first: queues, tables and heaps have their size then.
    pair.pairs(WARM_UP.max(u64::from(pairs) / 10), 0, 8)?;
    let agents = [&pair.client_agent, &pair.endpoint_agent];
    let before = [rss_kib(agents[0])?, rss_kib(agents[1])?];
    let measured = pair.pairs(pairs.into(), 0, 8)?;
    ensure!(
        measured.failed == 0,
        "{} of {pairs} pairs failed:\n{}",
        measured.failed,
        pair.world.logs()
    );
    for (agent, before) in agents.into_iter().zip(before) {
        let what = format!("growth a closed pair of {pairs}, {}", agent.name());
        let each = (rss_kib(agent)? - before) * 1024.0 / f64::from(pairs);
        sink.row(Row::new(what, each, "B", pairs.into()).bar(AtMost(BYTES_A_PAIR)));
    }
    Ok(())
}
