//! `cargo xtask bench`: the numbers to hold, measured on this machine.
//!
//! First everything that the parts need is installed, checked and built ([`needs`]). Then every part runs in worlds of its own and ends
//! them. Rows are shown as they are measured and kept whatever comes after ([`sink`]). A bar that is missed is shown and is no failure
//! of the command: numbers of a busy or a small machine must not stop anybody. A part that could not measure is.
//!
//! Each part says in its notes what its numbers include. A fixed piece of work is timed before and after, so that numbers of two days
//! can be told apart from numbers of two machines; for two versions there is [`compare`].

mod bpf;
mod compare;
mod decisions;
mod health;
mod interop;
mod machine;
mod memory;
mod needs;
mod processes;
mod programs;
mod proxy;
mod report;
mod scene;
mod sessions;
mod setup;
mod sink;
mod throughput;

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use nix::{sys::signal::kill, unistd::Pid};
use nsm_world::interrupt;

use crate::interop::Go;
use machine::calibrate;
use programs::Built;
use report::{Machine, Report, SideBySide};
use sink::{Parts, Sink};

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
    /// Measure the agent of this revision, too, in turn with the present one, and print the ratios.
    #[arg(long, value_name = "REV", conflicts_with_all = ["quick", "minutes"])]
    compare: Option<String>,
    /// For `--compare`: how often both are measured; an odd number is rounded up, so that each is as often the first.
    #[arg(long, default_value_t = compare::PAIRS, requires = "compare", value_parser = compare::parse_pairs)]
    pairs: u32,
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

impl Part {
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// How much a part measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    /// For numbers to rely on.
    Full,
    /// To see that it runs.
    Quick,
    /// One of two sides of a pair, of which there are many: some seconds.
    Pair,
}

impl Size {
    /// What a part declares for each size.
    fn pick<T>(self, full: T, quick: T, pair: T) -> T {
        match self {
            Self::Full => full,
            Self::Quick => quick,
            Self::Pair => pair,
        }
    }
}

/// What a part measures with.
struct Setting<'a> {
    built: &'a Built,
    go: Option<&'a Go>,
    size: Size,
    /// For `health`.
    minutes: f64,
}

/// Measures and prints.
///
/// # Errors
/// When a part could not measure; the others are measured and printed nevertheless.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let all = Part::value_variants().iter().copied();
    let asked = |part: &Part| arguments.parts.is_empty() || arguments.parts.contains(part);
    let parts: Vec<_> = all.filter(asked).collect();
    if let Some(revision) = &arguments.compare {
        let chosen = compare::choose(parts, !arguments.parts.is_empty())?;
        return compare::run(revision, &chosen, arguments.pairs, arguments.json);
    }
    let prepared = needs::prepare(&parts)?;
    let size = if arguments.quick {
        Size::Quick
    } else {
        Size::Full
    };
    let run = Run {
        before: Machine::look()?,
        parts: Parts::default(),
        side_by_side: Arc::default(),
        quick: arguments.quick,
        json: arguments.json,
    };
    let (on_signal, parts) = (run.clone(), run.parts.clone());
    on_interrupt(move |why| {
        parts.interrupt(why);
        on_signal.print().map(drop)
    })?;
    let calibration = run.parts.begin("calibration");
    calibrate(&calibration, "before");
    for (part, error) in prepared.refused {
        run.parts.begin(&part.name()).measure(|_| Err(error));
    }
    let setting = Setting {
        built: &prepared.built,
        go: prepared.go.as_ref(),
        size,
        minutes: arguments.minutes,
    };
    for part in prepared.ready {
        let sink = run.parts.begin(&part.name());
        sink.measure(|sink| measure(part, &setting, sink, &run.side_by_side));
    }
    calibrate(&calibration, "after");
    let is_whole = run.print()?;
    ensure!(is_whole, "a part could not be measured: see above");
    Ok(())
}

/// A run that is under way. Clones share what was found.
#[derive(Clone)]
struct Run {
    before: Machine,
    parts: Parts,
    side_by_side: Arc<Mutex<Option<SideBySide>>>,
    quick: bool,
    json: bool,
}

impl Run {
    /// Prints what was found until now; whether all of it was.
    fn print(&self) -> Result<bool> {
        let side_by_side = self.side_by_side.lock();
        let report = Report {
            machine: self.before.clone().after()?,
            quick: self.quick,
            parts: self.parts.reports(),
            side_by_side: side_by_side.unwrap_or_else(PoisonError::into_inner).clone(),
        };
        if self.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            print!("{}", report.render());
        }
        Ok(report.is_whole())
    }
}

/// Prints on Ctrl-C and SIGTERM what there is; then the signal ends this process, after its worlds.
fn on_interrupt(print: impl FnOnce(&str) -> Result<()> + Send + 'static) -> Result<()> {
    let attend = || {
        let signal = interrupt::wait();
        if let Err(error) = print(&format!("ended by {signal}")) {
            eprintln!("what was measured cannot be printed: {error:#}");
        }
        // Nobody waits for signals any more, so this one tears down and ends the process.
        if kill(Pid::this(), signal).is_err() {
            std::process::exit(1);
        }
    };
    thread::Builder::new()
        .name("print-on-signal".to_owned())
        .spawn(attend)
        .context("start a thread that attends to signals")?;
    Ok(())
}

fn measure(
    part: Part,
    setting: &Setting<'_>,
    sink: &Sink,
    side_by_side: &Mutex<Option<SideBySide>>,
) -> Result<()> {
    match part {
        Part::Core => decisions::measure(setting, sink),
        Part::Interop => interop::measure(setting, sink, |compared| {
            *side_by_side.lock().unwrap_or_else(PoisonError::into_inner) = Some(compared);
        }),
        Part::Bpf => bpf::measure(setting, sink),
        Part::Setup => setup::measure(setting, sink),
        Part::Proxy => proxy::measure(setting, sink),
        Part::Memory => memory::measure(setting, sink),
        Part::Throughput => throughput::measure(setting, sink),
        Part::Health => health::measure(setting, sink),
    }
}
