//! `cargo xtask ci`: all that a change must pass, cheapest first, stopping at the first failure.

use std::time::Instant;

use anyhow::Result;

use crate::{
    cargo::{BPF_PROGRAMS, cargo, step},
    dependencies, ebpf, interop, test,
};

/// Runs everything.
///
/// # Errors
/// At the first step that fails.
pub(crate) fn run() -> Result<()> {
    let start = Instant::now();
    // Missed at the end it would have cost all that comes before.
    interop::Go::find()?;
    step("format", cargo(&["fmt", "--all", "--check"]))?;
    step(
        "format of the BPF programs",
        cargo(&["fmt", "--manifest-path", BPF_PROGRAMS, "--check"]),
    )?;
    eprintln!("==> dependency rules");
    dependencies::check()?;

    let deny = ["--", "-D", "warnings"];
    let clippy = ["clippy", "--locked", "--all-targets"];
    step(
        "clippy",
        cargo(&[&clippy[..], &["--workspace"], &deny].concat()),
    )?;
    step(
        "clippy of the BPF programs",
        cargo(&[&clippy[..], &["--manifest-path", BPF_PROGRAMS], &deny].concat()),
    )?;
    let mut rustdoc = cargo(&["doc", "--workspace", "--locked", "--no-deps"]);
    rustdoc.env("RUSTDOCFLAGS", "-D warnings");
    step("rustdoc", rustdoc)?;

    eprintln!("==> the BPF object, rebuilt and compared");
    ebpf::check(true)?;
    test::run(test::WithoutGo::Fail)?;
    eprintln!("==> all passed in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
