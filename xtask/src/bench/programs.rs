//! The programs that are measured, and those that measure, built by the release profile.

use std::{
    collections::{BTreeMap, BTreeSet},
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
