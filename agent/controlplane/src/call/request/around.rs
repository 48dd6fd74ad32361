//! What is around a pod of this node: nothing of it may be taken by a connection.

use std::sync::Arc;

use ipnet::IpNet;
use nsm_core::link::admission::Holding;

/// What is around a pod.
#[derive(Debug)]
pub(in crate::call) struct Around {
    /// The node's addresses, with the lengths of their networks.
    pub(super) node: Arc<[IpNet]>,
    /// What the pod has on other links.
    pub(super) pod: Vec<Holding>,
}
