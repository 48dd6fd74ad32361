//! What a connection is called.
//!
//! A client that is killed closes nothing: its connection stands until its token ends, and with it the interface. The next client for the
//! same interface in the same namespace calls its connection the same, so that the agent finds it and the interface stays. Only one
//! process at a time may: it has a socket of that name, which the kernel takes away with the process, however that ends. Another one beside
//! it gets a random name, and the agent refuses the interface that is taken.

use std::os::{
    linux::net::SocketAddrExt as _,
    unix::{
        fs::MetadataExt as _,
        net::{SocketAddr, UnixDatagram},
    },
};

use nsm_core::net::IfName;
use uuid::Uuid;

use crate::{netns::Netns, tool::random_name};

/// The name and the id of a client's path segment.
#[derive(Debug)]
pub(crate) struct Identity {
    /// The name of the client.
    pub(super) name: String,
    /// The id of its segment, and of its connection.
    pub(super) id: String,
    /// Keeps other processes from the same id.
    _claim: Option<UnixDatagram>,
}

impl Identity {
    /// That of a client for an interface: the same for each process of this user's, one at a time.
    pub(super) fn of(name: Option<&str>, netns: &Netns, interface: &IfName) -> Self {
        let of_default = |id: &str| format!("nsc-{}", &id[..8]);
        let id = id(name, netns, interface);
        match claim(&id) {
            Some(claim) => Self {
                name: name.map_or_else(|| of_default(&id), str::to_owned),
                id,
                _claim: Some(claim),
            },
            None => Self {
                name: name.map_or_else(|| random_name("nsc"), str::to_owned),
                id: Uuid::new_v4().to_string(),
                _claim: None,
            },
        }
    }
}

fn id(name: Option<&str>, netns: &Netns, interface: &IfName) -> String {
    let user = std::fs::metadata("/proc/self").map_or(0, |process| process.uid());
    let name = name.unwrap_or_default();
    let facts = format!("connect/{user}/{}/{interface}/{name}", netns.number());
    Uuid::new_v5(&Uuid::NAMESPACE_OID, facts.as_bytes()).to_string()
}

/// A socket of this name in the kernel's own space of names. None: another process has it, or there can be none.
fn claim(id: &str) -> Option<UnixDatagram> {
    let address = SocketAddr::from_abstract_name(format!("proxy-nsmgr/connect/{id}")).ok()?;
    UnixDatagram::bind_addr(&address).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_process_is_called_the_same_and_one_beside_it_is_not() {
        let netns = Netns::open("/proc/self/ns/net").unwrap();
        let of = |name, interface: &str| {
            Identity::of(name, &netns, &IfName::try_from(interface).unwrap())
        };
        let first = of(None, "nsm-17");
        let beside = of(None, "nsm-17");
        assert_ne!(first.id, beside.id);
        let other = of(None, "nsm-18");
        assert_ne!(first.id, other.id, "another interface");
        let named = of(Some("web"), "nsm-17");
        assert_eq!(named.name, "web");
        assert_ne!(named.id, first.id);
        let (name, id) = (first.name.clone(), first.id.clone());
        drop(first);
        let next = of(None, "nsm-17");
        assert_eq!((next.name.clone(), next.id.clone()), (name, id));
    }
}
