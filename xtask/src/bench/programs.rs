//! The programs that are measured, and those that measure, built by the release profile.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::cargo::{self, Tree, named};

/// A program that a part can need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Program {
    /// The agent.
    Agent,
    /// The worlds' DNS server.
    Dns,
    /// What asks agents.
    Load,
    /// What the BPF programs cost a packet.
    BpfCost,
    /// What sessions cost a node.
    HealthCost,
    /// The decisions' benchmarks.
    Decisions,
}

/// What two agents in a world take.
pub(super) const WORLD: &[Program] = &[Program::Agent, Program::Dns, Program::Load];

/// Each is one cargo command, so that its programs are built with the same features of what they share.
const COMMANDS: &[(&[Program], &[&str])] = &[
    (
        WORLD,
        &[
            "build",
            "--release",
            "--bins",
            "--package",
            cargo::AGENT,
            "--package",
            cargo::WORLD_DNS,
            "--package",
            "nsm-load",
        ],
    ),
    (
        &[Program::BpfCost],
        &[
            "build",
            "--release",
            "--package",
            "nsm-dataplane",
            "--example",
            "bpf_cost",
        ],
    ),
    (
        &[Program::HealthCost],
        &[
            "build",
            "--release",
            "--package",
            "nsm-dataplane",
            "--example",
            "health_cost",
        ],
    ),
    (
        &[Program::Decisions],
        &[
            "bench",
            "--package",
            "nsm-core",
            "--bench",
            "decisions",
            "--no-run",
        ],
    ),
];

impl Program {
    /// Its file's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Agent => cargo::AGENT,
            Self::Dns => cargo::WORLD_DNS,
            Self::Load => "nsm-load",
            Self::BpfCost => "bpf_cost",
            Self::HealthCost => "health_cost",
            Self::Decisions => "decisions",
        }
    }

    /// A file of its sources, from the tree's root: a tree that lacks it lacks the program.
    pub(super) fn source(self) -> &'static str {
        match self {
            Self::Agent => "agent/daemon/Cargo.toml",
            Self::Dns => "tests/world/dns/Cargo.toml",
            Self::Load => "tests/load/Cargo.toml",
            Self::BpfCost => "agent/dataplane/examples/bpf_cost.rs",
            Self::HealthCost => "agent/dataplane/examples/health_cost.rs",
            Self::Decisions => "agent/core/benches/decisions.rs",
        }
    }

    /// Whether it is, or contains, what is measured; the others measure.
    pub(super) fn is_measured(self) -> bool {
        !matches!(self, Self::Dns | Self::Load)
    }
}

/// Programs that stand.
#[derive(Debug, Clone, Default)]
pub(super) struct Built(BTreeMap<Program, PathBuf>);

/// What parts with agents start.
#[derive(Debug)]
pub(super) struct Programs {
    pub(super) agent: PathBuf,
    pub(super) dns: PathBuf,
    pub(super) load: PathBuf,
}

impl Built {
    /// Builds in `tree` what is wanted and not up to date.
    ///
    /// # Errors
    /// When a build fails.
    pub(super) fn build(tree: &Tree, wanted: &BTreeSet<Program>) -> Result<Self> {
        let mut paths = BTreeMap::new();
        for (programs, command) in COMMANDS {
            if programs.iter().any(|program| wanted.contains(program)) {
                let built = tree.executables(command)?;
                for &program in *programs {
                    paths.insert(program, named(&built, program.name())?);
                }
            }
        }
        Ok(Self(paths))
    }

    /// Fresh copies of these programs, to be started in their place; see [`fresh_copy`].
    ///
    /// # Errors
    /// When a program cannot be copied.
    pub(super) fn copied(&self) -> Result<Self> {
        let programs = self.0.iter();
        let copies = programs.map(|(program, path)| Ok((*program, fresh_copy(path)?)));
        copies.collect::<Result<_>>().map(Self)
    }

    pub(super) fn get(&self, program: Program) -> Result<&Path> {
        let path = self.0.get(&program).map(PathBuf::as_path);
        path.with_context(|| format!("there is no program {} here", program.name()))
    }

    pub(super) fn insert(&mut self, program: Program, path: PathBuf) {
        self.0.insert(program, path);
    }

    pub(super) fn remove(&mut self, program: Program) {
        self.0.remove(&program);
    }

    pub(super) fn world(&self) -> Result<Programs> {
        let path = |program| self.get(program).map(Path::to_owned);
        Ok(Programs {
            agent: path(Program::Agent)?,
            dns: path(Program::Dns)?,
            load: path(Program::Load)?,
        })
    }
}

/// Copies a program into a folder beside it, in the place of the copy before.
///
/// How fast a program runs depends on the memory that its file lies in. A linker's file lies in single pages, a copy in runs of them,
/// and each copy in others: the same bytes took an agent up to 17 % more CPU for a Request. What is installed is a copy, too.
///
/// # Errors
/// When the folder cannot be made or written.
fn fresh_copy(program: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program has a name")?;
    let folder = program.with_file_name("measured");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let copy = folder.join(name);
    // Removed and not written over: its memory would stay the same, and a file that runs cannot be written.
    match fs::remove_file(&copy) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", copy.display()));
        }
        _ => {}
    }
    fs::copy(program, &copy).with_context(|| format!("copy {}", program.display()))?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_another_file_of_the_same_name_and_replaces_the_last_one() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        for content in ["one", "another"] {
            fs::write(&program, content).unwrap();
            let copy = fresh_copy(&program).unwrap();
            assert_ne!(copy, program);
            assert_eq!(copy.file_name(), program.file_name());
            assert_eq!(fs::read_to_string(&copy).unwrap(), content);
            assert_eq!(fs::read_dir(copy.parent().unwrap()).unwrap().count(), 1);
        }
    }
}
