//! The node's own addresses and default routes, and their changes.

use std::{io, net::IpAddr};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressMessage, AddressScope},
    route::RouteMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;

use crate::{
    NetlinkError,
    links::{LinkError, default_route_source},
    netlink::Netlink,
};

/// RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR and RTNLGRP_IPV6_ROUTE of linux/rtnetlink.h.
const GROUPS: [u32; 4] = [5, 7, 9, 11];

/// Room for one datagram of events.
const BUFFER: usize = 32 * 1024;

/// The source address of the default route, in the network namespace of the calling thread: that of IPv4 before that of IPv6. Needs no
/// rights, and takes less than a millisecond.
///
/// # Errors
/// There is no default route.
pub fn default_source() -> Result<IpAddr, LinkError> {
    default_route_source(&mut Netlink::open()?)
}

/// Changes of addresses that reach beyond the node's links, and of default routes, in the network namespace where this was opened.
pub struct AddressEvents {
    socket: AsyncFd<Socket>,
}

impl AddressEvents {
    /// Listens in the network namespace of the calling thread. Needs a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be opened.
    pub fn open() -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        // SAFETY: the socket owns its descriptor, never hands it out, and is closed with the AsyncFd that owns it.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(io::Error::from)?;
        Ok(Self { socket })
    }

    /// Waits until an address of global scope or a default route was added, removed, or changed. May be given up and called again; what
    /// happens meanwhile is reported then. Events that were lost, because too many came, count as a change.
    ///
    /// # Errors
    /// The socket failed.
    pub async fn changed(&mut self) -> Result<(), NetlinkError> {
        loop {
            let mut ready = self.socket.readable().await?;
            let mut is_changed = false;
            // All that is there, so that a burst is one change.
            loop {
                let mut buffer = Vec::with_capacity(BUFFER);
                match ready.try_io(|socket| socket.get_ref().recv(&mut buffer, 0)) {
                    Err(_would_block) => break,
                    Ok(Ok(_)) => is_changed |= is_of_a_change(&buffer),
                    Ok(Err(error)) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                        is_changed = true;
                    }
                    Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(Err(error)) => return Err(error.into()),
                }
            }
            if is_changed {
                return Ok(());
            }
        }
    }
}

/// Whether one of the datagram's messages is about an address of global scope or a default route. What cannot be read counts: one check too many costs
/// little.
fn is_of_a_change(mut datagram: &[u8]) -> bool {
    while !datagram.is_empty() {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram) else {
            return true;
        };
        if let NetlinkPayload::InnerMessage(change) = &message.payload
            && counts(change)
        {
            return true;
        }
        // Every message starts at a multiple of four (NLMSG_ALIGNTO), and has a header.
        let length = (message.header.length as usize).max(16).next_multiple_of(4);
        datagram = datagram.get(length..).unwrap_or_default();
    }
    false
}

fn counts(change: &RouteNetlinkMessage) -> bool {
    match change {
        RouteNetlinkMessage::NewAddress(AddressMessage { header, .. })
        | RouteNetlinkMessage::DelAddress(AddressMessage { header, .. }) => {
            header.scope == AddressScope::Universe
        }
        RouteNetlinkMessage::NewRoute(RouteMessage { header, .. })
        | RouteNetlinkMessage::DelRoute(RouteMessage { header, .. }) => {
            header.destination_prefix_length == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NetlinkHeader;
    use proptest::prelude::*;

    use super::*;

    fn event(scope: AddressScope) -> Vec<u8> {
        let mut address = AddressMessage::default();
        address.header.scope = scope;
        message(RouteNetlinkMessage::NewAddress(address))
    }

    fn message(change: RouteNetlinkMessage) -> Vec<u8> {
        let payload = NetlinkPayload::from(change);
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    #[test]
    fn only_default_routes_count() {
        let route = |length| {
            let mut route = RouteMessage::default();
            route.header.destination_prefix_length = length;
            message(RouteNetlinkMessage::DelRoute(route))
        };
        assert!(is_of_a_change(&route(0)));
        assert!(!is_of_a_change(&route(24)));
    }

    #[test]
    fn only_addresses_that_reach_beyond_a_link_count() {
        let link = event(AddressScope::Link);
        assert!(!is_of_a_change(&link));
        assert!(is_of_a_change(&event(AddressScope::Universe)));
        let both = [link, event(AddressScope::Universe)].concat();
        assert!(is_of_a_change(&both));
        assert!(!is_of_a_change(&[]));
    }

    proptest! {
        #[test]
        fn no_datagram_panics_or_hangs(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = is_of_a_change(&bytes);
        }
    }
}
