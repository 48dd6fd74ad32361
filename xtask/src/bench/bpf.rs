//! What the BPF programs cost a packet, by the kernel's own account.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nsm_world::World;
use serde::Deserialize;

use super::{
    Setting,
    programs::Program,
    report::{Bar::AtMost, Row},
    sink::Sink,
};

const NANOSECONDS: f64 = 100.0;

/// Some million runs of a program that takes a hundred nanoseconds.
const DEADLINE: Duration = Duration::from_secs(60);

/// A line of the program.
#[derive(Debug, Deserialize)]
struct Cost {
    packet: String,
    direction: String,
    run_time_ns: f64,
    alone_ns: f64,
    /// Measurements of which these are the medians. Programs of earlier revisions do not say it.
    #[serde(default)]
    rounds: u64,
}

pub(super) fn measure(setting: &Setting<'_>, sink: &Sink) -> Result<()> {
    let name = Program::BpfCost.name();
    sink.step("a namespace");
    // The program makes a namespace by itself; the world is here for the pins, which it removes whatever happens.
    let world = World::builder("bench-bpf")
        .domain("cluster-1.example", |domain| domain.node("node"))
        .without_dns()
        .build()?;
    let node = world.node("node")?;
    let mut command = node.command(setting.built.get(Program::BpfCost)?)?;
    command.arg(node.pin_dir());
    sink.step("packets through the programs");
    let process = world.spawn(name, command)?;
    let status = process.wait(DEADLINE)?;
    let mut found = 0;
    for line in process.stdout().lines() {
        let cost: Cost =
            serde_json::from_str(line).with_context(|| format!("{name} printed {line:?}"))?;
        let what = format!("{}, {}", cost.direction, cost.packet);
        sink.row(Row::new(&what, cost.run_time_ns, "ns", cost.rounds).bar(AtMost(NANOSECONDS)));
        let what = what + ", without the account";
        sink.row(Row::new(what, cost.alone_ns, "ns", cost.rounds));
        found += 1;
    }
    ensure!(
        status.success(),
        "{name} failed ({status}):\n{}",
        world.logs()
    );
    ensure!(found > 0, "{name} measured nothing");
    sink.note(
        "by BPF_PROG_TEST_RUN; the kernel's account (run_time_ns) includes the two looks at a clock that it takes",
    );
    Ok(())
}
