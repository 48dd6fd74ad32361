//! The system programs that commands need: installed where that can be done, else named.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// A system program and the Debian package that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tool {
    program: &'static str,
    package: &'static str,
}

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

/// What building worlds and pinging in them takes.
pub(crate) const DEMO: &[Tool] = &[
    tool("ip", "iproute2"),
    tool("nft", "nftables"),
    tool("ping", "iputils-ping"),
];

/// What tests need beyond [`DEMO`].
pub(crate) const TESTS: &[Tool] = &[
    DEMO[0],
    DEMO[1],
    DEMO[2],
    tool("bpftool", "bpftool"),
    tool("tshark", "tshark"),
];

/// What measuring throughput needs beyond [`DEMO`].
pub(crate) const THROUGHPUT: &[Tool] = &[tool("iperf3", "iperf3")];

/// What changing the maps of an agent's BPF programs needs.
pub(crate) const MAPS: &[Tool] = &[tool("bpftool", "bpftool")];

/// What the fuzzing engine is compiled by.
pub(crate) const CPLUSPLUS: &[Tool] = &[tool("c++", "g++")];

/// What virtual machines need.
pub(crate) const VM: &[Tool] = &[
    tool("qemu-system-x86_64", "qemu-system-x86"),
    tool("busybox", "busybox-static"),
    tool("depmod", "kmod"),
    tool("xz", "xz-utils"),
];

/// Sees to it that `tools` are installed: by apt-get where we are root and it exists.
///
/// # Errors
/// When one is missing and cannot be installed; all missing ones are named with their packages.
pub(crate) fn ensure(tools: &[Tool]) -> Result<()> {
    let missing = missing(tools);
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    if !is_root() || !in_path("apt-get") {
        let programs: Vec<_> = missing.iter().map(|tool| tool.program).collect();
        bail!(
            "not installed: {} (Debian: apt-get install {})",
            programs.join(", "),
            packages.join(" ")
        );
    }
    install(&packages)?;
    let still: Vec<_> = self::missing(tools)
        .iter()
        .map(|tool| tool.program)
        .collect();
    ensure!(
        still.is_empty(),
        "still not in PATH after installing {}: {}",
        packages.join(" "),
        still.join(", ")
    );
    Ok(())
}

/// Installs Debian packages.
///
/// # Errors
/// When apt-get fails.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    eprintln!("==> installing {}", packages.join(" "));
    update_index()?;
    apt_get(
        &[
            &["-qq", "-y", "--no-install-recommends", "install"],
            packages,
        ]
        .concat(),
    )
}

/// Fetches the list of packages that can be installed.
///
/// # Errors
/// When apt-get fails.
pub(crate) fn update_index() -> Result<()> {
    apt_get(&["-qq", "update"])
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(arguments);
    let output = command.output().context("cannot start apt-get")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "apt-get {} failed: {}",
        arguments.join(" "),
        said.trim()
    );
    Ok(())
}

/// Whether this process may do what only root may.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn missing(tools: &[Tool]) -> Vec<Tool> {
    tools
        .iter()
        .copied()
        .filter(|tool| !in_path(tool.program))
        .collect()
}

fn in_path(program: &str) -> bool {
    path_of(program).is_some()
}

/// Where a program is, by `PATH`.
pub(crate) fn path_of(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| is_file(path))
}

fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_programs_are_found_missing() {
        let tools = [tool("sh", "dash"), tool("no-such-program-anywhere", "none")];
        assert_eq!(missing(&tools), [tools[1]]);
    }
}
