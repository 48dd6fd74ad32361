//! The demo on each kernel, as CI runs it.

use std::process::{Command, Stdio};

use anyhow::Result;

use super::{guest, pin};
use crate::{
    cargo::{self, Programs},
    steps::Steps,
};

/// This program, also when a build of the workspace has put another file in its place meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Runs the demo on each pinned kernel, with programs that are built already.
///
/// # Errors
/// When a machine does not start, or the demo fails in it.
pub(crate) fn check(steps: &mut Steps, programs: &Programs) -> Result<()> {
    for series in pin::all_series() {
        let mut command = Command::new(THIS_PROGRAM);
        command
            .current_dir(cargo::root())
            .args(["vm", "--kernel", series, "--timeout", "600", "--"])
            .args([&guest::program(), "demo", "--json"])
            .stdin(Stdio::null())
            // The story is on stderr.
            .stdout(Stdio::null());
        programs.name_to(&mut command);
        steps.command(&format!("the demo on kernel {series}"), command)?;
    }
    Ok(())
}
