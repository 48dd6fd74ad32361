//! The parts of a running agent, each with what it needs of the configuration; [`crate::run`] wires them.

mod advertised;
pub(crate) mod cluster;
pub(crate) mod control;
pub(crate) mod drains;
pub(crate) mod forwarder;
mod handover;
pub(crate) mod hooks;
pub(crate) mod identity;
pub(crate) mod ip_map;
pub(crate) mod listeners;
mod namespaces;
pub(crate) mod orphans;
pub(crate) mod policy;
pub(crate) mod prober;
pub(crate) mod probing;
pub(crate) mod programs;
pub(crate) mod public_address;
pub(crate) mod readiness;
pub(crate) mod signals;
mod underlays;
pub(crate) mod upstream;
