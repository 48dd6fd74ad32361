//! `cargo xtask deny`: bans, licences, sources and advisories of all dependencies, by `cargo deny` and the rules of `deny.toml`.
//!
//! The tool is built from crates.io at the version below, with its own lock file, and kept in this user's cache. A wheel with a ready
//! binary exists on PyPI, but of another publisher: the program that judges where code comes from comes from its author.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    cache,
    cargo::{self, BPF_PROGRAMS},
    steps::{Steps, timed},
};

const VERSION: &str = "0.20.2";

/// Both lock files are judged by the same rules.
const MANIFESTS: [&str; 2] = ["Cargo.toml", BPF_PROGRAMS];

const RULES: &str = "deny.toml";

/// Checks all dependencies, and prints what took how long.
///
/// # Errors
/// As [`check`].
pub(crate) fn run() -> Result<()> {
    timed(check)
}

/// Checks all dependencies, as steps of a command. Advisories are left out where their database cannot be fetched.
///
/// # Errors
/// When the tool cannot be built, or a dependency breaks a rule.
pub(crate) fn check(steps: &mut Steps) -> Result<()> {
    let tool = match find()? {
        Some(tool) => tool,
        None => steps.run("cargo deny, built once for this user", install)?,
    };
    steps.run("bans, licences and sources of dependencies", || {
        judge(&tool, &["bans", "licenses", "sources"])
    })?;
    match fetch_advisories(&tool)? {
        Fetched::Yes => steps.run("advisories about dependencies", || {
            judge(&tool, &["advisories"])
        }),
        Fetched::No(cause) => {
            steps.leave_out(&format!(
                "advisories about dependencies: their database cannot be fetched here: {cause}"
            ));
            Ok(())
        }
    }
}

/// Whether the present database of advisories is on this machine.
enum Fetched {
    Yes,
    /// With the last line of what was said.
    No(String),
}

/// The tool of this version, if it is in the cache or in `PATH`.
fn find() -> Result<Option<PathBuf>> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cached = [directory()?.join("bin")];
    Ok(cached
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|dir| dir.join("cargo-deny"))
        .find(|program| is_of_version(program)))
}

fn directory() -> Result<PathBuf> {
    cache::directory(&format!("cargo-deny-{VERSION}"))
}

fn is_of_version(program: &Path) -> bool {
    let said = Command::new(program).arg("--version").output();
    said.is_ok_and(|said| {
        String::from_utf8_lossy(&said.stdout)
            .split_whitespace()
            .nth(1)
            == Some(VERSION)
    })
}

/// Builds the tool without optimisation: that takes less than half of the time, and a check is then one second instead of a third of one.
fn install() -> Result<PathBuf> {
    let directory = directory()?;
    let mut command = nsm_world::cargo();
    command
        .args(["install", "cargo-deny", "--version", VERSION])
        .args(["--locked", "--debug", "--quiet", "--root"])
        .arg(&directory);
    let status = command.status().context("cannot start cargo install")?;
    ensure!(
        status.success(),
        "cargo-deny {VERSION} cannot be built ({status}): with no way to crates.io from here, put that version into PATH"
    );
    Ok(directory.join("bin/cargo-deny"))
}

fn judge(tool: &Path, checks: &[&str]) -> Result<()> {
    for manifest in MANIFESTS {
        let mut command = deny(tool, manifest);
        // Who wants an offender's dependents asks `cargo tree --invert`; for all duplicates they are a thousand lines.
        command
            .args(["check", "--hide-inclusion-graph"])
            .args(checks);
        let status = command.status().context("cannot start cargo deny")?;
        ensure!(
            status.success(),
            "dependencies of {manifest} break a rule of {RULES} ({status}): see above, and `cargo tree --invert CRATE` for what needs a crate"
        );
    }
    Ok(())
}

fn fetch_advisories(tool: &Path) -> Result<Fetched> {
    let mut command = deny(tool, MANIFESTS[0]);
    let output = command.args(["fetch", "db"]).output();
    let output = output.context("cannot start cargo deny")?;
    if output.status.success() {
        return Ok(Fetched::Yes);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let cause = said.lines().rfind(|line| !line.trim().is_empty());
    Ok(Fetched::No(cause.unwrap_or("no reason given").to_owned()))
}

fn deny(tool: &Path, manifest: &str) -> Command {
    let mut command = Command::new(tool);
    command.current_dir(cargo::root()).args([
        "--locked",
        "--config",
        RULES,
        "--manifest-path",
        manifest,
    ]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_program_is_not_taken_for_the_tool() {
        assert!(!is_of_version(Path::new("/no/such/program")));
        assert!(!is_of_version(Path::new("/bin/true")));
    }
}
