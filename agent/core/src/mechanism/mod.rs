//! Mechanisms: how two hops connect, as typed values instead of a map of strings.
//!
//! On the wire a mechanism is a class, a type and string parameters; the keys are NSM's (`api/pkg/api/networkservice/mechanisms`).
//! Each side fills its own: the client `src_*`, the server `dst_*` and `vni`. An empty string is the same as no value, because proxies
//! clear values so. Parameters that are not ours pass through untouched: a later NSM, or another forwarder, may use them.
//!
//! Within a node there is one mechanism, [`Kernel`]. Between nodes there are those of the table [`RemoteMechanism::ALL`], each a file of
//! this folder behind [`RemoteMechanism`].

mod kernel;
mod parameters;
pub mod vni_pool;
mod vxlan;

use std::{fmt, net::IpAddr};

use self::parameters::{MAX_MTU, MIN_MTU};
pub use self::{
    kernel::Kernel,
    parameters::{
        DST_IP, DST_PORT, INODE_URL, KERNEL, LOCAL, MTU, NAME, NETNS_INODE, ORIG_DST_IP,
        ORIG_SRC_IP, Parameters, REMOTE, SBFD_DISCRIMINATOR_DST, SBFD_DISCRIMINATOR_SRC, SBFD_VNI,
        SRC_IP, SRC_PORT, VNI, VXLAN,
    },
    vxlan::Vxlan,
};
use crate::{
    link::{VXLAN_PORT, vxlan_overhead},
    liveness::Reflector,
    net::{IfNameError, NetnsUrlError, Vni},
};

/// A mechanism between nodes: what carries a connection's packets from one to the other.
///
/// The client's end [offers](Self::offer) itself, the server's end reads that as [`Asked`] and [answers](Self::answer), and the client's
/// end reads the answer as [`Granted`]. Proxies on the way swap [`SRC_IP`] and [`DST_IP`], whatever the mechanism
/// ([`crate::address::ipmap`]). A path is proved by the [`Reflector`] of its other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoteMechanism {
    /// VXLAN over UDP.
    Vxlan,
}

impl RemoteMechanism {
    /// The table: every mechanism of this agent, the preferred ones first.
    pub const ALL: [Self; 1] = [Self::Vxlan];

    /// The type on the wire, of class [`REMOTE`].
    #[must_use]
    pub const fn wire_type(self) -> &'static str {
        match self {
            Self::Vxlan => VXLAN,
        }
    }

    /// The mechanism of a type on the wire.
    #[must_use]
    pub fn of_type(wire_type: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|mechanism| mechanism.wire_type() == wire_type)
    }

    /// The mechanism to offer for a payload as NSM names it (`IP`, `ETHERNET`): the first of the table that carries it.
    #[must_use]
    pub fn for_payload(payload: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|mechanism| mechanism.carries(payload))
    }

    /// Whether it carries a payload as NSM names it. A tunnel of Ethernet frames carries every one.
    #[must_use]
    pub const fn carries(self, _payload: &str) -> bool {
        match self {
            Self::Vxlan => true,
        }
    }

    /// What the outer headers take from the underlay's MTU, bytes: VXLAN 50 over IPv4, 70 over IPv6.
    #[must_use]
    pub const fn overhead(self, remote: IpAddr) -> u32 {
        match self {
            Self::Vxlan => vxlan_overhead(remote.to_canonical()),
        }
    }

    /// The largest packet that fits into a tunnel on an underlay whose MTU is known, bytes. 0, unknown, stays 0.
    #[must_use]
    pub const fn mtu(self, underlay_mtu: u32, remote: IpAddr) -> u32 {
        underlay_mtu.saturating_sub(self.overhead(remote))
    }

    /// What the client's end at `own` offers for a tunnel that carries packets of `mtu` bytes.
    #[must_use]
    pub fn offer(self, own: &TunnelEnd, mtu: u32) -> Parameters {
        match self {
            Self::Vxlan => vxlan::offer(own, mtu),
        }
    }

    /// Changes the parameters of a tunnel that stands so that the client's end asks for it again, `offer` being its own.
    pub fn renew(self, standing: &mut Parameters, offer: &Parameters) {
        match self {
            Self::Vxlan => vxlan::renew(standing, offer),
        }
    }

    /// Takes out of the parameters of a tunnel that stands what only the server that granted it may be asked for again.
    pub fn forget_grant(self, standing: &mut Parameters) {
        match self {
            Self::Vxlan => vxlan::forget_grant(standing),
        }
    }

    /// What a client's end asks for.
    ///
    /// # Errors
    /// A value that cannot be used, with its key; [`MechanismError::NoClientAddress`].
    pub fn asked(self, params: &Parameters) -> Result<Asked, MechanismError> {
        match self {
            Self::Vxlan => vxlan::asked(params),
        }
    }

    /// Writes the answer of the server's end at `own`, for a tunnel that `key` distinguishes from others.
    ///
    /// # Errors
    /// As for [`Self::asked`].
    pub fn answer(
        self,
        params: &mut Parameters,
        own: &TunnelEnd,
        key: TunnelKey,
        mtu: u32,
    ) -> Result<(), MechanismError> {
        match self {
            Self::Vxlan => vxlan::answer(params, own, key, mtu),
        }
    }

    /// What a server's end has granted.
    ///
    /// # Errors
    /// A value that cannot be used, with its key; [`MechanismError::NotGranted`].
    pub fn granted(self, params: &Parameters) -> Result<Granted, MechanismError> {
        match self {
            Self::Vxlan => vxlan::granted(params),
        }
    }
}

/// One end of a tunnel, as its node describes it to the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelEnd {
    /// The address that its packets come to.
    pub address: IpAddr,
    /// The UDP port that they come to.
    pub port: u16,
    /// Its reflector, where it has one.
    pub reflector: Option<Reflector>,
}

/// What distinguishes a tunnel from the others of its node. A connection holds it from its Request to its Close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TunnelKey {
    /// VXLAN: the network identifier, of which a node has one a tunnel.
    Vni(Vni),
}

impl TunnelKey {
    /// The VNI, of a tunnel that has one.
    #[must_use]
    pub const fn vni(self) -> Option<Vni> {
        let Self::Vni(vni) = self;
        Some(vni)
    }
}

impl fmt::Display for TunnelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vni(vni) => write!(f, "VNI {vni}"),
        }
    }
}

/// What a client's end asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// The client's end.
    pub client: TunnelEnd,
    /// The largest packet that it sends, bytes, where it states that.
    pub mtu: Option<u32>,
    /// The key of its tunnel that stands, and the server's address where the client still has that.
    pub standing: Option<(TunnelKey, Option<IpAddr>)>,
}

/// What a server's end has granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// The server's end.
    pub server: TunnelEnd,
    /// Whether the server watches the path: its context then has the MTU that the path carries now, and not the agreed one.
    pub watches_path: bool,
    /// The largest packet that both ends agreed on, bytes, where the server states that.
    pub mtu: Option<u32>,
    /// The key that the server has chosen.
    pub key: TunnelKey,
}

/// Why a mechanism's parameters cannot be used, or no mechanism fits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MechanismError {
    /// No IP address.
    #[error(
        "mechanism parameter {key} = `{value}` is no IP address: send one such as 192.0.2.1 or 2001:db8::1"
    )]
    Address {
        /// The parameter.
        key: &'static str,
        /// What it holds.
        value: String,
    },
    /// An address that no tunnel can end at.
    #[error(
        "mechanism parameter {key} = `{value}` is no address of one host that other nodes reach: send the node's unicast address"
    )]
    NotUnicast {
        /// The parameter.
        key: &'static str,
        /// What it holds.
        value: String,
    },
    /// A tunnel to this node itself.
    #[error(
        "mechanism parameter {key} = `{value}` is an address of the node that would send to it: send the address of the other node"
    )]
    OwnAddress {
        /// The parameter.
        key: &'static str,
        /// The address.
        value: IpAddr,
    },
    /// A UDP port that the node opens for no tunnel.
    #[error(
        "mechanism parameter {key} = `{value}` is no UDP port of tunnels on this node, which has {own}: the other end chooses none of ours;          add it to `tunnel.peer_ports` to admit it"
    )]
    ForeignPort {
        /// The parameter.
        key: &'static str,
        /// The port.
        value: u16,
        /// The port of this node's tunnels.
        own: u16,
    },
    /// No UDP port.
    #[error(
        "mechanism parameter {key} = `{value}` is no UDP port: send a number from 1 to 65535, {VXLAN_PORT} by default"
    )]
    Port {
        /// The parameter.
        key: &'static str,
        /// What it holds.
        value: String,
    },
    /// No VNI.
    #[error("mechanism parameter {key} = `{value}` is no VNI: send a number from 1 to {max}", max = Vni::MAX)]
    Vni {
        /// The parameter.
        key: &'static str,
        /// What it holds.
        value: String,
    },
    /// No discriminator.
    #[error(
        "mechanism parameter {key} = `{value}` is no S-BFD discriminator: send a number from 1 to {max}, or leave it out",
        max = u32::MAX
    )]
    Discriminator {
        /// The parameter.
        key: &'static str,
        /// What it holds.
        value: String,
    },
    /// No MTU.
    #[error(
        "mechanism parameter {MTU} = `{value}` is no MTU: send a number of bytes from {MIN_MTU} to {MAX_MTU}, or leave it out"
    )]
    Mtu {
        /// What it holds.
        value: String,
    },
    /// A tunnel's client has no address.
    #[error("the request has no src_ip in its VXLAN mechanism: set it and ask again")]
    NoClientAddress,
    /// A tunnel's server has not filled in its part.
    #[error("its VXLAN mechanism lacks vni or dst_ip")]
    NotGranted,
    /// No interface name.
    #[error("mechanism parameter {NAME}: {0}")]
    IfName(#[from] IfNameError),
    /// No namespace URL.
    #[error("mechanism parameter {INODE_URL}: {0}")]
    Netns(#[from] NetnsUrlError),
    /// Nothing was offered.
    #[error("the request offers no mechanism: send mechanism_preferences; {} supported", list(.supported))]
    NoneOffered {
        /// (class, type) of what this hop supports.
        supported: Vec<(String, String)>,
    },
    /// Nothing that was offered is supported.
    #[error("no common mechanism: {} offered, {} supported", list(.offered), list(.supported))]
    NoCommon {
        /// (class, type) of what was offered.
        offered: Vec<(String, String)>,
        /// (class, type) of what this hop supports.
        supported: Vec<(String, String)>,
    },
}

fn list(mechanisms: &[(String, String)]) -> String {
    let names: Vec<_> = mechanisms
        .iter()
        .map(|(class, kind)| format!("{class}/{kind}"))
        .collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// Which of the mechanisms offered, as (class, type), this hop takes: the first that it supports (NSM's `mechanisms` server). An offer
/// without class is matched by its type alone, as NSM does.
///
/// # Errors
/// [`MechanismError::NoneOffered`] for an empty offer, as in NSM: a mechanism that was not offered would be of no use.
/// [`MechanismError::NoCommon`] with both lists otherwise.
pub fn choose<'a>(
    offered: impl Iterator<Item = (&'a str, &'a str)>,
    supported: &[(&str, &str)],
) -> Result<usize, MechanismError> {
    let own = |mechanisms: &[(&str, &str)]| {
        mechanisms
            .iter()
            .map(|(class, kind)| ((*class).to_owned(), (*kind).to_owned()))
            .collect()
    };
    let offered: Vec<_> = offered.collect();
    if offered.is_empty() {
        return Err(MechanismError::NoneOffered {
            supported: own(supported),
        });
    }
    let is_supported = |(class, kind): &(&str, &str)| {
        supported
            .iter()
            .any(|(c, k)| kind == k && (class.is_empty() || class == c))
    };
    offered
        .iter()
        .position(is_supported)
        .ok_or_else(|| MechanismError::NoCommon {
            offered: own(&offered),
            supported: own(supported),
        })
}

/// The lower of two MTUs, 0 being unknown: what is known counts.
#[must_use]
pub fn lower_mtu(a: u32, b: u32) -> u32 {
    if a == 0 || b == 0 { a.max(b) } else { a.min(b) }
}
