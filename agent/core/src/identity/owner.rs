//! Whose a connection or a registration is.
//!
//! | made over | belongs to |
//! |---|---|
//! | the NSMgr's socket | the user, user namespace and network namespace of the process: whichever process of them comes back |
//! | the forwarder's socket | the NSMgr, whichever process of it comes back: one that restarts has another pod |
//! | the network, with a certificate | the workload that its tokens prove: see [`Workload`] |
//! | the network, in plain text | whoever has its path: see [`Owner::Network`] |

use std::net::IpAddr;

use super::{
    Workload,
    process::{NamespaceId, NetnsCookie},
};

/// Whose something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A user of this node, in one pod.
    Process {
        /// The user's number.
        user: Option<u32>,
        /// The user namespace.
        namespace: Option<NamespaceId>,
        /// The network namespace.
        home: Option<NetnsCookie>,
    },
    /// The NSMgr that our forwarder works for.
    Nsmgr,
    /// Another node. Its address may change, as that of an NSMgr whose pod is replaced, so that it is asked for only where nothing
    /// better is at hand: for what a monitor shows. Who changes or closes a connection shows its path instead.
    Network(Option<IpAddr>),
    /// A workload with a proven id, wherever it calls from.
    Workload(Workload),
}

impl Owner {
    /// Whether `self`, which follows connections and shows no path, gets news of what `other` has made.
    #[must_use]
    pub fn may_follow(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Workload(one), Self::Workload(other)) => one.is_of_station(other),
            _ => self == other,
        }
    }

    /// Whether both came by the same kind of socket and are the same there, as far as that is known without a path.
    #[must_use]
    pub fn is_alike(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Network(_), Self::Network(_)) => true,
            _ => self == other,
        }
    }
}
