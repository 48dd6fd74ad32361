//! The URLs that peers dial.

use std::net::{IpAddr, SocketAddr};

use crate::config::{Config, ListenUrl};

/// What they follow from, beside the addresses of the node.
#[derive(Debug, Clone)]
pub(super) struct Advertised {
    /// What the operator has set: it is dialled from everywhere.
    configured: Option<String>,
    /// The proxy's listener.
    listen: ListenUrl,
}

impl Advertised {
    pub(super) fn of(config: &Config) -> Self {
        Self {
            configured: config.advertise_url.as_ref().map(ToString::to_string),
            listen: config.listen.proxy.clone(),
        }
    }

    /// What our own domain dials, where tunnels leave from the address `local`. None: a node without an address listens at all of them.
    pub(super) fn internal(&self, local: Option<IpAddr>) -> Option<String> {
        if self.configured.is_some() {
            return self.configured.clone();
        }
        match &self.listen {
            ListenUrl::Tcp(address) if address.ip().is_unspecified() => {
                local.map(|ip| tcp(ip, *address))
            }
            listen => Some(listen.to_string()),
        }
    }

    /// What other domains dial, where the node has this public address; none where that is what our own domain dials.
    pub(super) fn public(&self, local: Option<IpAddr>, public: Option<IpAddr>) -> Option<String> {
        let ListenUrl::Tcp(listen) = &self.listen else {
            return None;
        };
        let is_reached = listen.ip().is_unspecified() || Some(listen.ip()) == local;
        let public = public.filter(|_| self.configured.is_none() && is_reached);
        public.map(|ip| tcp(ip, *listen))
    }
}

fn tcp(ip: IpAddr, listen: SocketAddr) -> String {
    format!("tcp://{}", SocketAddr::new(ip, listen.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    fn listening(listen: &str) -> Advertised {
        Advertised {
            configured: None,
            listen: listen.parse().unwrap(),
        }
    }

    #[test]
    fn an_unspecified_address_is_never_advertised() {
        let everywhere = listening("tcp://0.0.0.0:5006");
        assert_eq!(everywhere.internal(None), None);
        assert_eq!(everywhere.public(None, None), None);
        let url = everywhere.internal(ip("10.0.0.7")).unwrap();
        assert_eq!(url, "tcp://10.0.0.7:5006");
        let url = everywhere.internal(ip("2001:db8::7")).unwrap();
        assert_eq!(url, "tcp://[2001:db8::7]:5006");
        let url = everywhere.public(ip("10.0.0.7"), ip("192.0.2.7")).unwrap();
        assert_eq!(url, "tcp://192.0.2.7:5006");
    }

    #[test]
    fn what_is_configured_or_listened_at_holds_whatever_the_node_has() {
        let one = listening("tcp://10.0.0.7:5006");
        assert_eq!(one.internal(None).unwrap(), "tcp://10.0.0.7:5006");
        assert_eq!(one.internal(ip("10.0.0.8")).unwrap(), "tcp://10.0.0.7:5006");
        // A gateway leads from the public address to the local one, and to no other.
        assert_eq!(one.public(ip("10.0.0.8"), ip("192.0.2.7")), None);
        let url = one.public(ip("10.0.0.7"), ip("192.0.2.7")).unwrap();
        assert_eq!(url, "tcp://192.0.2.7:5006");
        let configured = Advertised {
            configured: Some("tcp://gate.example:1".to_owned()),
            ..listening("tcp://0.0.0.0:5006")
        };
        assert_eq!(configured.internal(None).unwrap(), "tcp://gate.example:1");
        assert_eq!(configured.public(ip("10.0.0.7"), ip("192.0.2.7")), None);
        let socket = listening("unix:///run/nsm.sock");
        assert_eq!(socket.internal(None).unwrap(), "unix:///run/nsm.sock");
        assert_eq!(socket.public(None, ip("192.0.2.7")), None);
    }
}
