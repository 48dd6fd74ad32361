//! The network side of the agent: NSM v1 services, registries, DNS.

#![forbid(unsafe_code)]

pub mod dial;
pub mod dns;
pub mod registry;
pub mod token;
