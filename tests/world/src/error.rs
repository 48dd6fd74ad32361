//! What can go wrong with a world.

use std::{io, path::PathBuf};

use crate::WaitError;

/// Why a world could not be built or asked.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// Network namespaces need privileges.
    #[error("a world of network namespaces needs root; this process runs as uid {uid} (try sudo)")]
    NotRoot {
        /// The effective user id.
        uid: u32,
    },
    /// A name would not do as part of a namespace's name, a pin directory and an interface alias.
    #[error(
        "{kind} name {name:?}: use lower-case letters, digits and '-' only, at most {max} characters"
    )]
    Name {
        /// What the name is of: world, node or pod.
        kind: &'static str,
        /// The name.
        name: String,
        /// How long it may be.
        max: usize,
    },
    /// Two nodes or pods of a world have the same name.
    #[error("the name {0:?} occurs twice in this world")]
    Twice(String),
    /// Something of that name is not part of the world.
    #[error("this world has no {kind} {name:?}; it has {have}")]
    Unknown {
        /// What was looked for.
        kind: &'static str,
        /// The name asked for.
        name: String,
        /// The names there are.
        have: String,
    },
    /// A pod was declared before any node.
    #[error("pod {0:?} stands before any node of its domain: declare the node first")]
    PodWithoutNode(String),
    /// More domains or nodes than the address plan has room for.
    #[error("{what}: {count} are too many, at most {max} fit the address plan")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many were asked for.
        count: usize,
        /// How many there can be.
        max: usize,
    },
    /// A system program is not installed.
    #[error("{program} is not installed (Debian: apt-get install {package})")]
    MissingProgram {
        /// The program.
        program: String,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A system program failed; its own words are kept.
    #[error("{program} failed on {input:?}: {message}")]
    Program {
        /// The program, with the namespace it ran in.
        program: String,
        /// The line it failed on, where known.
        input: String,
        /// What it printed.
        message: String,
    },
    /// A system call or file operation failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The reason.
        source: io::Error,
    },
    /// A program of this workspace could not be built.
    #[error("could not build {package}: {message}")]
    Build {
        /// The package.
        package: String,
        /// Cargo's words.
        message: String,
    },
    /// Something did not happen in time.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// A process did not do what was waited for.
    #[error("waited in vain for {what}: process {name} {status}; its last words:\n{tail}")]
    InVain {
        /// The process's name.
        name: String,
        /// Whether it runs, or how it ended.
        status: String,
        /// What was waited for.
        what: String,
        /// The end of its stdout and stderr.
        tail: String,
    },
    /// The world is already torn down.
    #[error("world {0} is torn down")]
    TornDown(String),
    /// A file that another program of the world writes does not read as expected.
    #[error("{path}: {message}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

impl WorldError {
    /// An [`WorldError::Io`] for `what`, to be used with `map_err`.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
