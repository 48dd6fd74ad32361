//! What CI runs on each pinned kernel: the demo, and the drop of packets from wrong sources.

use std::{
    ffi::OsStr,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    guest,
    pin::{self, Pin},
};
use crate::{
    cargo::{self, Programs, THIS_PROGRAM},
    steps::Steps,
};

/// The test, in the dataplane's tests with a kernel, of a host that sends spoofed frames with a VNI of ours.
const SOURCE_TEST: &str = "traffic::a_host_that_claims_our_vni_does_not_get_through";

/// An emulated machine may fail by chance after its start too, as `session` has it of the start: its processors may stand still for
/// longer than an agent waits for an answer. Each failure is printed.
const TRIES: u32 = 3;

/// Runs the demo and the test of the source check on each pinned kernel, with programs that are built already. `bpf_tests` is
/// the binary of the dataplane's tests with a kernel.
///
/// # Errors
/// When a machine does not start, the programs hang at another hook than the kernel is there for, or what runs fails.
pub(crate) fn check(steps: &mut Steps, programs: &Programs, bpf_tests: &Path) -> Result<()> {
    for pin in pin::all() {
        let series = pin.series;
        steps.run(&format!("the demo on kernel {series}"), || {
            let program = guest::program();
            let command = [program.as_ref(), "demo".as_ref(), "--json".as_ref()];
            judge_demo(pin, &in_guest(pin, programs, &command)?)
        })?;
        steps.run(&format!("the source check on kernel {series}"), || {
            let command = [
                bpf_tests.as_os_str(),
                "--include-ignored".as_ref(),
                "--exact".as_ref(),
                SOURCE_TEST.as_ref(),
            ];
            judge_test(&in_guest(pin, programs, &command)?)
        })?;
    }
    Ok(())
}

/// Runs a command on the pin's kernel, and returns its standard output.
fn in_guest(pin: &Pin, programs: &Programs, command: &[&OsStr]) -> Result<Vec<u8>> {
    let mut tries = 1;
    loop {
        let mut machine = Command::new(THIS_PROGRAM);
        machine
            .current_dir(cargo::root())
            .args(["vm", "--kernel", pin.series, "--timeout", "600", "--"])
            .args(command)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit());
        programs.name_to(&mut machine);
        let output = machine
            .output()
            .with_context(|| format!("cannot start {machine:?}"))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        // A test prints there why it failed.
        std::io::stderr()
            .write_all(&output.stdout)
            .context("pass on the output")?;
        ensure!(
            tries < TRIES,
            "{machine:?} failed {tries} times, at last by {}",
            output.status
        );
        eprintln!(
            "==> failed on kernel {} ({}): trying again",
            pin.series, output.status
        );
        tries += 1;
    }
}

/// Whether the demo's programs hung at the hook for which the kernel was chosen.
fn judge_demo(pin: &Pin, json: &[u8]) -> Result<()> {
    let report: Value = serde_json::from_slice(json).with_context(|| {
        let printed = String::from_utf8_lossy(json);
        format!("the demo printed {printed:?}, which is no JSON")
    })?;
    let hook = &report["bpf"]["hook"];
    ensure!(
        hook == pin.hook,
        "on kernel {} the BPF programs should hang at {}, and bpf.hook is {hook}",
        pin.series,
        pin.hook
    );
    Ok(())
}

/// Whether the test ran: libtest has no error for a name that is no test's.
fn judge_test(output: &[u8]) -> Result<()> {
    let printed = String::from_utf8_lossy(output);
    ensure!(
        printed.contains("test result: ok. 1 passed"),
        "{SOURCE_TEST} did not run; its name may have changed: {printed}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_must_be_the_one_that_the_kernel_is_there_for() {
        let old = pin::of_series("6.1").unwrap();
        let new = pin::of_series("6.12").unwrap();
        let clsact = br#"{"bpf":{"hook":"clsact"}}"#;
        judge_demo(old, clsact).unwrap();
        let error = judge_demo(new, clsact).unwrap_err().to_string();
        assert!(error.contains("tcx") && error.contains("clsact"), "{error}");
        for nothing in [&b"{}"[..], b""] {
            judge_demo(old, nothing).unwrap_err();
        }
    }

    #[test]
    fn a_test_that_did_not_run_is_found() {
        judge_test(b"test result: ok. 1 passed; 0 failed; 0 ignored").unwrap();
        judge_test(b"test result: ok. 0 passed; 0 failed; 0 ignored").unwrap_err();
    }
}
