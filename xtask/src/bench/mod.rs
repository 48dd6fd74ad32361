//! `cargo xtask bench`: the numbers to hold, measured on this machine.
//!
//! Every part builds what it needs by the release profile, runs it in worlds of its own and ends it. A bar that is missed is shown
//! and is no failure of the command: numbers of a busy or a small machine must not stop anybody. A part that could not measure is.
//!
//! Each part says in its notes what its numbers include.

mod bpf;
mod decisions;
mod health;
mod interop;
mod memory;
mod processes;
mod programs;
mod proxy;
mod report;
mod scene;
mod sessions;
mod setup;
mod throughput;

use std::{fs, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};

use crate::packages;
use programs::Programs;
use report::{Machine, PartReport, Report, Row, SideBySide};

/// An agent starts within a fraction of a second, on a loaded machine within some.
const READY_DEADLINE: Duration = Duration::from_secs(20);

/// The longest load takes ten seconds where it is as fast as it should be.
const LOAD_DEADLINE: Duration = Duration::from_secs(300);

/// What `cargo xtask bench` can be told.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// What to measure; all of it unless said.
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Small sizes, to see that everything runs.
    #[arg(long)]
    quick: bool,
    /// For `health`: minutes in which no false alarm may come, for each of three loads.
    #[arg(long, default_value_t = 10.0, value_parser = minutes)]
    minutes: f64,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.01..=600.0).contains(&minutes) {
        Ok(minutes)
    } else {
        Err("0.01 to 600".to_owned())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The pure decisions, by criterion.
    Core,
    /// BPF programs, nanoseconds a packet.
    Bpf,
    /// From a client's Request to a tunnel that stands.
    Setup,
    /// Request and Close through two agents.
    Proxy,
    /// Memory of open connections, and after many that were closed.
    Memory,
    /// Traffic of a connection against a bare VXLAN link.
    Throughput,
    /// Real NSM proxies and ours under the same load (needs Go).
    Interop,
    /// From a path that is cut to DOWN at the client, false alarms, and what sessions cost.
    Health,
}

/// What a part found.
#[derive(Debug, Default)]
struct Found {
    rows: Vec<Row>,
    notes: Vec<String>,
}

/// Measures and prints.
///
/// # Errors
/// When a part could not measure; the others are measured and printed nevertheless.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let load_before = load_average()?;
    let (mut parts, mut side_by_side) = (Vec::new(), None);
    for &part in Part::value_variants() {
        if arguments.parts.is_empty() || arguments.parts.contains(&part) {
            parts.push(measure(part, arguments, &mut side_by_side));
        }
    }
    let report = Report {
        machine: Machine {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpus: thread::available_parallelism().map_or(1, usize::from),
            load_before,
            load_after: load_average()?,
        },
        quick: arguments.quick,
        parts,
        side_by_side,
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.render());
    }
    ensure!(report.is_whole(), "a part could not be measured: see above");
    Ok(())
}

fn measure(part: Part, arguments: &Arguments, side_by_side: &mut Option<SideBySide>) -> PartReport {
    let name = part
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default();
    eprintln!("==> {name}");
    let (found, error) = match measured(part, arguments, side_by_side) {
        Ok(found) => (found, None),
        Err(error) => {
            eprintln!("    {name}: {error}");
            (Found::default(), Some(format!("{error:#}")))
        }
    };
    PartReport {
        part: name,
        rows: found.rows,
        notes: found.notes,
        error,
    }
}

fn measured(
    part: Part,
    arguments: &Arguments,
    side_by_side: &mut Option<SideBySide>,
) -> Result<Found> {
    let quick = arguments.quick;
    match part {
        Part::Core => return decisions::measure(quick),
        Part::Interop => {
            let (found, compared) = interop::measure(quick)?;
            *side_by_side = Some(compared);
            return Ok(found);
        }
        _ => {}
    }
    ensure!(
        packages::is_root(),
        "it makes network namespaces: run it as root (sudo -E env PATH=$PATH cargo xtask bench)"
    );
    packages::ensure(packages::DEMO)?;
    match part {
        Part::Core | Part::Interop => unreachable!("returned above"),
        Part::Bpf => bpf::measure(),
        Part::Setup => setup::measure(&Programs::build()?, quick),
        Part::Proxy => proxy::measure(&Programs::build()?, quick),
        Part::Memory => memory::measure(&Programs::build()?, quick),
        Part::Throughput => {
            packages::ensure(packages::BENCH)?;
            throughput::measure(&Programs::build()?, quick)
        }
        Part::Health => health::measure(&Programs::build()?, quick, arguments.minutes),
    }
}

/// Of the last minute.
fn load_average() -> Result<f64> {
    let text = read("/proc/loadavg")?;
    let first = text.split_whitespace().next().unwrap_or_default();
    first
        .parse()
        .with_context(|| format!("/proc/loadavg begins with {first:?}"))
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {path}"))
}
