//! `cargo xtask test`: every test there is.
//!
//! Tests that make namespaces, links or BPF programs are `#[ignore = "needs root: …"]`, so that `cargo test` is whole for
//! everybody. As root this runs them too; otherwise it names each that it left out.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::{
    cargo::{self, BPF_PROGRAMS, cargo, step},
    demo, interop, packages,
};

/// What to do about the tests against the real NSM where there is no Go for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WithoutGo {
    /// Leave them out, and say so.
    LeaveOut,
    Fail,
}

/// Runs all tests.
///
/// # Errors
/// When one fails, or what they need cannot be built or installed.
pub(crate) fn run(without_go: WithoutGo) -> Result<()> {
    let root = packages::is_root();
    if root {
        packages::ensure(packages::TESTS)?;
    }
    let go = interop::Go::find();
    if without_go == WithoutGo::Fail {
        go.as_ref().map_err(|error| anyhow!("{error:#}"))?;
    }
    // Built once, with the features that the tests' own build has, so that nothing is built twice.
    eprintln!("==> the programs that tests start");
    let programs = cargo::build_programs(&["--workspace"])?;
    let mut left_out = workspace_tests(&programs, root)?;
    let bpf = cargo(&["test", "--locked", "--manifest-path", BPF_PROGRAMS]);
    step("tests of the BPF programs' parser and decisions", bpf)?;
    if root {
        for cloud in ["packet", "aws"] {
            eprintln!("==> the demo, {cloud}");
            demo::check(cloud, &programs)?;
        }
        demo::check_faults(&programs)?;
    }
    match go {
        Ok(go) => {
            interop::test(&go, &programs, None)?;
            if !root {
                left_out.push(format!("needs root: {}", interop::NEEDS_ROOT));
            }
        }
        Err(error) => left_out.push(format!("tests/interop: {error:#}")),
    }
    report(&left_out);
    Ok(())
}

/// Runs the workspace's tests and returns those that were left out.
fn workspace_tests(programs: &cargo::Programs, root: bool) -> Result<Vec<String>> {
    eprintln!(
        "==> tests of the workspace{}",
        if root { ", as root" } else { "" }
    );
    let mut command = cargo(&["test", "--workspace", "--locked", "--no-fail-fast"]);
    programs.name_to(&mut command);
    if root {
        command.args(["--", "--include-ignored"]);
    }
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo test")?;
    let stdout = child.stdout.take().expect("stdout is piped");
    let (mut left_out, mut failed) = (Vec::new(), Vec::new());
    for line in BufReader::new(stdout).lines() {
        let line = line.context("read the output of cargo test")?;
        println!("{line}");
        left_out.extend(ignored(&line));
        failed.extend(
            line.strip_prefix("test ")
                .and_then(|line| line.strip_suffix(" ... FAILED"))
                .map(str::to_owned),
        );
    }
    let status = child.wait().context("wait for cargo test")?;
    ensure!(
        status.success(),
        "tests failed ({status}): {}",
        failed.join(", ")
    );
    Ok(left_out)
}

/// Name and reason of an ignored test, from libtest's line about it.
fn ignored(line: &str) -> Option<String> {
    let (name, reason) = line.strip_prefix("test ")?.split_once(" ... ignored")?;
    let reason = reason.strip_prefix(", ").unwrap_or("no reason given");
    Some(format!("{name}: {reason}"))
}

fn report(left_out: &[String]) {
    if left_out.is_empty() {
        eprintln!("==> all tests passed");
        return;
    }
    eprintln!(
        "==> passed, but {} tests were left out, each for the reason behind its name:",
        left_out.len()
    );
    for test in left_out {
        eprintln!("    {test}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_tests_are_told_with_their_reason() {
        assert_eq!(
            ignored("test link::creates ... ignored, needs root: links").as_deref(),
            Some("link::creates: needs root: links")
        );
        assert_eq!(
            ignored("test bare ... ignored").as_deref(),
            Some("bare: no reason given")
        );
        assert_eq!(ignored("test fine ... ok"), None);
        assert_eq!(
            ignored("test result: ok. 3 passed; 0 failed; 2 ignored"),
            None
        );
    }
}
