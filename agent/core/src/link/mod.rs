//! The link of a connection: as it is wanted, as it was observed, and the steps from one to the other.
//!
//! A connection ends in one link inside the pod's network namespace: a VXLAN link across nodes, one end of a veth pair on one node.
//! [`VxlanSpec`] and [`LinkSpec`] are what is wanted, [`Link`] is what the kernel shows, and [`diff`] plans the operations between the
//! two. Each plan is made from the kernel's state and not from the expected result of an earlier plan: a refresh, a restart of the
//! agent and a link that was changed by hand are one case.
//!
//! A link is ours only when its alias parses as a [`LinkAlias`]. No other link is ever changed or deleted, whatever its name.

pub mod admission;
mod alias;
#[cfg(test)]
mod model;
mod node_link;
mod observed;
mod plan;
mod traffic;
mod wanted;

/// The UDP port of VXLAN (RFC 7348 section 8) where the mechanism has none.
pub use nsm_ebpf_common::VXLAN_PORT;

pub use self::{
    alias::{LinkAlias, LinkAliasError},
    node_link::{
        NODE_GROUP, NODE_GROUP_MASK, NODE_GROUPS, NodeLink, NodeLinkStep, VethPeer, node_end_name,
        repair_node_link,
    },
    observed::{Link, LinkKind, Route},
    plan::{Operation, diff, must_create},
    traffic::{Count, Traffic},
    wanted::{LinkSpec, RouteSpec, VxlanSpec, Wanted, vxlan_overhead},
};
