//! The health plane between two nodes and a router, under faults, attacks, restarts, and without BPF. Needs root.

mod attack;
mod fault;
mod lifecycle;
mod path;
mod stages;
mod support;
mod ways;
mod wire;
