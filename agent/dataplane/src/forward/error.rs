//! Why a connection cannot be forwarded.

use std::net::IpAddr;

use nsm_core::net::Vni;

use crate::{
    bpf::BpfError, fence::FenceError, links::LinkError, netlink::NetlinkError, netns::NetnsError,
};

/// What can go wrong with forwarding.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// A namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    /// Netlink itself failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A pod link or an external device cannot be made.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The fence around our links.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// The programs or their maps.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// Another connection has this tunnel.
    #[error(
        "VNI {vni} towards {peer} is in use by another connection of this node: choose another VNI"
    )]
    Taken {
        /// The VNI.
        vni: Vni,
        /// The peer.
        peer: IpAddr,
    },
}
