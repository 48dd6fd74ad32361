//! `cargo xtask fuzz`: the parsers of foreign bytes under libFuzzer, with the targets of `tests/fuzz`.
//!
//! The engine is libFuzzer, compiled from the crate that carries its sources. Stable rustc has the coverage that guides it as a pass of
//! LLVM. Crates of this workspace are compiled with it, in the dev profile with its checks of overflow; those of others are the ones that
//! tests were built with, so that the build is a minute and not five.

use std::{
    collections::VecDeque,
    fs::{self, File},
    num::NonZero,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    cargo::{self, Tree},
    packages,
    steps::{Parts, Steps, timed},
};

/// The package and program that runs targets.
const PROGRAM: &str = "nsm-fuzz";

/// The variable that names the target to the program (`nsm_fuzz::TARGET_VARIABLE`).
const TARGET_VARIABLE: &str = "NSM_FUZZ_TARGET";

/// What the program is compiled by.
const WRAPPER: &str = "tests/fuzz/rustc-with-coverage";

/// The committed inputs: a folder a target.
const CORPUS: &str = "tests/fuzz/corpus";

/// Where inputs of earlier runs, logs, and inputs that failed are.
const WORK: &str = "target/fuzz";

/// What each target gets in CI: all of them fuzz for half a minute on two processors.
const SECONDS_IN_CI: u64 = 4;

/// One input takes a parser microseconds. Seconds are an endless loop, also on a busy machine.
const SECONDS_OF_AN_INPUT: u32 = 10;

/// The longest input, bytes. What is longer than a message's limits is refused by its length, and long inputs are tried slowly.
const LONGEST: u32 = 4_096;

/// The most of a failed input that is printed.
const SHOWN: usize = 600;

/// What `cargo xtask fuzz` takes.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A target, and not all of them; the folders of tests/fuzz/corpus are their names.
    #[arg(long)]
    target: Option<String>,
    /// How long each target is fuzzed.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Give this input to the target, once, and fuzz nothing.
    #[arg(long, requires = "target")]
    replay: Option<PathBuf>,
}

/// Fuzzes, or replays an input.
///
/// # Errors
/// When the program cannot be built, or a target fails: its input is then printed, with how to replay it.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let all = targets()?;
    let chosen = match &arguments.target {
        None => all,
        Some(name) if all.contains(name) => vec![name.clone()],
        Some(name) => bail!("there is no target {name}: {}", all.join(", ")),
    };
    match &arguments.replay {
        Some(input) => replay(&build()?, &chosen[0], input),
        None => timed(|steps| fuzz(steps, &chosen, arguments.seconds)),
    }
}

/// Fuzzes all targets for a short time, as steps of a command.
///
/// # Errors
/// As [`run`].
pub(crate) fn briefly(steps: &mut Steps) -> Result<()> {
    fuzz(steps, &targets()?, SECONDS_IN_CI)
}

fn fuzz(steps: &mut Steps, targets: &[String], seconds: u64) -> Result<()> {
    let program = steps.run("the parsers of foreign bytes, with coverage", build)?;
    let failures = steps.run_in_parts("fuzzing of the parsers of foreign bytes", |parts| {
        all(&program, targets, seconds, parts)
    })?;
    ensure!(
        failures.is_empty(),
        "{} of {} fuzz targets failed:\n{}",
        failures.len(),
        targets.len(),
        failures.join("\n")
    );
    Ok(())
}

/// The names of all targets. A test of `tests/fuzz` compares the folders with the table.
fn targets() -> Result<Vec<String>> {
    let folder = cargo::root().join(CORPUS);
    let entries = fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn build() -> Result<PathBuf> {
    packages::ensure(packages::CPLUSPLUS)?;
    let tree = Tree {
        wrapper: Some(cargo::root().join(WRAPPER)),
        ..Tree::present()
    };
    let feature = format!("{PROGRAM}/engine");
    // With the features that the tests' build has, so that dependencies are not built twice.
    let arguments = [
        "build",
        "--workspace",
        "--bin",
        PROGRAM,
        "--features",
        &feature,
    ];
    cargo::named(&tree.executables(&arguments)?, PROGRAM)
}

/// Fuzzes the targets, as many at a time as there are processors, and returns what failed.
fn all(program: &Path, targets: &[String], seconds: u64, parts: &mut Parts) -> Result<Vec<String>> {
    let waiting = Mutex::new(targets.iter().collect::<VecDeque<_>>());
    let next = || {
        waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    let work = || {
        let mut done = Vec::new();
        while let Some(name) = next() {
            let began = Instant::now();
            let failure = one(program, name, seconds)?;
            done.push((name, began.elapsed(), failure));
        }
        anyhow::Ok(done)
    };
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    let done: Vec<(&String, Duration, Option<String>)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let done = workers
            .into_iter()
            .map(|worker| worker.join().expect("a worker panics where a test would"));
        anyhow::Ok(done.collect::<Result<Vec<_>>>()?.concat())
    })?;
    let mut failures = Vec::new();
    for (name, took, failure) in done {
        parts.add(name, took);
        failures.extend(failure);
    }
    Ok(failures)
}

/// Fuzzes one target. What it has found interesting is kept for the next run; what failed is described.
fn one(program: &Path, name: &str, seconds: u64) -> Result<Option<String>> {
    let work = cargo::root().join(WORK);
    let (grown, failed) = (
        work.join("corpus").join(name),
        work.join("failed").join(name),
    );
    for folder in [&grown, &failed] {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let log = work.join(format!("{name}.log"));
    let out = File::create(&log).with_context(|| format!("make {}", log.display()))?;
    let began = std::time::SystemTime::now();
    let status = Command::new(program)
        .env(TARGET_VARIABLE, name)
        .env("RUST_BACKTRACE", "0")
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={SECONDS_OF_AN_INPUT}"))
        .arg(format!("-max_len={LONGEST}"))
        .arg("-rss_limit_mb=1024")
        .arg("-print_final_stats=1")
        .arg(format!("-artifact_prefix={}/", failed.display()))
        .args([&grown, &cargo::root().join(CORPUS).join(name)])
        .stdin(Stdio::null())
        .stdout(out.try_clone().context("share the log")?)
        .stderr(out)
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let said = fs::read(&log).with_context(|| format!("read {}", log.display()))?;
    let said = String::from_utf8_lossy(&said);
    if status.success() {
        let runs = statistic(&said, "number_of_executed_units").unwrap_or("?");
        eprintln!("    {name}: {runs} inputs");
        return Ok(None);
    }
    let input = newest(&failed, began);
    Ok(Some(describe(name, &said, &log, input.as_deref())?))
}

/// What a person needs of a failure.
fn describe(name: &str, said: &str, log: &Path, input: Option<&Path>) -> Result<String> {
    let mut lines = vec![format!("  {name}: {}", reason(said))];
    match input {
        None => lines.push(format!("    it left no input: see {}", log.display())),
        Some(path) => {
            let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
            let shown = &bytes[..bytes.len().min(SHOWN)];
            let cut = if bytes.len() > SHOWN { "…" } else { "" };
            lines.push(format!(
                "    input, {} bytes: \"{}\"{cut}",
                bytes.len(),
                shown.escape_ascii()
            ));
            lines.push(format!(
                "    replay: cargo xtask fuzz --target {name} --replay {}",
                path.display()
            ));
            lines.push(format!(
                "    when it is mended, keep the input for good: mv it to {CORPUS}/{name}/, and name it by what it is"
            ));
        }
    }
    Ok(lines.join("\n"))
}

/// The panic, or else what libFuzzer says of the failure.
fn reason(said: &str) -> String {
    let lines: Vec<_> = said.lines().collect();
    if let Some(at) = lines.iter().position(|line| line.contains("panicked at")) {
        let panic = lines[at..]
            .iter()
            .take_while(|line| !line.starts_with("note: "));
        let text = panic.take(6).copied().collect::<Vec<_>>().join("\n      ");
        return text.chars().take(2 * SHOWN).collect();
    }
    let found = lines.iter().find(|line| line.contains("ERROR: libFuzzer"));
    (*found.unwrap_or(&"the program ended without a reason")).to_owned()
}

/// A number of libFuzzer's last lines.
fn statistic<'s>(said: &'s str, name: &str) -> Option<&'s str> {
    let prefix = format!("stat::{name}:");
    let line = said.lines().find_map(|line| line.strip_prefix(&prefix))?;
    Some(line.trim())
}

/// The last file that was written to a folder since.
fn newest(folder: &Path, since: std::time::SystemTime) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let written = |entry: &fs::DirEntry| entry.metadata().and_then(|data| data.modified()).ok();
    entries
        .filter_map(|entry| Some((written(&entry)?, entry.path())))
        .filter(|(written, _)| *written >= since)
        .max()
        .map(|(_, path)| path)
}

fn replay(program: &Path, name: &str, input: &Path) -> Result<()> {
    let status = Command::new(program)
        .env(TARGET_VARIABLE, name)
        .env("RUST_BACKTRACE", "1")
        .arg(input)
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(status.success(), "{name} fails on {}", input.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_described_by_its_panic_and_its_input() {
        let folder = tempfile::tempdir().unwrap();
        let since = std::time::SystemTime::UNIX_EPOCH;
        assert_eq!(newest(folder.path(), since), None);
        let input = folder.path().join("crash-1");
        fs::write(&input, b"ns@\n\xff").unwrap();
        assert_eq!(newest(folder.path(), since), Some(input.clone()));

        let said = "#1 NEW\nthread '<unnamed>' panicked at a.rs:1:2:\nboom\nnote: run with\nrest";
        let text = describe("name", said, Path::new("log"), Some(&input)).unwrap();
        for part in [
            "panicked at a.rs:1:2:\n      boom\n    input",
            r#"5 bytes: "ns@\n\xff""#,
            "cargo xtask fuzz --target name --replay /",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("rest"), "{text}");

        let hung = "==1== ERROR: libFuzzer: timeout after 10 seconds\n";
        let text = describe("name", hung, Path::new("the.log"), None).unwrap();
        assert!(
            text.contains("timeout after 10") && text.contains("the.log"),
            "{text}"
        );
    }

    #[test]
    fn statistics_are_found() {
        let said = "stat::number_of_executed_units: 72035\nstat::average_exec_per_sec:     12005\n";
        assert_eq!(statistic(said, "number_of_executed_units"), Some("72035"));
        assert_eq!(statistic(said, "slowest_unit_time_sec"), None);
    }
}
