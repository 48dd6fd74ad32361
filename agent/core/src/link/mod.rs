//! The link of a connection: as it is wanted, as it was observed, and the steps from one to the other.
//!
//! A connection ends in one link inside the pod's network namespace: one end of a veth pair. Its other end is on the node, where BPF joins
//! it with a tunnel, or with the link of the other pod where that is on the same node. [`LinkSpec`] is what is wanted of the pod's end,
//! [`Link`] is what the kernel shows, and [`diff`] plans the operations between the two; [`NodeLink`] and [`repair_node_link`] are the same
//! for the node's end. Each plan is made from the kernel's state and not from the expected result of an earlier plan: a refresh, a restart
//! of the agent and a link that was changed by hand are one case.
//!
//! A link is ours only when its alias parses as a [`LinkAlias`]. No other link is ever changed or deleted, whatever its name.

pub mod admission;
mod alias;
mod fault;
#[cfg(test)]
mod model;
mod node_link;
mod observed;
mod plan;
mod repair;
mod traffic;
mod wanted;

/// The UDP port of VXLAN (RFC 7348 section 8) where the mechanism has none.
pub use nsm_ebpf_common::VXLAN_PORT;

pub use self::{
    alias::{LinkAlias, LinkAliasError},
    fault::{LinkFault, faults},
    node_link::{
        NODE_GROUP, NODE_GROUP_MASK, NODE_GROUPS, NodeLink, NodeLinkStep, VethPeer, node_end_name,
        repair_node_link,
    },
    observed::{Link, LinkKind, Route},
    plan::{Operation, diff, must_create},
    repair::Repairs,
    traffic::{Count, Traffic},
    wanted::{LinkSpec, PodLinkSpec, RouteSpec, VxlanSpec, vxlan_overhead},
};
