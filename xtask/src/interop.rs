//! `cargo xtask interop`: our agents against the real Network Service Mesh, whose components are Go libraries.
//!
//! The Go module in `tests/interop` names their versions; Go downloads and checks them by `go.sum`.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    cargo::{self, Programs},
    packages,
    steps::{Steps, timed},
};

/// The Go module, from the workspace's root.
const MODULE: &str = "tests/interop";

/// The whole run takes a few minutes on two cores; what takes longer hangs.
const TIMEOUT: &str = "15m";

/// What is skipped without root.
pub(crate) const NEEDS_ROOT: &str =
    "tests/interop/node, in which agents make links for real clients and endpoints, is left out";

/// Builds the agent and runs the tests.
///
/// # Errors
/// When Go or a program that the tests start is missing, or a test fails.
pub(crate) fn run(pattern: Option<&str>) -> Result<()> {
    let go = Go::find()?;
    if packages::is_root() {
        packages::ensure(packages::DEMO)?;
    } else {
        eprintln!("==> not root: {NEEDS_ROOT}");
    }
    let programs = cargo::build_programs(&["--workspace"])?;
    timed(|steps| test(steps, &go, &programs, pattern))
}

/// Runs the tests with an agent that is built already, those that match `pattern` if it is given.
///
/// # Errors
/// When the module is not formatted, `go vet` finds fault, or a test fails.
pub(crate) fn test(
    steps: &mut Steps,
    go: &Go,
    programs: &Programs,
    pattern: Option<&str>,
) -> Result<()> {
    let unformatted = Command::new(go.formatter())
        .arg("-l")
        .arg(module())
        .output()
        .context("cannot start gofmt")?;
    ensure!(
        unformatted.status.success() && unformatted.stdout.is_empty(),
        "not formatted (gofmt -w): {}{}",
        String::from_utf8_lossy(&unformatted.stdout).trim(),
        String::from_utf8_lossy(&unformatted.stderr).trim()
    );
    steps.command("go vet", go.command(&["vet", "./..."]))?;
    // One package at a time: each starts processes by the dozen.
    let mut tests = go.command(&["test", "-p=1", "-count=1", "-timeout", TIMEOUT]);
    programs.name_to(&mut tests);
    if let Some(pattern) = pattern {
        tests.args(["-v", "-run", pattern]);
    }
    steps.command("tests against the real NSM", {
        tests.arg("./...");
        tests
    })
}

/// A Go toolchain that can build the module.
#[derive(Debug)]
pub(crate) struct Go {
    root: PathBuf,
}

impl Go {
    /// Looks for Go in `PATH`.
    ///
    /// # Errors
    /// When there is none, or one older than the module's `go.mod` asks for: says which is needed.
    pub(crate) fn find() -> Result<Self> {
        let needed = needed()?;
        let shown = needed.0.clone();
        let output = Command::new("go")
            .args(["env", "GOVERSION", "GOROOT"])
            .env("GOTOOLCHAIN", "local")
            .current_dir(cargo::root())
            .output();
        let Ok(output) = output else {
            bail!("Go is not installed: install Go {shown} or newer and have `go` in PATH");
        };
        ensure!(
            output.status.success(),
            "`go env` failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let text = String::from_utf8(output.stdout).context("`go env` printed no text")?;
        let (version, root) = text
            .trim()
            .split_once('\n')
            .context("`go env GOVERSION GOROOT` did not say two lines")?;
        let found = numbers(version.trim_start_matches("go"));
        ensure!(
            found >= needed.1,
            "Go {shown} or newer is needed (go.mod in {MODULE}), and `go` in PATH is {version}"
        );
        Ok(Self { root: root.into() })
    }

    /// A go command in the module; it takes this toolchain and downloads no other.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.root.join("bin/go"));
        command
            .current_dir(module())
            .env("GOTOOLCHAIN", "local")
            .args(arguments);
        command
    }

    fn formatter(&self) -> PathBuf {
        self.root.join("bin/gofmt")
    }
}

fn module() -> PathBuf {
    cargo::root().join(MODULE)
}

/// The version that `go.mod` asks for, as text and as numbers.
fn needed() -> Result<(String, Vec<u32>)> {
    let path = module().join("go.mod");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let version = go_directive(&text)
        .with_context(|| format!("{} has no line `go VERSION`", path.display()))?;
    Ok((version.to_owned(), numbers(version)))
}

fn go_directive(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("go "))
}

/// `1.26.8` as 1, 26, 8; what follows a version, as in `1.26rc1` or `1.26 X:something`, ends it.
fn numbers(version: &str) -> Vec<u32> {
    version
        .split('.')
        .map_while(|part| {
            let digits = part.find(|c: char| !c.is_ascii_digit());
            part[..digits.unwrap_or(part.len())].parse().ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_their_numbers() {
        assert_eq!(numbers("1.26.8"), [1, 26, 8]);
        assert_eq!(numbers("1.26rc1"), [1, 26]);
        assert_eq!(numbers("1.26.8 X:nocoverageredesign"), [1, 26, 8]);
        assert!(numbers("1.26.8") >= numbers("1.26"));
        assert!(numbers("1.9.7") < numbers("1.26"));
        assert!(numbers("devel") < numbers("1.26"));
    }

    #[test]
    fn the_module_says_what_it_needs() {
        assert_eq!(go_directive("module m\n\ngo 1.26\n"), Some("1.26"));
        assert_eq!(go_directive("module m\n"), None);
        assert!(numbers("1") <= needed().unwrap().1);
    }
}
