//! Whether our filter is where clsact has it.

use std::io;

use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcHandle, TcMessage},
};
use nix::net::if_::if_nametoindex;

use super::{HANDLE, PRIORITY};
use crate::{
    bpf::{BpfError, Direction},
    netlink::Netlink,
};

/// Whether there is a filter of our priority and handle, on an interface of the calling thread's network namespace.
pub(super) fn is_there(interface: &str, direction: Direction) -> Result<bool, BpfError> {
    let Ok(index) = if_nametoindex(interface) else {
        return Ok(false);
    };
    let failed = |source| BpfError::Filters {
        interface: interface.to_owned(),
        source,
    };
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: match direction {
            Direction::In => TcHandle::MIN_INGRESS,
            Direction::Out => TcHandle::MIN_EGRESS,
        },
    };
    let found = Netlink::open()
        .map_err(failed)?
        .dump(&RouteNetlinkMessage::GetTrafficFilter(message))
        .map_err(|error| failed(io::Error::other(error)))?;
    Ok(found.iter().any(|found| match found {
        RouteNetlinkMessage::NewTrafficFilter(filter) => {
            filter.header.info >> 16 == u32::from(PRIORITY)
                && u32::from(filter.header.handle) == u32::from(HANDLE)
        }
        _ => false,
    }))
}
