//! Mechanisms: how two hops connect, as typed values instead of a map of strings.
//!
//! On the wire a mechanism is a class, a type and string parameters; the keys are NSM's (`api/pkg/api/networkservice/mechanisms`).
//! Each side fills its own: the client `src_*`, the server `dst_*` and `vni`. An empty string is the same as no value, because proxies
//! clear values so. Parameters that are not ours pass through untouched: a later NSM, or another forwarder, may use them.

mod kernel;
pub mod vni_pool;

use std::{collections::BTreeMap, net::IpAddr};

pub use kernel::Kernel;

use crate::{
    link::{VXLAN_PORT, vxlan_overhead},
    liveness::sbfd::Discriminator,
    net::{IfNameError, NetnsUrlError, Vni},
    text::decimal,
};

/// A mechanism's parameters as on the wire.
pub type Parameters = BTreeMap<String, String>;

/// Class of mechanisms within a node.
pub const LOCAL: &str = "LOCAL";
/// Class of mechanisms between nodes.
pub const REMOTE: &str = "REMOTE";

/// Type: an interface in the pod's network namespace.
pub const KERNEL: &str = "KERNEL";
/// Type: VXLAN tunnel (RFC 7348).
pub const VXLAN: &str = "VXLAN";

/// Key: the client side's tunnel address.
pub const SRC_IP: &str = "src_ip";
/// Key: the server side's tunnel address.
pub const DST_IP: &str = "dst_ip";
/// Key: the UDP port on which the client side receives.
pub const SRC_PORT: &str = "src_port";
/// Key: the UDP port on which the server side receives.
pub const DST_PORT: &str = "dst_port";
/// Key: the client side's address before a proxy swapped it.
pub const ORIG_SRC_IP: &str = "orig_src_ip";
/// Key: the server side's address before a proxy swapped it.
pub const ORIG_DST_IP: &str = "orig_dst_ip";
/// Key: the VXLAN network identifier.
pub const VNI: &str = "vni";
/// Key: the discriminator of the client side's S-BFD reflector.
pub const SBFD_DISCRIMINATOR_SRC: &str = "sbfd_discriminator_src";
/// Key: the discriminator of the server side's S-BFD reflector.
pub const SBFD_DISCRIMINATOR_DST: &str = "sbfd_discriminator_dst";
/// Key: the probe VNI (RFC 8971's management VNI) of the sender: the client's in a Request, the server's in the answer.
pub const SBFD_VNI: &str = "sbfd_vni";
/// Key: the largest packet that the tunnel carries, in bytes.
pub const MTU: &str = "MTU";
/// Key: the interface's name in the pod.
pub const NAME: &str = "name";
/// Key: URL of the pod's network namespace, `file://` or `inode://`.
pub const INODE_URL: &str = "inodeURL";
/// Key: the inode of the pod's network namespace.
pub const NETNS_INODE: &str = "netnsInode";

/// The smallest MTU of an IPv4 link (RFC 791 section 3.2).
const MIN_MTU: u32 = 68;
/// The largest IP packet.
const MAX_MTU: u32 = 65_535;

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
        "mechanism parameter {key} = `{value}` is no address of one host: send the node's unicast address"
    )]
    NotUnicast {
        /// The parameter.
        key: &'static str,
        /// What it holds.
        value: String,
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

/// A parameter's value; an empty one counts as absent.
fn value<'a>(params: &'a Parameters, key: &str) -> Option<&'a str> {
    params
        .get(key)
        .map(String::as_str)
        .filter(|value| !value.is_empty())
}

fn set(params: &mut Parameters, key: &str, value: Option<impl ToString>) {
    match value {
        Some(value) => drop(params.insert(key.to_owned(), value.to_string())),
        None => drop(params.remove(key)),
    }
}

/// A VXLAN tunnel's parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// The client side's address.
    pub src_ip: Option<IpAddr>,
    /// The server side's address.
    pub dst_ip: Option<IpAddr>,
    /// The UDP port on which the client side receives; [`VXLAN_PORT`] when absent.
    pub src_port: u16,
    /// The UDP port on which the server side receives; [`VXLAN_PORT`] when absent.
    pub dst_port: u16,
    /// The identifier, once the server has chosen it.
    pub vni: Option<Vni>,
    /// The largest packet inside, in bytes.
    pub mtu: Option<u32>,
    /// The client side's S-BFD reflector, if it has one.
    pub src_discriminator: Option<Discriminator>,
    /// The server side's S-BFD reflector, if it has one.
    pub dst_discriminator: Option<Discriminator>,
    /// The probe VNI of the sender; see [`SBFD_VNI`].
    pub sbfd_vni: Option<Vni>,
}

impl Default for Vxlan {
    fn default() -> Self {
        Self {
            src_ip: None,
            dst_ip: None,
            src_port: VXLAN_PORT,
            dst_port: VXLAN_PORT,
            vni: None,
            mtu: None,
            src_discriminator: None,
            dst_discriminator: None,
            sbfd_vni: None,
        }
    }
}

impl Vxlan {
    /// Reads the parameters.
    ///
    /// # Errors
    /// A value that cannot be used, with its key.
    pub fn parse(params: &Parameters) -> Result<Self, MechanismError> {
        Ok(Self {
            src_ip: parse_address(params, SRC_IP)?,
            dst_ip: parse_address(params, DST_IP)?,
            src_port: parse_port(params, SRC_PORT)?,
            dst_port: parse_port(params, DST_PORT)?,
            vni: parse_vni(params, VNI)?,
            mtu: parse_mtu(params)?,
            src_discriminator: parse_discriminator(params, SBFD_DISCRIMINATOR_SRC)?,
            dst_discriminator: parse_discriminator(params, SBFD_DISCRIMINATOR_DST)?,
            sbfd_vni: parse_vni(params, SBFD_VNI)?,
        })
    }

    /// Writes the parameters and leaves those it does not know alone. What is absent is removed. A port is written with its
    /// address: a side without address has a port only where that is not the default.
    pub fn write(&self, params: &mut Parameters) {
        let port =
            |ip: Option<IpAddr>, port: u16| (ip.is_some() || port != VXLAN_PORT).then_some(port);
        set(params, SRC_IP, self.src_ip);
        set(params, DST_IP, self.dst_ip);
        set(params, SRC_PORT, port(self.src_ip, self.src_port));
        set(params, DST_PORT, port(self.dst_ip, self.dst_port));
        set(params, VNI, self.vni);
        set(params, MTU, self.mtu);
        let discriminator = |of: Option<Discriminator>| of.map(Discriminator::get);
        set(
            params,
            SBFD_DISCRIMINATOR_SRC,
            discriminator(self.src_discriminator),
        );
        set(
            params,
            SBFD_DISCRIMINATOR_DST,
            discriminator(self.dst_discriminator),
        );
        set(params, SBFD_VNI, self.sbfd_vni);
    }
}

fn parse_vni(params: &Parameters, key: &'static str) -> Result<Option<Vni>, MechanismError> {
    let text = value(params, key);
    text.map(|text| {
        text.parse().map_err(|_| MechanismError::Vni {
            key,
            value: text.to_owned(),
        })
    })
    .transpose()
}

fn parse_discriminator(
    params: &Parameters,
    key: &'static str,
) -> Result<Option<Discriminator>, MechanismError> {
    let text = value(params, key);
    text.map(|text| {
        text.parse().map_err(|_| MechanismError::Discriminator {
            key,
            value: text.to_owned(),
        })
    })
    .transpose()
}

fn parse_address(params: &Parameters, key: &'static str) -> Result<Option<IpAddr>, MechanismError> {
    let Some(text) = value(params, key) else {
        return Ok(None);
    };
    let address: IpAddr = text.parse().map_err(|_| MechanismError::Address {
        key,
        value: text.to_owned(),
    })?;
    let address = address.to_canonical();
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    // To the kernel an unspecified remote is no remote, and a multicast one floods.
    if address.is_unspecified() || address.is_multicast() || broadcast {
        return Err(MechanismError::NotUnicast {
            key,
            value: text.to_owned(),
        });
    }
    Ok(Some(address))
}

fn parse_port(params: &Parameters, key: &'static str) -> Result<u16, MechanismError> {
    let Some(text) = value(params, key) else {
        return Ok(VXLAN_PORT);
    };
    match decimal(text).map(u16::try_from) {
        Some(Ok(port)) if port != 0 => Ok(port),
        _ => Err(MechanismError::Port {
            key,
            value: text.to_owned(),
        }),
    }
}

/// NSM writes an MTU of 0 for one that is not known.
fn parse_mtu(params: &Parameters) -> Result<Option<u32>, MechanismError> {
    let Some(text) = value(params, MTU) else {
        return Ok(None);
    };
    match decimal(text).map(u32::try_from) {
        Some(Ok(0)) => Ok(None),
        Some(Ok(mtu)) if (MIN_MTU..=MAX_MTU).contains(&mtu) => Ok(Some(mtu)),
        _ => Err(MechanismError::Mtu {
            value: text.to_owned(),
        }),
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

/// The largest packet that fits into a VXLAN tunnel, for an underlay whose MTU is known: 50 bytes less over IPv4, 70 over IPv6. 0,
/// unknown, stays 0.
#[must_use]
pub fn vxlan_mtu(underlay_mtu: u32, remote: IpAddr) -> u32 {
    underlay_mtu.saturating_sub(vxlan_overhead(remote.to_canonical()))
}

/// The lower of two MTUs, 0 being unknown: what is known counts.
#[must_use]
pub fn lower_mtu(a: u32, b: u32) -> u32 {
    if a == 0 || b == 0 { a.max(b) } else { a.min(b) }
}
