//! The kernel side of the agent: network namespaces, the links of connections, BPF, and the probes of the health plane.
//!
//! What to do is decided in `nsm_core::link`, which is pure; this crate observes the kernel and applies.

pub mod addresses;
pub mod bpf;
pub mod fence;
pub mod forward;
pub mod links;
pub mod liveness;
mod netlink;
pub mod netns;

pub use netlink::{NetlinkError, Refusal};
