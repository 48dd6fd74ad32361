//! Types of the network that cannot hold an illegal value.

pub mod mac;
pub mod vni;
