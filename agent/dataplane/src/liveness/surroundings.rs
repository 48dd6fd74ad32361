//! What the turns of sessions use: their memory, the sockets, the clock, and, without BPF, the reflector.

use std::{
    collections::BTreeMap,
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
};

use nsm_core::link::Traffic;
use nsm_ebpf_common::{
    Reason,
    management::{self, Verdict},
    sbfd::{
        Flags,
        frame::{self, HEAD_V4, HEAD_V6, Probe},
    },
};
use tokio::sync::mpsc as tokio_mpsc;

use super::{Event, Plane, random::Jitter, request::Request, socket::PacketSocket};
use crate::{
    bpf::{CounterReader, LocalSessions, PinnedSessions, Sessions, Slot, now as clock},
    links::Family,
};

/// The memory of the sessions: in pinned maps, or of this process.
pub(super) enum Memory {
    Pinned(Box<PinnedSessions>),
    Local(LocalSessions),
}

impl Memory {
    pub(super) fn sessions(&self) -> &dyn Sessions {
        match self {
            Self::Pinned(sessions) => &**sessions,
            Self::Local(sessions) => sessions,
        }
    }

    pub(super) fn sessions_mut(&mut self) -> &mut dyn Sessions {
        match self {
            Self::Pinned(sessions) => &mut **sessions,
            Self::Local(sessions) => sessions,
        }
    }

    pub(super) const fn plane(&self) -> Plane {
        match self {
            Self::Pinned(_) => Plane::Bpf,
            Self::Local(_) => Plane::UserSpace,
        }
    }
}

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
    pub(super) counters: Option<&'a CounterReader>,
    /// Requests to the thread of the peers.
    pub(super) requests: &'a mpsc::Sender<Request>,
    /// Room for the largest frame.
    pub(super) frame: &'a mut [u8],
    pub(super) plane: Plane,
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
        let now_ns = now_ns();
        match socket.send(frame) {
            Ok(()) => {
                if self.plane == Plane::UserSpace {
                    let packet = parse(frame);
                    management::egress(packet.as_ref(), now_ns, self.sessions);
                }
                true
            }
            Err(error) => {
                tracing::debug!(%error, "a probe was refused");
                false
            }
        }
    }

    /// The underlay's counts.
    pub(super) fn underlay(&self, slot: Slot) -> Option<Traffic> {
        self.counters?.read(slot).ok()
    }
}

/// Packets that this process dropped, by the number of the reason.
#[derive(Debug, Default)]
pub(super) struct Drops([AtomicU64; Reason::ALL.len()]);

impl Drops {
    fn count(&self, reason: Reason) {
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn by_name(&self) -> BTreeMap<&'static str, u64> {
        Reason::ALL
            .iter()
            .map(|reason| {
                (
                    reason.name(),
                    self.0[*reason as usize].load(Ordering::Relaxed),
                )
            })
            .collect()
    }
}

/// Does in user space what the programs do at the hooks.
pub(super) fn serve(
    frame: &mut [u8],
    sessions: &dyn Sessions,
    socket: &PacketSocket,
    drops: &Drops,
) {
    let packet = parse(frame);
    let length = frame.len() as u32;
    // These answers come from the agent and end with it: no C.
    let verdict = management::ingress(
        packet.as_ref(),
        length,
        Flags::default(),
        now_ns(),
        sessions,
    );
    match (verdict, packet) {
        (Ok(Verdict::Reflect { reflector, is_new }), Some(packet)) => {
            if !is_new {
                drops.count(Reason::SbfdReplayed);
            }
            if let Some(head) = frame.first_chunk_mut::<HEAD_V4>()
                && is_v4(head)
            {
                frame::reflect(head, &packet.control, reflector);
            } else if let Some(head) = frame.first_chunk_mut::<HEAD_V6>() {
                frame::reflect(head, &packet.control, reflector);
            }
            if let Err(error) = socket.send(frame) {
                tracing::debug!(%error, "an answer was refused");
            }
        }
        (Ok(_), _) => {}
        (Err(reason), _) => {
            drops.count(reason);
        }
    }
}

fn is_v4(head: &[u8; HEAD_V4]) -> bool {
    [head[12], head[13]] == frame::ETHERTYPE_IPV4.to_be_bytes()
}

fn parse(frame: &[u8]) -> Option<frame::Packet> {
    let length = u32::try_from(frame.len()).ok()?;
    match frame.first_chunk::<HEAD_V4>() {
        Some(head) if is_v4(head) => frame::parse(head, length),
        _ => frame::parse(frame.first_chunk::<HEAD_V6>()?, length),
    }
}

/// The clock of the stamps.
pub(super) fn now_ns() -> u64 {
    clock().as_nanos()
}
