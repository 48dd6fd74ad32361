//! `cargo xtask bench`: the numbers to hold, measured on this machine.
//!
//! First everything that the parts need is installed, checked and built ([`needs`]). Then every part runs in worlds of its own and ends
//! them. Rows are shown as they are measured and kept whatever comes after ([`sink`]). A bar that is missed is shown and is no failure
//! of the command: numbers of a busy or a small machine must not stop anybody. A part that could not measure is.
//!
//! Each part says in its notes what its numbers include. A fixed piece of work is timed before and after, so that numbers of two days
//! can be distinguished from numbers of two machines; for two versions there is [`compare`].

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
use needs::Prepared;
use programs::Built;
use report::{Machine, Report, SideBySide};
use sink::{Parts, Sink};

/// An agent starts within a fraction of a second, on a loaded machine within some.
const READY_DEADLINE: Duration = Duration::from_secs(20);

/// The longest load takes ten seconds where it is as fast as it should be.
const LOAD_DEADLINE: Duration = Duration::from_secs(300);

/// The arguments of `cargo xtask bench`.
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
    let mut prepared = needs::prepare(&parts)?;
    prepared.built = prepared.built.copied()?;
    let run = Run::begin(arguments)?;
    let (on_signal, parts) = (run.clone(), run.parts.clone());
    on_interrupt(move |why| {
        parts.interrupt(why);
        on_signal.print().map(drop)
    })?;
    let calibration = run.parts.begin("calibration");
    calibrate(&calibration, "before");
    run.measure(prepared, arguments.minutes);
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
    fn begin(arguments: &Arguments) -> Result<Self> {
        Ok(Self {
            before: Machine::look()?,
            parts: Parts::default(),
            side_by_side: Arc::default(),
            quick: arguments.quick,
            json: arguments.json,
        })
    }

    /// Measures each part, whatever becomes of the others.
    fn measure(&self, prepared: Prepared, minutes: f64) {
        for (part, error) in prepared.refused {
            self.parts.begin(&part.name()).measure(|_| Err(error));
        }
        let setting = Setting {
            built: &prepared.built,
            go: prepared.go.as_ref(),
            size: if self.quick { Size::Quick } else { Size::Full },
            minutes,
        };
        for part in prepared.ready {
            let sink = self.parts.begin(&part.name());
            sink.measure(|sink| measure(part, &setting, sink, &self.side_by_side));
        }
    }

    /// What was found until now.
    fn report(&self) -> Result<Report> {
        let side_by_side = self.side_by_side.lock();
        Ok(Report {
            machine: self.before.clone().after()?,
            quick: self.quick,
            parts: self.parts.reports(),
            side_by_side: side_by_side.unwrap_or_else(PoisonError::into_inner).clone(),
        })
    }

    /// Prints what was found until now; whether all of it was.
    fn print(&self) -> Result<bool> {
        let report = self.report()?;
        if self.json {
            println!("{}", report.json()?);
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

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, process::Command};

    use anyhow::anyhow;
    use programs::Program;
    use serde_json::Value;

    use super::*;

    /// A stand-in for criterion's program, which measures its first benchmark and fails in the last.
    const FAILS_LAST: &str = "#!/bin/sh
case \"$*\" in
*--list) echo 'first_step: benchmark'; echo 'last_step: benchmark' ;;
*last_step*) echo 'criterion is out of order'; exit 3 ;;
esac
";

    /// Writes the stand-in below `target`, where a copy of criterion's program would be, and what criterion measured.
    fn stand_in(target: &Path) -> Built {
        let program = target.join("release/deps/measured/decisions");
        let measured = target.join("criterion/first_step/new");
        for folder in [program.parent().unwrap(), &measured] {
            fs::create_dir_all(folder).unwrap();
        }
        // By a process of its own: what another test starts meanwhile must not inherit a descriptor that writes to a program.
        let status = Command::new("sh")
            .args(["-c", "printf %s \"$1\" >\"$2\" && chmod +x \"$2\"", "sh"])
            .arg(FAILS_LAST)
            .arg(&program)
            .status()
            .unwrap();
        assert!(status.success());
        let estimates = r#"{"median": {"point_estimate": 412.0}}"#;
        fs::write(measured.join("estimates.json"), estimates).unwrap();
        fs::write(measured.join("sample.json"), r#"{"times": [1.0, 2.0]}"#).unwrap();
        let mut built = Built::default();
        built.insert(Program::Decisions, program);
        built
    }

    fn broken_in_its_last_step(target: &Path) -> Run {
        let run = Run {
            before: Machine::look().unwrap(),
            parts: Parts::default(),
            side_by_side: Arc::default(),
            quick: true,
            json: false,
        };
        let prepared = Prepared {
            ready: vec![Part::Core],
            refused: vec![(Part::Throughput, anyhow!("iperf3 is not installed"))],
            built: stand_in(target),
            go: None,
        };
        run.measure(prepared, 0.0);
        run
    }

    #[test]
    fn a_part_that_fails_in_its_last_step_still_prints_its_rows() {
        let target = tempfile::tempdir().unwrap();
        let report = broken_in_its_last_step(target.path()).report().unwrap();
        assert!(!report.is_whole());
        let text = report.render();
        for expected in [
            "throughput: could not be measured: iperf3 is not installed",
            "first step",
            "412",
            "stopped in: criterion, last_step",
            "criterion is out of order",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        let json: Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        let core = &json["parts"][1];
        assert_eq!(core["part"], "core");
        assert_eq!(core["rows"][0]["value"], 412.0);
        assert_eq!(core["rows"][0]["n"], 2);
        assert_eq!(core["failed_step"], "criterion, last_step");
        let error = core["error"].as_str().unwrap();
        assert!(error.contains("criterion is out of order"), "{error}");
    }
}
