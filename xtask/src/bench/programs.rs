//! The programs that are measured, and those that measure.

use std::path::PathBuf;

use anyhow::Result;

use crate::cargo::{self, executables, named};

/// The package and program that asks agents.
const LOAD: &str = "nsm-load";

/// Built by the release profile.
#[derive(Debug)]
pub(super) struct Programs {
    pub(super) agent: PathBuf,
    pub(super) dns: PathBuf,
    pub(super) load: PathBuf,
}

impl Programs {
    /// Builds what is not up to date.
    pub(super) fn build() -> Result<Self> {
        let built = executables(&[
            "build",
            "--release",
            "--bins",
            "--package",
            cargo::AGENT,
            "--package",
            cargo::WORLD_DNS,
            "--package",
            LOAD,
        ])?;
        Ok(Self {
            agent: named(&built, cargo::AGENT)?,
            dns: named(&built, cargo::WORLD_DNS)?,
            load: named(&built, LOAD)?,
        })
    }
}
