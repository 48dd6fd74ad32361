//! The prober's packet socket on a probe link.
//!
//! It is bound to the link's IP protocol and not to all protocols: such sockets are served after the hooks, so packets that the
//! programs drop never arrive here, and those that arrive have their stamp: the answers that the prober waits for.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::libc;

use super::HealthError;
use crate::links::Family;

/// PACKET_IGNORE_OUTGOING of linux/if_packet.h (kernel 4.20).
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;

/// Bytes of the receive queue: a few hundred probes. A longer queue would only hold older ones.
const QUEUE: libc::c_int = 256 * 1024;

#[derive(Debug)]
pub(super) struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Opens one in the network namespace of the calling thread.
    pub(super) fn open(index: u32, interface: &str, family: Family) -> Result<Self, HealthError> {
        let failed = |action| HealthError::Socket {
            action,
            interface: interface.to_owned(),
            source: io::Error::last_os_error(),
        };
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: takes numbers. Protocol 0 receives nothing before it is bound.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(failed("open"));
        }
        // SAFETY: just opened, and owned by nothing else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        set(&fd, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1).ok_or_else(|| failed("set up"))?;
        set(&fd, libc::SOL_SOCKET, libc::SO_RCVBUF, QUEUE).ok_or_else(|| failed("set up"))?;

        // SAFETY: plain integers, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = match family {
            Family::V4 => libc::ETH_P_IP as u16,
            Family::V6 => libc::ETH_P_IPV6 as u16,
        }
        .to_be();
        address.sll_ifindex = index.cast_signed();
        // SAFETY: the address is valid for the call, with its length.
        let bound = unsafe {
            libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if bound < 0 {
            return Err(failed("bind"));
        }
        Ok(Self { fd })
    }

    /// Sends a frame.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: reads the frame, with its length.
        let sent = unsafe {
            libc::send(
                self.fd.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                libc::MSG_DONTWAIT,
            )
        };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Takes the next frame; false: there is none.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> bool {
        let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
        // SAFETY: writes at most as many bytes as the buffer has.
        let got = unsafe {
            libc::recv(
                self.fd.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                flags,
            )
        };
        // An error, such as that of a link that went down, occurs once and has no frame.
        got >= 0
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn set(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> Option<()> {
    // SAFETY: the value is an int, valid for the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    (result == 0).then_some(())
}
