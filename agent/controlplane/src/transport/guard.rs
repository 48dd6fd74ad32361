//! Which addresses are dialled: checked on the address that is really connected to, after names are resolved.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Mutex,
};

use ipnet::IpNet;
use nsm_core::{identity::relay::check_dial, net::PeerUrl};

use crate::sync::lock;

/// The rules of dialling.
#[derive(Debug, Default)]
pub(crate) struct DialGuard {
    /// Ranges of this node that may be dialled all the same.
    inside: Vec<IpNet>,
    /// What the operator named: it is dialled, wherever it leads.
    configured: HashSet<PeerUrl>,
    /// Where the resolver's hosts lead, as far as they were asked for.
    hosts: Mutex<HashSet<SocketAddr>>,
    /// This node's public address: a gateway leads from it to here, and no interface has it.
    public: Mutex<Option<IpAddr>>,
}

impl DialGuard {
    /// Dials `configured`, and what lies `inside` of this node.
    pub(crate) fn new(inside: Vec<IpNet>, configured: impl IntoIterator<Item = PeerUrl>) -> Self {
        Self {
            inside,
            configured: configured.into_iter().collect(),
            hosts: Mutex::default(),
            public: Mutex::default(),
        }
    }

    /// Packets to this address come to this node.
    pub(crate) fn set_public(&self, address: Option<IpAddr>) {
        *lock(&self.public) = address;
    }

    /// The operator's hosts lead there.
    pub(crate) fn permit(&self, addresses: impl IntoIterator<Item = SocketAddr>) {
        lock(&self.hosts).extend(addresses);
    }

    /// Whether this URL is dialled without looking where it leads.
    pub(crate) fn is_configured(&self, url: &PeerUrl) -> bool {
        self.configured.contains(url)
    }

    /// Whether this address is dialled.
    pub(crate) fn check(&self, address: SocketAddr) -> io::Result<()> {
        if lock(&self.hosts).contains(&address) {
            return Ok(());
        }
        let is_public = *lock(&self.public) == Some(address.ip());
        check_dial(address.ip(), is_public || is_own(address), &self.inside)
            .map_err(|refusal| io::Error::new(io::ErrorKind::PermissionDenied, refusal))
    }
}

/// Whether an address is one of this node. The kernel takes an own address as the source of packets to it; nothing is sent to learn that.
fn is_own(address: SocketAddr) -> bool {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(address)?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_dialled_where_it_is_named() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let guard = DialGuard::default();
        for address in ["127.0.0.1:8888", "[::1]:80", "169.254.169.254:80"] {
            assert!(guard.check(at(address)).is_err(), "{address}");
        }
        assert!(guard.check(at("192.0.2.1:5006")).is_ok());
        guard.permit([at("127.0.0.1:8888")]);
        assert!(guard.check(at("127.0.0.1:8888")).is_ok());
        assert!(guard.check(at("127.0.0.1:8889")).is_err());
        let guard = DialGuard::new(vec!["127.0.0.0/8".parse().unwrap()], []);
        assert!(guard.check(at("127.0.0.1:1")).is_ok());
    }

    #[test]
    fn the_public_address_is_the_nodes_own() {
        let at = "192.0.2.50:22".parse().unwrap();
        let guard = DialGuard::default();
        guard.set_public(Some("192.0.2.50".parse().unwrap()));
        assert!(guard.check(at).is_err());
        guard.set_public(None);
        assert!(guard.check(at).is_ok());
    }

    #[test]
    fn own_addresses_are_known_without_a_packet() {
        assert!(is_own("127.0.0.1:9".parse().unwrap()));
        assert!(!is_own("192.0.2.77:9".parse().unwrap()));
    }
}
