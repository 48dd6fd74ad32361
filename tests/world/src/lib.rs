//! A world of network namespaces: what the demo and every end-to-end test stand on.
//!
//! A world has *domains*; a domain has *nodes* (a network namespace with an underlay interface, where an agent runs) and a
//! node has *pods* (a network namespace with nothing but `lo`, until an agent puts an interface in). Between the nodes lies
//! an *internet*: a namespace that routes, with the world's DNS server in it and the place where faults are injected.
//!
//! ```text
//!            Cloud::Packet                                  Cloud::Aws
//!  node eth0 203.0.113.10 ── internet          node eth0 10.0.1.10 ── gateway ── internet
//!                               │                                 1:1 NAT to 203.0.113.10
//!  node eth0 198.51.100.10 ─────┘              node eth0 10.0.1.10 ── gateway ──────┘
//! ```
//!
//! Every domain of an aws world has the same private range on purpose, as two default VPCs have: an agent that mixes up
//! private addresses of two domains is found out here.
//!
//! Invariants, which everything else rests on:
//! - Names are derived from the world's id `<name>-<pid>-<n>`: worlds of parallel tests and processes never meet, and all
//!   that belongs to a world can be found by its id alone, also by a later process that sweeps up after one that was killed.
//! - Nothing outlives the [`World`]: it is torn down by drop, also on panic, and by Ctrl-C and SIGTERM ([`interrupt`]).
//!   Processes die with the process that spawned them, even when that is killed.
//! - Nothing of the host is touched but `/run/netns`, `/run/proxy-nsmgr-world` and `/sys/fs/bpf/proxy-nsmgr/<id>-*`; the BPF
//!   file system is mounted where it is not.

mod binaries;
mod builder;
mod dns;
mod error;
mod fault;
pub mod interrupt;
mod leaks;
mod mesh;
mod netns;
mod plan;
mod process;
mod remove;
mod wait;
mod world;

pub use binaries::{binary, cargo};
pub use builder::{Builder, DomainBuilder};
pub use dns::{Dns, NameFault, Query, proxy_name, registry_name};
pub use error::WorldError;
pub use fault::{Fault, FaultGuard};
pub use leaks::{Leaks, Link};
pub use mesh::{Agent, Client, Endpoint};
pub use netns::{command_in, inside};
pub use nix::sys::signal::Signal;
pub use plan::Cloud;
pub use process::Process;
pub use wait::{PATIENCE_VARIABLE, WaitError, patient, wait_until};
pub use world::{Node, Pod, World};

/// Where worlds keep their sockets, configurations and logs: `/run/proxy-nsmgr-world/<world id>/`.
pub const RUN_DIR: &str = "/run/proxy-nsmgr-world";

/// Where agents pin their BPF objects: an agent of a world uses `<PIN_DIR>/<world id>-<node>`. It is the file system itself, so that no
/// directory of all worlds is left behind.
pub const PIN_DIR: &str = "/sys/fs/bpf";

/// The alias prefix by which an agent's links are known as the agent's.
pub const ALIAS_PREFIX: &str = "proxy-nsmgr/";
