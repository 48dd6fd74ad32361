//! Probes and data between two nodes and a router, under faults, attacks and restarts. Needs root.

mod attack;
mod data;
mod fault;
mod lifecycle;
mod pair;
mod path;
mod stages;
mod support;
mod ways;
mod wire;
