//! What the underlay is towards each peer, as it was read last.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use nsm_controlplane::ports::Underlay;

/// How long it is taken to be as it was read. A Request reads it twice, and each time two threads wake up for it. A change that is
/// missed meanwhile is found at the next refresh, and its effect on the path's MTU by the probes.
const FRESH: Duration = Duration::from_millis(500);

/// The underlay towards remote addresses; `None` stands for a remote that is not known yet.
#[derive(Debug, Default)]
pub(super) struct Underlays(Mutex<HashMap<Option<IpAddr>, (Instant, Underlay)>>);

impl Underlays {
    /// As it was read a moment ago, if it was.
    pub(super) fn get(&self, remote: Option<IpAddr>, now: Instant) -> Option<Underlay> {
        let underlays = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (read, underlay) = underlays.get(&remote)?;
        (now.duration_since(*read) < FRESH).then_some(*underlay)
    }

    /// Keeps what was read, and drops what is old: remote addresses are the peers' to choose.
    pub(super) fn keep(&self, remote: Option<IpAddr>, underlay: Underlay, now: Instant) {
        let mut underlays = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        underlays.retain(|_, (read, _)| now.duration_since(*read) < FRESH);
        underlays.insert(remote, (now, underlay));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_old_is_given_or_kept() {
        let underlays = Underlays::default();
        let underlay = Underlay {
            ip: IpAddr::from([192, 0, 2, 1]),
            port: 4789,
            mtu: 1500,
        };
        let (start, peer) = (Instant::now(), Some(IpAddr::from([192, 0, 2, 2])));
        underlays.keep(peer, underlay, start);
        let read = |after| {
            underlays
                .get(peer, start + after)
                .map(|underlay| underlay.mtu)
        };
        assert_eq!(read(FRESH / 2), Some(1500));
        assert_eq!(read(FRESH), None);
        assert!(underlays.get(None, start).is_none());
        underlays.keep(None, underlay, start + FRESH);
        assert_eq!(underlays.0.lock().unwrap().len(), 1);
    }
}
