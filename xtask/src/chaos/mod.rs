//! `cargo xtask chaos`: three domains under faults that a seed draws, and what must hold all the time.
//!
//! - No connection is UP for more than two seconds while its packets do not pass, but where the client's own agent is away.
//! - Ten seconds after the last fault has gone packets of every client pass.
//! - No packet of one connection comes to another.
//! - No agent panics, holds more files or memory than at its first quiet time, or leaves links and pins behind.

mod plan;
mod scene;
mod watch;

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, ensure};
use clap::Args;

use self::{plan::Step, scene::Scene};
use crate::{demo, packages};

/// Within this time after the last fault packets pass again.
const HEALED: Duration = Duration::from_secs(10);

/// The arguments of `cargo xtask chaos`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// How long faults are injected.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// The number that the faults follow from: a run that failed is repeated with the seed that it has printed.
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs the storms of a seed.
///
/// # Errors
/// When something is missing, or what must hold did not, with each case.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    ensure!(
        packages::is_root(),
        "chaos makes network namespaces, links and BPF programs: run it as root (sudo -E env PATH=$PATH cargo xtask chaos)"
    );
    ensure!(
        (0.1..=10_000.0).contains(&arguments.minutes),
        "--minutes {}: a number from 0.1 to 10000",
        arguments.minutes
    );
    packages::ensure(packages::DEMO)?;
    let seed = arguments.seed.unwrap_or_else(drawn);
    println!("seed {seed}");
    let mut scene = Scene::build(&demo::programs()?)?;
    let mut run = Run::new(seed);
    run.note(scene.settles(HEALED));
    let ends = Instant::now() + Duration::from_secs_f64(arguments.minutes * 60.0);
    for number in 0.. {
        run.storm(&mut scene, &plan::storm(seed, number))?;
        let found = scene.settles(HEALED);
        run.note(found);
        run.note(scene.growth());
        if Instant::now() >= ends || !run.violations.is_empty() {
            break;
        }
    }
    run.finish(scene, arguments.minutes)
}

/// Any number, short enough to be typed.
fn drawn() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::from(now.unwrap_or_default().subsec_nanos()) % 1_000_000
}

/// A run so far.
struct Run {
    seed: u64,
    began: Instant,
    blows: BTreeMap<String, usize>,
    violations: Vec<String>,
}

impl Run {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            began: Instant::now(),
            blows: BTreeMap::new(),
            violations: Vec::new(),
        }
    }

    fn say(&self, text: &str) {
        println!("{:>7.1} s  {text}", self.began.elapsed().as_secs_f64());
    }

    fn note(&mut self, found: Vec<String>) {
        for violation in found {
            self.say(&format!("VIOLATION: {violation}"));
            self.violations.push(violation);
        }
    }

    /// Does what the steps say, each at its time, and ends when the last fault has gone.
    fn storm(&mut self, scene: &mut Scene, steps: &[Step]) -> Result<()> {
        let began = Instant::now();
        let mut due: Vec<(Duration, usize, bool)> = steps
            .iter()
            .enumerate()
            .flat_map(|(at, step)| [(step.at, at, true), (step.at + step.lasts, at, false)])
            .collect();
        due.sort();
        for (time, at, begins) in due {
            while began.elapsed() < time {
                self.note(scene.violations());
                let left = time.saturating_sub(began.elapsed());
                thread::sleep(left.min(Duration::from_millis(100)));
            }
            let Step { blow, lasts, .. } = steps[at];
            if begins {
                self.say(&format!("{blow}, for {lasts:.1?}"));
                *self.blows.entry(kind(&format!("{blow:?}"))).or_default() += 1;
                scene.begin(at, blow, lasts)?;
            } else {
                self.say(&format!("over: {blow}"));
                scene.end(at, blow)?;
            }
        }
        self.note(scene.violations());
        Ok(())
    }

    fn finish(mut self, mut scene: Scene, minutes: f64) -> Result<()> {
        self.note(scene.violations());
        let logs = (!self.violations.is_empty()).then(|| scene.world().logs());
        for (number, watch) in scene.watches().iter().enumerate() {
            let (sent, received) = watch.pings();
            println!("client {number}: {received} of {sent} echo requests were answered");
        }
        let left = scene.tear_down()?;
        self.note(left);
        for (kind, count) in &self.blows {
            println!("{count:>4}  {kind}");
        }
        if let Some(logs) = logs {
            eprintln!("the last lines of each process:\n{logs}");
        }
        ensure!(
            self.violations.is_empty(),
            "{} violations; again: cargo xtask chaos --minutes {minutes} --seed {}\n{}",
            self.violations.len(),
            self.seed,
            self.violations.join("\n")
        );
        println!("all held");
        Ok(())
    }
}

/// The name of a blow without what it hit.
fn kind(blow: &str) -> String {
    blow.split('(').next().unwrap_or_default().to_owned()
}
