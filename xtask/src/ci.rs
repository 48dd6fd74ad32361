//! `cargo xtask ci`: all that a change must pass, cheapest first, stopping at the first failure.

use anyhow::Result;

use crate::{
    cargo::{self, BPF_PROGRAMS, cargo},
    deny, dependencies, ebpf, fuzz, interop, packages,
    steps::{Steps, timed},
    test, vm,
};

/// Runs everything, and prints what took how long.
///
/// # Errors
/// At the first step that fails.
pub(crate) fn run() -> Result<()> {
    // Missed at the end it would have cost all that comes before.
    interop::Go::find()?;
    timed(|steps| {
        if packages::is_root() {
            // For the same reason: a mirror that does not answer is found out first.
            steps.run("virtual machines: programs and kernels", || {
                vm::provide(vm::all_series())
            })?;
        }
        sources(steps)?;
        steps.run("the BPF object, rebuilt and compared", || ebpf::check(true))?;
        test::all(steps, test::WithoutGo::Fail)?;
        fuzz::briefly(steps)?;
        kernels(steps)
    })
}

/// What is judged without running it.
fn sources(steps: &mut Steps) -> Result<()> {
    steps.command("format", cargo(&["fmt", "--all", "--check"]))?;
    steps.command(
        "format of the BPF programs",
        cargo(&["fmt", "--manifest-path", BPF_PROGRAMS, "--check"]),
    )?;
    steps.run("dependency rules", dependencies::check)?;
    deny::check(steps)?;

    let deny = ["--", "-D", "warnings"];
    let clippy = ["clippy", "--locked", "--all-targets"];
    steps.command(
        "clippy",
        cargo(&[&clippy[..], &["--workspace"], &deny].concat()),
    )?;
    steps.command(
        "clippy of the BPF programs",
        cargo(&[&clippy[..], &["--manifest-path", BPF_PROGRAMS], &deny].concat()),
    )?;
    let mut rustdoc = cargo(&["doc", "--workspace", "--locked", "--no-deps"]);
    rustdoc.env("RUSTDOCFLAGS", "-D warnings");
    steps.command("rustdoc", rustdoc)
}

/// The demo and the source check on other kernels than this machine's.
fn kernels(steps: &mut Steps) -> Result<()> {
    if !packages::is_root() {
        steps.leave_out("the demo and the source check on each kernel: not root");
        return Ok(());
    }
    let (programs, bpf_tests) = steps.run("the programs that kernels run", || {
        let programs = cargo::build_programs(&["--workspace"])?;
        Ok((programs, cargo::test_binary("bpf_kernel")?))
    })?;
    vm::check(steps, &programs, &bpf_tests)
}
