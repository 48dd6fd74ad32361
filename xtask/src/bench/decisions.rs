//! The decisions of `nsm-core`, by criterion.
//!
//! Criterion's program is run directly and not by cargo: it writes to a pipe of ours, so that it ends soon after us whatever ended us.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Setting, Size, programs::Program, report::Row, sink::Sink};

pub(super) fn measure(setting: &Setting<'_>, sink: &Sink) -> Result<()> {
    let program = setting.built.get(Program::Decisions)?;
    let home = home(program)?;
    sink.step("the list of benchmarks");
    let names = names(program)?;
    ensure!(
        !names.is_empty(),
        "{} lists no benchmark",
        program.display()
    );
    for name in &names {
        sink.step(format!("criterion, {name}"));
        run(program, &home, name, setting.size == Size::Quick)?;
        let (median, n) = (nanoseconds(&home, name)?, samples(&home, name)?);
        sink.row(Row::new(name.replace('_', " "), median, "ns", n));
    }
    sink.note("medians of criterion");
    Ok(())
}

/// Where `cargo bench` lets criterion keep its numbers: `target/criterion`, above `target/release/deps/measured/PROGRAM`.
fn home(program: &Path) -> Result<PathBuf> {
    let target = program.ancestors().nth(4);
    let target =
        target.with_context(|| format!("{} is in no target directory", program.display()))?;
    Ok(target.join("criterion"))
}

fn names(program: &Path) -> Result<Vec<String>> {
    let output = Command::new(program)
        .args(["--bench", "--list"])
        .output()
        .with_context(|| format!("start {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .lines()
        .filter_map(|line| Some(line.strip_suffix(": benchmark")?.to_owned()))
        .collect())
}

/// Runs one benchmark.
fn run(program: &Path, home: &Path, name: &str, quick: bool) -> Result<()> {
    let mut command = Command::new(program);
    command
        .args(["--bench", "--exact", name])
        .env("CRITERION_HOME", home);
    if quick {
        command.args(["--warm-up-time", "0.1", "--measurement-time", "0.1"]);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    let stdout = child.stdout.take().expect("stdout is piped");
    let mut output = String::new();
    for line in BufReader::new(stdout).lines() {
        output.push_str(&line.context("read criterion's output")?);
        output.push('\n');
    }
    let status = child.wait().context("wait for criterion")?;
    ensure!(status.success(), "criterion failed ({status}):\n{output}");
    Ok(())
}

/// What criterion found for a benchmark, nanoseconds.
fn nanoseconds(home: &Path, name: &str) -> Result<f64> {
    let estimates = read(home, name, "estimates.json")?;
    estimates["median"]["point_estimate"]
        .as_f64()
        .with_context(|| format!("criterion has no median for {name}"))
}

/// How many samples that median is of.
fn samples(home: &Path, name: &str) -> Result<u64> {
    let sample = read(home, name, "sample.json")?;
    let times = sample["times"].as_array();
    let times = times.with_context(|| format!("criterion has no samples for {name}"))?;
    Ok(times.len() as u64)
}

fn read(home: &Path, name: &str, file: &str) -> Result<Value> {
    let file = home.join(name).join("new").join(file);
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.display()))
}
