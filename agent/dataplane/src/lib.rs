//! The kernel side of the agent: network namespaces, the links of connections, and BPF.
//!
//! What to do is decided in `nsm_core::tunnel`, which is pure; this crate observes the kernel and applies.

pub mod addresses;
pub mod bpf;
pub mod links;
mod netlink;
pub mod netns;

pub use netlink::{NetlinkError, Refusal};
