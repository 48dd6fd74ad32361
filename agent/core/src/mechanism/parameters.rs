//! The parameters of mechanisms: their keys, and how their values are read.

use std::{collections::BTreeMap, net::IpAddr};

use super::MechanismError;
use crate::{
    liveness::sbfd::Discriminator,
    net::{Vni, special::of_address},
    text::{decimal, port_number},
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
/// Key: the probe VNI (RFC 8971) of the sender: the client's in a Request, the server's in the answer.
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
pub(super) const MIN_MTU: u32 = 68;
/// The largest IP packet.
pub(super) const MAX_MTU: u32 = 65_535;

/// A parameter's value; an empty one counts as absent.
pub(super) fn value<'a>(params: &'a Parameters, key: &str) -> Option<&'a str> {
    params
        .get(key)
        .map(String::as_str)
        .filter(|value| !value.is_empty())
}

pub(super) fn set(params: &mut Parameters, key: &str, value: Option<impl ToString>) {
    match value {
        Some(value) => drop(params.insert(key.to_owned(), value.to_string())),
        None => drop(params.remove(key)),
    }
}

pub(super) fn parse_vni(
    params: &Parameters,
    key: &'static str,
) -> Result<Option<Vni>, MechanismError> {
    let text = value(params, key);
    text.map(|text| {
        text.parse().map_err(|_| MechanismError::Vni {
            key,
            value: text.to_owned(),
        })
    })
    .transpose()
}

pub(super) fn parse_discriminator(
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

pub(super) fn parse_address(
    params: &Parameters,
    key: &'static str,
) -> Result<Option<IpAddr>, MechanismError> {
    let Some(text) = value(params, key) else {
        return Ok(None);
    };
    let address: IpAddr = text.parse().map_err(|_| MechanismError::Address {
        key,
        value: text.to_owned(),
    })?;
    let address = address.to_canonical();
    // To the kernel an unspecified remote is no remote, and a multicast one floods. Loopback and link-local addresses mean another host
    // on each node: packets to them would reach what listens on ours.
    if of_address(address).is_some() {
        return Err(MechanismError::NotUnicast {
            key,
            value: text.to_owned(),
        });
    }
    Ok(Some(address))
}

pub(super) fn parse_port(
    params: &Parameters,
    key: &'static str,
    default: u16,
) -> Result<u16, MechanismError> {
    let Some(text) = value(params, key) else {
        return Ok(default);
    };
    port_number(text).ok_or_else(|| MechanismError::Port {
        key,
        value: text.to_owned(),
    })
}

/// The largest packet inside. NSM writes an MTU of 0 for one that is not known.
pub(super) fn parse_mtu(params: &Parameters) -> Result<Option<u32>, MechanismError> {
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
