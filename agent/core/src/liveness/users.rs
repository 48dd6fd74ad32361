//! The users of a path: which connections take it, what they brought, and how the path was judged last.

use std::{collections::HashMap, net::IpAddr};

use super::{Evidence, Health, PeerReport, ReceivedReport, Verdict, judge};
use crate::clock::Monotonic;

/// The least that every IPv4 path is taken to carry (RFC 1122 section 3.3.2), bytes.
const SMALLEST_V4: u16 = 576;

/// The least that every IPv6 path carries (RFC 8200 section 5), bytes.
const SMALLEST_V6: u16 = 1280;

/// The sizes of inner IP packets between which the path MTU is searched, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MtuRange {
    /// Assumed without proof.
    pub smallest: u16,
    /// Wanted by the user that joined last.
    pub wanted: u16,
}

/// The connections that use one path, and the health of the path.
///
/// A connection is named by its id. A path without users needs no session.
#[derive(Debug, Default)]
pub struct PathUsers {
    /// The MTU that was wanted last.
    mtu: u32,
    /// Each with the report of the peer's agent that it brought.
    reports: HashMap<String, Option<ReceivedReport>>,
    known: Option<Health>,
}

impl PathUsers {
    /// Adds a connection, which would like to have this MTU on its path to `peer`; idempotent. The result is the range of a new search
    /// of the path MTU: `None` where the last one wanted the same.
    pub fn join(&mut self, user: &str, peer: IpAddr, mtu: u32) -> Option<MtuRange> {
        self.reports.entry(user.to_owned()).or_default();
        if self.mtu == mtu {
            return None;
        }
        self.mtu = mtu;
        Some(MtuRange {
            smallest: match peer {
                IpAddr::V4(_) => SMALLEST_V4,
                IpAddr::V6(_) => SMALLEST_V6,
            },
            wanted: u16::try_from(mtu).unwrap_or(u16::MAX),
        })
    }

    /// Removes a connection with its report; whether none is left.
    pub fn leave(&mut self, user: &str) -> bool {
        self.reports.remove(user);
        self.reports.is_empty()
    }

    /// Takes the report of the peer's agent that a connection brought at `now`; `None` withdraws it. It is used by the next
    /// [`Self::judge`]. The report of a connection that does not use the path is ignored.
    pub fn set_report(&mut self, user: &str, report: Option<PeerReport>, now: Monotonic) {
        if let Some(known) = self.reports.get_mut(user) {
            *known = report.map(|report| ReceivedReport { report, at: now });
        }
    }

    /// Judges the evidence together with the last report of the peer's agent. The result is the health where that differs from the one
    /// before in more than measured numbers.
    pub fn judge(&mut self, evidence: Evidence) -> Option<Health> {
        let reports = self.reports.values().copied().flatten();
        let health = judge(&Evidence {
            peer_report: reports.max_by_key(|report| report.at),
            ..evidence
        });
        let before = self.known.replace(health);
        let is_same = before.is_some_and(|before| before.is_same(&health));
        (!is_same).then_some(health)
    }

    /// The health as it was judged last.
    #[must_use]
    pub const fn health(&self) -> Option<Health> {
        self.known
    }

    /// Whether the path was judged up.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.known
            .is_some_and(|health| health.verdict() == Verdict::Up)
    }
}
