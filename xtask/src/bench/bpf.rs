//! What the BPF programs cost a packet, by the kernel's own account.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nsm_world::World;
use serde::Deserialize;

use super::{
    Found,
    report::{Bar::AtMost, Row},
};
use crate::cargo::{executables, named};

const PROGRAM: &str = "bpf_cost";

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
}

pub(super) fn measure() -> Result<Found> {
    let built = executables(&[
        "build",
        "--release",
        "--package",
        "nsm-dataplane",
        "--example",
        PROGRAM,
    ])?;
    let program = named(&built, PROGRAM)?;
    // The program makes a namespace by itself; the world is here for the pins, which it removes whatever happens.
    let world = World::builder("bench-bpf")
        .domain("cluster-1.example", |domain| domain.node("node"))
        .without_dns()
        .build()?;
    let node = world.node("node")?;
    let mut command = node.command(&program)?;
    command.arg(node.pin_dir());
    let process = world.spawn(PROGRAM, command)?;
    let status = process.wait(DEADLINE)?;
    ensure!(
        status.success(),
        "{PROGRAM} failed ({status}):\n{}",
        world.logs()
    );
    let mut rows = Vec::new();
    for line in process.stdout().lines() {
        let cost: Cost =
            serde_json::from_str(line).with_context(|| format!("{PROGRAM} printed {line:?}"))?;
        let what = format!("{}, {}", cost.direction, cost.packet);
        rows.push(Row::new(&what, cost.run_time_ns, "ns").bar(AtMost(NANOSECONDS)));
        rows.push(Row::new(
            what + ", without the account",
            cost.alone_ns,
            "ns",
        ));
    }
    ensure!(!rows.is_empty(), "{PROGRAM} measured nothing");
    Ok(Found {
        rows,
        notes: vec![
            "by BPF_PROG_TEST_RUN; the kernel's account (run_time_ns) includes the two looks at a clock that it takes"
                .to_owned(),
        ],
    })
}
