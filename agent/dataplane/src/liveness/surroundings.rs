//! What the turns of sessions use: the sockets, the clock, the counters.

use std::sync::mpsc;

use nsm_core::link::Traffic;
use nsm_ebpf_common::sbfd::frame::Probe;
use tokio::sync::mpsc as tokio_mpsc;

use super::{Event, random::Jitter, request::Request, socket::PacketSocket};
use crate::{
    bpf::{CounterReader, Sessions, Slot, now as clock},
    links::Family,
};

/// The sockets, by family.
#[derive(Default)]
pub(super) struct Sockets {
    pub(super) v4: Option<PacketSocket>,
    pub(super) v6: Option<PacketSocket>,
}

impl Sockets {
    const fn of(&self, family: Family) -> Option<&PacketSocket> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &PacketSocket> {
        self.v4.iter().chain(&self.v6)
    }
}

/// What the turn of a session uses.
pub(super) struct Surroundings<'a> {
    pub(super) sessions: &'a dyn Sessions,
    pub(super) jitter: &'a mut Jitter,
    pub(super) events: &'a tokio_mpsc::UnboundedSender<Event>,
    pub(super) sockets: &'a Sockets,
    pub(super) counters: &'a CounterReader,
    /// Requests to the thread of the peers.
    pub(super) requests: &'a mpsc::Sender<Request>,
    /// Room for the largest frame.
    pub(super) frame: &'a mut [u8],
}

impl Surroundings<'_> {
    /// Sends a probe as a frame of so many bytes; whether the kernel accepted it.
    pub(super) fn send(&mut self, probe: &Probe, length: usize) -> bool {
        let family = if probe.is_v4() {
            Family::V4
        } else {
            Family::V6
        };
        let length = length.clamp(probe.min_length(), self.frame.len());
        let frame = &mut self.frame[..length];
        let Some(socket) = self.sockets.of(family) else {
            return false;
        };
        if probe.write(frame).is_err() {
            return false;
        }
        match socket.send(frame) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, "a probe was refused");
                false
            }
        }
    }

    /// The underlay's counts.
    pub(super) fn underlay(&self, slot: Slot) -> Option<Traffic> {
        self.counters.read(slot).ok()
    }
}

/// The clock of the stamps.
pub(super) fn now_ns() -> u64 {
    clock().as_nanos()
}
