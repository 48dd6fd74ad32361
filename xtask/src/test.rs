//! `cargo xtask test`: every test there is.
//!
//! Tests that make namespaces, links or BPF programs are `#[ignore = "needs root: …"]`, so that `cargo test` is whole for
//! everybody. As root this runs them too; otherwise it names each that it left out.

use std::{
    io::{self, BufRead as _, BufReader},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::{
    cargo::{self, BPF_PROGRAMS, cargo},
    demo, interop, packages,
    steps::{Parts, Steps, timed},
    vm,
};

/// What to do about the tests against the real NSM where there is no Go for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WithoutGo {
    /// Leave them out, and say so.
    LeaveOut,
    Fail,
}

/// Runs all tests, and prints what took how long.
///
/// # Errors
/// When one fails, or what they need cannot be built or installed.
pub(crate) fn run() -> Result<()> {
    timed(|steps| all(steps, WithoutGo::LeaveOut))
}

/// Runs all tests as steps of a command.
///
/// # Errors
/// As [`run`].
pub(crate) fn all(steps: &mut Steps, without_go: WithoutGo) -> Result<()> {
    let root = packages::is_root();
    if root {
        packages::ensure(packages::TESTS)?;
    }
    let go = interop::Go::find();
    if without_go == WithoutGo::Fail {
        go.as_ref().map_err(|error| anyhow!("{error:#}"))?;
    }
    if root {
        // Tests run beside each other, and each would install and fetch within its own limit of time.
        steps.run("the virtual machines of tests: programs and kernel", || {
            vm::provide([vm::DEFAULT_SERIES])
        })?;
    }
    // Built once, with the features that the tests' own build has, so that nothing is built twice.
    let programs = steps.run("the programs that tests start", || {
        cargo::build_programs(&["--workspace"])
    })?;
    let mut left_out = workspace_tests(steps, &programs, root)?;
    let bpf = cargo(&["test", "--locked", "--manifest-path", BPF_PROGRAMS]);
    steps.command("tests of the BPF programs' parser and decisions", bpf)?;
    if root {
        for cloud in ["packet", "aws"] {
            let name = format!("the demo, {cloud}");
            steps.run(&name, || demo::check(cloud, &programs))?;
        }
        demo::check_faults(steps, &programs)?;
    }
    match go {
        Ok(go) => {
            interop::test(steps, &go, &programs, None)?;
            if !root {
                left_out.push(format!("needs root: {}", interop::NEEDS_ROOT));
            }
        }
        Err(error) => left_out.push(format!("tests/interop: {error:#}")),
    }
    report(&left_out);
    Ok(())
}

/// Builds and runs the workspace's tests, and returns those that were left out.
fn workspace_tests(
    steps: &mut Steps,
    programs: &cargo::Programs,
    root: bool,
) -> Result<Vec<String>> {
    let test = ["test", "--workspace", "--locked"];
    // A step of its own, so that the table has the time of compilers apart from that of tests.
    steps.command(
        "build of the workspace's tests",
        cargo(&[&test[..], &["--no-run"]].concat()),
    )?;
    let as_root = if root { ", as root" } else { "" };
    steps.run_in_parts(&format!("tests of the workspace{as_root}"), |parts| {
        let mut command = cargo(&[&test[..], &["--no-fail-fast"]].concat());
        programs.name_to(&mut command);
        if root {
            command.args(["--", "--include-ignored"]);
        }
        // Cargo names on stderr the binary whose results libtest prints on stdout: one pipe keeps their order.
        let (reader, writer) = io::pipe().context("make a pipe")?;
        let mut child = command
            .stdout(writer.try_clone().context("share a pipe")?)
            .stderr(writer)
            .spawn()
            .context("cannot start cargo test")?;
        // The command has our copies of the writing end, which would keep the pipe open.
        drop(command);
        let mut seen = Seen::default();
        for line in BufReader::new(reader).split(b'\n') {
            let line = line.context("read the output of cargo test")?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            seen.line(&line, parts);
        }
        let status = child.wait().context("wait for cargo test")?;
        ensure!(
            status.success(),
            "tests failed ({status}): {}",
            seen.failed.join(", ")
        );
        Ok(seen.left_out)
    })
}

/// What the output of `cargo test` has shown until now.
#[derive(Debug, Default)]
struct Seen {
    /// The test binary that runs.
    binary: String,
    left_out: Vec<String>,
    failed: Vec<String>,
}

impl Seen {
    fn line(&mut self, line: &str, parts: &mut Parts) {
        if let Some(binary) = running(line) {
            self.binary = binary;
        }
        if let Some(took) = finished(line) {
            parts.add(&self.binary, took);
        }
        self.left_out.extend(ignored(line));
        self.failed.extend(
            line.strip_prefix("test ")
                .and_then(|line| line.strip_suffix(" ... FAILED"))
                .map(str::to_owned),
        );
    }
}

/// The binary that cargo says it runs: its file without the hash, and the source where that says more.
fn running(line: &str) -> Option<String> {
    let line = line.trim_start();
    if let Some(package) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{package}, examples in documentation"));
    }
    let (source, path) = line.strip_prefix("Running ")?.split_once(" (")?;
    let file = Path::new(path.strip_suffix(')')?).file_name()?.to_str()?;
    let (name, _hash) = file.rsplit_once('-')?;
    Some(match source.strip_prefix("unittests ") {
        Some(_) => format!("{name}, unit tests"),
        None => format!("{name} ({source})"),
    })
}

/// How long a binary's tests took, from libtest's last line.
fn finished(line: &str) -> Option<Duration> {
    let (_, took) = line
        .strip_prefix("test result: ")?
        .rsplit_once("; finished in ")?;
    let seconds = took.strip_suffix('s')?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
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
    fn binaries_are_named_and_timed() {
        let names = [
            (
                "     Running unittests src/lib.rs (target/debug/deps/nsm_core-0123abc)",
                "nsm_core, unit tests",
            ),
            (
                "     Running tests/bpf_kernel/main.rs (/t/deps/bpf_kernel-77)",
                "bpf_kernel (tests/bpf_kernel/main.rs)",
            ),
            (
                "   Doc-tests nsm_core",
                "nsm_core, examples in documentation",
            ),
        ];
        for (line, name) in names {
            assert_eq!(running(line).as_deref(), Some(name));
        }
        assert_eq!(running("running 3 tests"), None);
        let result = "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 61.25s";
        assert_eq!(finished(result), Some(Duration::from_millis(61_250)));
        assert_eq!(finished("test a ... ok"), None);
    }

    #[test]
    fn ignored_tests_are_reported_with_their_reason() {
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
