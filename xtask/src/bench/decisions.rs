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

use super::{Found, report::Row};
use crate::cargo::{executables, named};

const BENCH: &str = "decisions";

pub(super) fn measure(quick: bool) -> Result<Found> {
    let built = executables(&[
        "bench",
        "--package",
        "nsm-core",
        "--bench",
        BENCH,
        "--no-run",
    ])?;
    let program = named(&built, BENCH)?;
    let home = home(&program)?;
    let names = names(&program)?;
    ensure!(
        !names.is_empty(),
        "{} lists no benchmark",
        program.display()
    );
    run(&program, &home, quick)?;
    let rows = names.iter().map(|name| {
        Ok(Row::new(
            name.replace('_', " "),
            nanoseconds(&home, name)?,
            "ns",
        ))
    });
    Ok(Found {
        rows: rows.collect::<Result<_>>()?,
        notes: vec!["medians of criterion".to_owned()],
    })
}

/// Where `cargo bench` lets criterion keep its numbers: `target/criterion`, beside `target/release/deps/PROGRAM`.
fn home(program: &Path) -> Result<PathBuf> {
    let target = program.ancestors().nth(3);
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

fn run(program: &Path, home: &Path, quick: bool) -> Result<()> {
    let mut command = Command::new(program);
    command.arg("--bench").env("CRITERION_HOME", home);
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
    let mut said = String::new();
    for line in BufReader::new(stdout).lines() {
        said.push_str(&line.context("read criterion's output")?);
        said.push('\n');
    }
    let status = child.wait().context("wait for criterion")?;
    ensure!(status.success(), "criterion failed ({status}):\n{said}");
    Ok(())
}

/// What criterion found for a benchmark, nanoseconds.
fn nanoseconds(home: &Path, name: &str) -> Result<f64> {
    let file = home.join(name).join("new/estimates.json");
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let estimates: Value =
        serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.display()))?;
    estimates["median"]["point_estimate"]
        .as_f64()
        .with_context(|| format!("no median in {}", file.display()))
}
