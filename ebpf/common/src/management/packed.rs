//! What is known of a packet of the peer, packed into one number: a [`crate::Shared`] holds 64 bits.

use super::AHEAD;
use crate::sbfd::{Control, Flags, SEQUENCE_MASK, State};

/// State, diagnostic, flags and pace of a Control packet in one number; never 0, so that 0 is "nothing heard".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    /// The sender's state.
    pub state: State,
    /// Its diagnostic.
    pub diagnostic: u8,
    /// C: it goes on when its control plane does not.
    pub control_plane_independent: bool,
    /// How far apart it wants packets to be (*Required Min RX Interval*), microseconds.
    pub required_min_rx_us: u32,
}

impl Said {
    const SET: u64 = 1 << 24;

    #[inline(always)]
    pub(super) fn pack(control: &Control) -> u64 {
        (control.required_min_rx_us as u64) << 32
            | Self::SET
            | (control.state.bits() as u64) << 16
            | (control.flags.bits() as u64) << 8
            | control.diagnostic as u64
    }

    /// From the number; `None` of 0.
    #[must_use]
    pub fn unpack(packed: u64) -> Option<Self> {
        let c = u64::from(Flags::CONTROL_PLANE_INDEPENDENT.bits()) << 8;
        (packed & Self::SET != 0).then(|| Self {
            state: State::from_bits((packed >> 16) as u8),
            diagnostic: packed as u8,
            control_plane_independent: packed & c != 0,
            required_min_rx_us: (packed >> 32) as u32,
        })
    }
}

/// Which probe of the peer: its session, its number there, and the number of steps by which that session advanced to it; packed into
/// one number. 0 is none.
#[derive(Clone, Copy)]
pub(super) struct Numbered(pub(super) u64);

impl Numbered {
    const RUN: u32 = 16;

    #[inline(always)]
    pub(super) fn of(control: &Control) -> Self {
        // No session has the discriminator 0.
        Self((control.my_discriminator as u64) << 32 | control.sequence() as u64)
    }

    #[inline(always)]
    pub(super) fn is_of_session(self, other: Self) -> bool {
        self.0 >> 32 == other.0 >> 32
    }

    /// Whether this is a later probe of the same session, with no more between than may have been lost.
    #[inline(always)]
    pub(super) fn follows(self, earlier: Self) -> bool {
        let ahead = self.ahead_of(earlier);
        self.is_of_session(earlier) && ahead != 0 && ahead <= AHEAD as u64
    }

    /// Whether this was there when `later` came, as far as can be told: the same probe, or one shortly before.
    #[inline(always)]
    pub(super) fn is_covered_by(self, later: Self) -> bool {
        self.is_of_session(later) && later.ahead_of(self) <= AHEAD as u64
    }

    #[inline(always)]
    pub(super) fn ahead_of(self, earlier: Self) -> u64 {
        self.0.wrapping_sub(earlier.0) & SEQUENCE_MASK as u64
    }

    #[inline(always)]
    pub(super) fn run(self) -> u64 {
        self.0 >> Self::RUN & 0xff
    }

    #[inline(always)]
    pub(super) fn with_run(self, run: u64) -> Self {
        Self(self.0 | (run & 0xff) << Self::RUN)
    }
}
