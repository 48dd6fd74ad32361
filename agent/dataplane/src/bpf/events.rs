//! What the programs tell at once, through the ring buffer.

use std::{
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{MapData, RingBuf},
};
use nsm_ebpf_common::Reason;

use super::{BpfError, Slot, tables};

/// A packet of one of our VNIs that came from somebody else, and was dropped. Each CPU tells at most
/// [`nsm_ebpf_common::EVENTS_PER_WINDOW`] a second; the drop counters hold all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When, on CLOCK_MONOTONIC.
    pub time: Duration,
    /// Why it was dropped.
    pub reason: Reason,
    /// The VNI of the packet.
    pub vni: u32,
    /// The slot of a tunnel with that VNI.
    pub slot: Slot,
    /// Index of the interface it came in on.
    pub ifindex: u32,
    /// Where it came from.
    pub source: IpAddr,
    /// Where that tunnel's packets come from.
    pub expected: IpAddr,
}

/// The reader of events. Its descriptor is readable when there are some; [`Self::next`] never blocks.
pub struct Events {
    ring: RingBuf<MapData>,
}

impl Events {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, BpfError> {
        const MAP: &str = "EVENTS";
        let map = ebpf.take_map(MAP).ok_or(BpfError::NoSuchMap { map: MAP })?;
        let ring = RingBuf::try_from(map).map_err(|source| BpfError::Map {
            map: MAP,
            action: "open",
            source,
        })?;
        Ok(Self { ring })
    }

    /// The next event, if there is one now. Records of another layout or of an unknown reason are skipped.
    #[expect(
        clippy::should_implement_trait,
        reason = "more events may come after a None"
    )]
    pub fn next(&mut self) -> Option<Event> {
        loop {
            let record = self.ring.next()?;
            if let Some(event) = parse(&record) {
                return Some(event);
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

fn parse(record: &[u8]) -> Option<Event> {
    if record.len() != size_of::<nsm_ebpf_common::Event>() {
        return None;
    }
    // SAFETY: as long as the type, which is plain integers and arrays: every bit pattern is valid. Read unaligned.
    let raw = unsafe {
        record
            .as_ptr()
            .cast::<nsm_ebpf_common::Event>()
            .read_unaligned()
    };
    Some(Event {
        time: Duration::from_nanos(raw.time_ns),
        reason: Reason::from_number(raw.reason)?,
        vni: raw.vni,
        slot: Slot(raw.slot),
        ifindex: raw.ifindex,
        source: tables::ip_addr(raw.source),
        expected: tables::ip_addr(raw.expected),
    })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn records_that_are_no_events_are_skipped() {
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&[0; 55]), None);
        assert_eq!(
            parse(&[0xff; size_of::<nsm_ebpf_common::Event>()]),
            None,
            "unknown reason"
        );
        assert!(parse(&[0; size_of::<nsm_ebpf_common::Event>()]).is_some());
    }
}
