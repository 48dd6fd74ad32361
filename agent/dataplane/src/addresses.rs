//! Changes of the node's own addresses: RTNLGRP_IPV4_IFADDR and RTNLGRP_IPV6_IFADDR of rtnetlink.

use std::io;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressMessage, AddressScope},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;

use crate::NetlinkError;

/// RTNLGRP_IPV4_IFADDR and RTNLGRP_IPV6_IFADDR of linux/rtnetlink.h.
const GROUPS: [u32; 2] = [5, 9];

/// Room for one datagram of events.
const BUFFER: usize = 32 * 1024;

/// Changes of addresses that reach beyond the node's links, in the network namespace where this was opened.
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

    /// Waits until an address of global scope was added, removed, or given another lifetime. May be given up and called again; what
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
                    Ok(Ok(_)) => is_changed |= tells_of_a_change(&buffer),
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

/// Whether one of the datagram's messages is about an address of global scope. What cannot be read counts: one check too many costs
/// little.
fn tells_of_a_change(mut datagram: &[u8]) -> bool {
    while !datagram.is_empty() {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram) else {
            return true;
        };
        if let NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(AddressMessage { header, .. })
            | RouteNetlinkMessage::DelAddress(AddressMessage { header, .. }),
        ) = &message.payload
            && header.scope == AddressScope::Universe
        {
            return true;
        }
        // Every message starts at a multiple of four (NLMSG_ALIGNTO), and has a header.
        let length = (message.header.length as usize).max(16).next_multiple_of(4);
        datagram = datagram.get(length..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NetlinkHeader;
    use proptest::prelude::*;

    use super::*;

    fn event(scope: AddressScope) -> Vec<u8> {
        let mut address = AddressMessage::default();
        address.header.scope = scope;
        let payload = NetlinkPayload::from(RouteNetlinkMessage::NewAddress(address));
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    #[test]
    fn only_addresses_that_reach_beyond_a_link_count() {
        let link = event(AddressScope::Link);
        assert!(!tells_of_a_change(&link));
        assert!(tells_of_a_change(&event(AddressScope::Universe)));
        let both = [link, event(AddressScope::Universe)].concat();
        assert!(tells_of_a_change(&both));
        assert!(!tells_of_a_change(&[]));
    }

    proptest! {
        #[test]
        fn no_datagram_panics_or_hangs(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = tells_of_a_change(&bytes);
        }
    }
}
