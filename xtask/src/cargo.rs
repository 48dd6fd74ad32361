//! Running cargo, and finding what it built.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// This program, also when a build of the workspace has put another file in its place meanwhile.
pub(crate) const THIS_PROGRAM: &str = "/proc/self/exe";

/// The agent's package and program.
pub(crate) const AGENT: &str = "proxy-nsmgr";

/// The package and program of the worlds' DNS server.
pub(crate) const WORLD_DNS: &str = "nsm-world-dns";

/// The workspace of the BPF programs: another target and compiler, so another workspace.
pub(crate) const BPF_PROGRAMS: &str = "ebpf/programs/Cargo.toml";

/// The workspace's root directory.
pub(crate) fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask
        .parent()
        .expect("xtask is a directory of the workspace")
        .to_owned()
}

/// A cargo command in the workspace's root.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    Tree::present().cargo(arguments)
}

/// A tree of this project's sources.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    pub(crate) root: PathBuf,
    /// Where its builds go, unless where they always go.
    pub(crate) target: Option<PathBuf>,
    /// What cargo runs in place of rustc for the crates of the workspace; those of others are compiled as always.
    pub(crate) wrapper: Option<PathBuf>,
}

impl Tree {
    /// The one that this program was built from.
    pub(crate) fn present() -> Self {
        Self {
            root: root(),
            target: None,
            wrapper: None,
        }
    }

    /// A cargo command in the tree's root.
    fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = nsm_world::cargo();
        command
            .current_dir(&self.root)
            .args(arguments)
            .stdin(Stdio::null());
        if let Some(target) = &self.target {
            command.env("CARGO_TARGET_DIR", target);
        }
        if let Some(wrapper) = &self.wrapper {
            command.env("RUSTC_WORKSPACE_WRAPPER", wrapper);
        }
        command
    }

    /// Runs a cargo command that builds, and returns names and paths of the executables that stand then.
    ///
    /// # Errors
    /// When the build fails.
    pub(crate) fn executables(&self, arguments: &[&str]) -> Result<Vec<(String, PathBuf)>> {
        let mut child = self
            .cargo(arguments)
            .args(["--locked", "--message-format=json-render-diagnostics"])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start cargo")?;
        let stdout = child.stdout.take().expect("stdout is piped");
        let mut built = Vec::new();
        for line in BufReader::new(stdout).lines() {
            built.extend(executable(&line.context("read cargo's messages")?));
        }
        let status = child.wait().context("wait for cargo")?;
        ensure!(
            status.success(),
            "cargo {} failed ({status}) in {}",
            arguments.join(" "),
            self.root.display()
        );
        Ok(built)
    }
}

/// The programs that worlds run.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub(crate) agent: PathBuf,
    pub(crate) dns: PathBuf,
}

impl Programs {
    /// Names the programs to tests, which else build them by themselves (`nsm_world::binary`).
    pub(crate) fn name_to(&self, command: &mut Command) {
        command
            .env("PROXY_NSMGR_BIN", &self.agent)
            .env("NSM_WORLD_DNS_BIN", &self.dns);
    }
}

/// Builds the programs with `cargo build ARGUMENTS`; cargo shows its progress on stderr.
///
/// # Errors
/// When the build fails or has not built both.
pub(crate) fn build_programs(arguments: &[&str]) -> Result<Programs> {
    let built = Tree::present().executables(&[&["build", "--bins"], arguments].concat())?;
    Ok(Programs {
        agent: named(&built, AGENT)?,
        dns: named(&built, WORLD_DNS)?,
    })
}

/// Builds the workspace's tests and returns the path of the binary with that name; nothing is built where they stand already.
///
/// # Errors
/// When the build fails or has not built it.
pub(crate) fn test_binary(name: &str) -> Result<PathBuf> {
    let built = Tree::present().executables(&["test", "--workspace", "--no-run"])?;
    named(&built, name)
}

/// The path of the executable with that name.
///
/// # Errors
/// When there is none.
pub(crate) fn named(built: &[(String, PathBuf)], name: &str) -> Result<PathBuf> {
    let found = built.iter().find(|(built, _)| built == name);
    let (_, path) = found.with_context(|| format!("cargo named no program {name}"))?;
    Ok(path.clone())
}

/// Name and path of the executable that a message of cargo tells of.
fn executable(message: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let path = message["executable"].as_str()?;
    Some((message["target"]["name"].as_str()?.to_owned(), path.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_distinguished_from_libraries() {
        let program = r#"{"reason":"compiler-artifact","target":{"name":"proxy-nsmgr"},"executable":"/t/proxy-nsmgr"}"#;
        assert_eq!(
            executable(program),
            Some((AGENT.to_owned(), "/t/proxy-nsmgr".into()))
        );
        let library =
            r#"{"reason":"compiler-artifact","target":{"name":"serde"},"executable":null}"#;
        assert_eq!(executable(library), None);
        assert_eq!(executable("warning: not json"), None);
    }
}
