//! `cargo xtask bench --compare REV`: the present agent and that of an earlier revision, measured in turn.
//!
//! Machines change by more from one minute to the next than most changes of ours do. So both are measured in pairs, right after each
//! other, the other first in every second pair; a pair gives one ratio for each row, and what counts is the median of the ratios with
//! its interval. Worlds, DNS server and load come from the present tree for both sides, so that the agents are what differs.

mod report;
mod revision;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    Part, Setting, Size, calibrate, measure, needs, on_interrupt,
    programs::{Built, Program},
    report::{Machine, Row},
    sink::{Parts, Sink, without_panic},
};
use crate::cargo::root;
use report::{Compared, Report};
use revision::Revision;

/// Of fewer there is no interval of 95 %.
const FEWEST_PAIRS: u32 = 6;

/// More are a slip of the hand.
const MOST_PAIRS: u32 = 500;

/// How many pairs are measured unless said.
pub(super) const PAIRS: u32 = 16;

/// After so many failed pairs in a row the others would fail, too.
const FAILURES_IN_A_ROW: u32 = 3;

/// A number of pairs from the command line, rounded up to an even one: only of that many each side is the first as often as the other.
///
/// # Errors
/// When that is no number, or none that can be measured.
pub(super) fn parse_pairs(text: &str) -> Result<u32, String> {
    let pairs: u32 = text.parse().map_err(|error| format!("{error}"))?;
    if (FEWEST_PAIRS..=MOST_PAIRS).contains(&pairs) {
        Ok(pairs.next_multiple_of(2))
    } else {
        Err(format!("{FEWEST_PAIRS} to {MOST_PAIRS}"))
    }
}

/// The parts to compare: those asked for, or all that can be.
///
/// # Errors
/// When one was asked for that cannot be compared: says why.
pub(super) fn choose(parts: Vec<Part>, asked: bool) -> Result<Vec<Part>> {
    let mut chosen = Vec::new();
    for part in parts {
        match cannot(part) {
            None => chosen.push(part),
            Some(why) if asked => bail!("{} cannot be compared: {why}", part.name()),
            Some(_) => {}
        }
    }
    Ok(chosen)
}

/// Why a part cannot be compared.
fn cannot(part: Part) -> Option<&'static str> {
    match part {
        Part::Core => Some(
            "it is one program, and criterion compares by itself (cargo bench -p nsm-core -- --save-baseline NAME in the other tree)",
        ),
        Part::Interop => Some(
            "it compares with the real NSM already, in turn; run it on each tree and compare the ratios",
        ),
        Part::Bpf | Part::Setup | Part::Proxy | Part::Memory | Part::Throughput | Part::Health => {
            None
        }
    }
}

/// Measures the parts with the present programs and with those of `revision`, and prints the ratios.
///
/// # Errors
/// When the revision does not exist or does not build, or of a part too few pairs could be measured; what was measured is printed.
pub(super) fn run(revision: &str, parts: &[Part], pairs: u32, json: bool) -> Result<()> {
    let revision = Revision::find(&root(), revision)?;
    let prepared = needs::prepare(parts)?;
    let measured = needs::programs(&prepared.ready);
    let measured = measured.into_iter().filter(|program| program.is_measured());
    let sides = Sides {
        rev: revision.programs(measured.collect(), &prepared.built)?,
        now: prepared.built,
    };
    let run = Run {
        before: Machine::look()?,
        revision,
        wanted: pairs,
        calibration: Parts::default(),
        parts: Arc::default(),
        json,
    };
    let on_signal = run.clone();
    on_interrupt(move |why| {
        eprintln!("==> {why}");
        on_signal.print().map(drop)
    })?;
    let calibration = run.calibration.begin("calibration");
    calibrate(&calibration, "before");
    for (part, error) in prepared.refused {
        run.begin(part);
        run.change(|compared| compared.error = Some(format!("{error:#}")));
    }
    for part in prepared.ready {
        run.begin(part);
        if let Err(error) = run.pairs(part, &sides) {
            eprintln!("    {}: {error:#}", part.name());
            run.change(|compared| compared.error = Some(format!("{error:#}")));
        }
    }
    calibrate(&calibration, "after");
    let is_whole = run.print()?;
    ensure!(is_whole, "a part could not be compared: see above");
    Ok(())
}

/// The programs of both sides.
struct Sides {
    now: Built,
    rev: Built,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Now,
    Rev,
}

/// A comparison that is under way. Clones share what was found.
#[derive(Clone)]
struct Run {
    before: Machine,
    revision: Revision,
    wanted: u32,
    calibration: Parts,
    parts: Arc<Mutex<Vec<Compared>>>,
    json: bool,
}

impl Run {
    fn begin(&self, part: Part) {
        eprintln!("==> {}", part.name());
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.push(Compared::begin(part.name()));
    }

    /// Changes the part that is under way.
    fn change<T: Default>(&self, change: impl FnOnce(&mut Compared) -> T) -> T {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.last_mut().map(change).unwrap_or_default()
    }

    fn pairs(&self, part: Part, sides: &Sides) -> Result<()> {
        for program in programs(part) {
            sides.rev.get(program).with_context(|| {
                let source = program.source();
                format!("{} has no {source} to compare with", self.revision.shown)
            })?;
        }
        let mut in_a_row = 0;
        for number in 0..self.wanted {
            let start = Instant::now();
            let outcome = without_panic(|| pair(part, sides, order(number)));
            let took = start.elapsed().as_secs_f64();
            let of = format!("pair {} of {}", number + 1, self.wanted);
            match outcome {
                Ok((now, rev)) => {
                    in_a_row = 0;
                    let line = self.change(|compared| compared.add(now, rev));
                    eprintln!("    {of}: {took:.1} s, {line}");
                }
                Err(error) => {
                    in_a_row += 1;
                    eprintln!("    {of} failed: {error:#}");
                    self.change(|compared| compared.failures.push(format!("{of}: {error:#}")));
                }
            }
            if in_a_row == FAILURES_IN_A_ROW {
                bail!("{in_a_row} pairs in a row failed, so the others were not tried");
            }
        }
        let measured = self.change(|compared| compared.pairs());
        ensure!(
            is_enough(measured, self.wanted),
            "only {measured} of {} pairs could be measured",
            self.wanted
        );
        Ok(())
    }

    /// Prints what was found until now; whether all of it was.
    fn print(&self) -> Result<bool> {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let report = Report {
            machine: self.before.clone().after()?,
            revision: &self.revision,
            calibration: self.calibration.reports(),
            parts: &parts,
        };
        if self.json {
            println!("{}", report.json()?);
        } else {
            print!("{}", report.render());
        }
        Ok(parts.iter().all(Compared::is_whole))
    }
}

/// Failures are not by chance: an agent that fails under some load is not the one that the others' times are of.
fn is_enough(measured: usize, wanted: u32) -> bool {
    measured >= FEWEST_PAIRS as usize && measured * 5 >= wanted as usize * 4
}

/// The programs that a part's pair takes from the revision.
fn programs(part: Part) -> Vec<Program> {
    if part == Part::Health {
        // Of health only the cost of sessions is measured in pairs, by a program without agents.
        return vec![Program::HealthCost];
    }
    let all = needs::programs(&[part]);
    all.into_iter()
        .filter(|program| program.is_measured())
        .collect()
}

/// The other first in every second pair, so that what the first of a pair suffers falls on both.
fn order(pair: u32) -> [Side; 2] {
    if pair.is_multiple_of(2) {
        [Side::Now, Side::Rev]
    } else {
        [Side::Rev, Side::Now]
    }
}

/// Measures both, each pair by other copies of the programs; the present one's rows come first.
fn pair(part: Part, sides: &Sides, order: [Side; 2]) -> Result<(Vec<Row>, Vec<Row>)> {
    let (mut now, mut rev) = (Vec::new(), Vec::new());
    for side in order {
        let (built, rows) = match side {
            Side::Now => (&sides.now, &mut now),
            Side::Rev => (&sides.rev, &mut rev),
        };
        let built = built.copied()?;
        let setting = Setting {
            built: &built,
            go: None,
            size: Size::Pair,
            minutes: 0.0,
        };
        let sink = Sink::quiet();
        measure(part, &setting, &sink, &Mutex::default()).with_context(|| format!("{side:?}"))?;
        *rows = sink.report().rows;
    }
    Ok((now, rev))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        arguments: super::super::Arguments,
    }

    /// How many pairs are measured with these arguments.
    fn pairs(more: &[&str]) -> u32 {
        let line = ["bench", "--compare", "HEAD~1"];
        let line = Line::try_parse_from(line.iter().chain(more)).unwrap();
        line.arguments.pairs
    }

    #[test]
    fn each_side_is_as_often_the_first() {
        for pairs in [pairs(&[]), pairs(&["--pairs", "7"])] {
            let first = |side| (0..pairs).filter(|&pair| order(pair)[0] == side).count();
            assert_eq!(first(Side::Now), first(Side::Rev), "of {pairs}");
        }
        assert_eq!(pairs(&["--pairs", "7"]), 8);
        assert_eq!(pairs(&["--pairs", "500"]), 500);
        assert!(parse_pairs("5").is_err() && parse_pairs("501").is_err());
    }

    #[test]
    fn some_pairs_may_fail_and_not_many() {
        assert!(is_enough(15, 15) && is_enough(12, 15));
        assert!(!is_enough(11, 15));
        assert!(is_enough(6, 6) && !is_enough(5, 6));
    }

    #[test]
    fn what_cannot_be_compared_is_refused_only_if_it_was_asked_for() {
        let all = vec![Part::Core, Part::Setup];
        assert_eq!(choose(all.clone(), false).unwrap(), [Part::Setup]);
        let error = choose(all, true).unwrap_err().to_string();
        assert!(error.starts_with("core cannot be compared: "), "{error}");
    }
}
