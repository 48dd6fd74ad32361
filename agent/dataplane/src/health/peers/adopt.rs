//! What an earlier agent left in the sessions' memory.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use nsm_ebpf_common::{
    management::MAX_SESSIONS,
    sbfd::frame::{mac, mac_key},
};

use super::{super::session::peer_address, HealthConfig, HealthError, Known};
use crate::bpf::Sessions;

/// The sessions that an earlier agent left. What is not whole is cleared: an agent may end between any two steps.
pub(super) fn adopt(
    config: &HealthConfig,
    sessions: &mut dyn Sessions,
) -> Result<HashMap<IpAddr, Known>, HealthError> {
    let mut known: HashMap<IpAddr, Known> = HashMap::new();
    let mut used = HashSet::new();
    let expires = Some(Instant::now() + config.orphan_grace);
    let mut indexed = sessions.indexed()?;
    // Of two for one address, the peer is the one that was heard last: the other was about to be forgotten.
    indexed.retain(|(_, slot)| *slot < MAX_SESSIONS);
    indexed.sort_by_key(|(_, slot)| Reverse(sessions.slot(*slot).last_probe_ns.load()));
    let mut whole = HashSet::new();
    for (key, slot) in indexed {
        let session = sessions.slot(slot);
        let discriminator = session.peer_discriminator.load() as u32;
        let [_, _, mac @ ..] = key.to_be_bytes();
        let address = peer_address(session);
        let is_whole = discriminator != 0
            && mac_key(self::mac(mac[1], discriminator)) == key
            && !used.contains(&slot)
            && !known.contains_key(&address);
        if is_whole {
            used.insert(slot);
            whole.insert(key);
            known.insert(
                address,
                Known {
                    spec: None,
                    discriminator,
                    mac,
                    users: 0,
                    expires,
                    cell: Arc::default(),
                },
            );
        }
    }
    for (key, _) in sessions.indexed()? {
        if !whole.contains(&key) {
            sessions.forget(key)?;
        }
    }
    for slot in (0..MAX_SESSIONS).filter(|slot| !used.contains(slot)) {
        let session = sessions.slot(slot);
        if session.peer_discriminator.load() != 0 {
            session.clear();
        }
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nsm_core::{sbfd::Timing, vni::Vni};
    use nsm_ebpf_common::{management::words, sbfd::frame::SPEAKER};

    use super::*;
    use crate::bpf::{LocalSessions, address};

    fn config() -> HealthConfig {
        HealthConfig {
            domain: "test.example".to_owned(),
            vni: Vni::MANAGEMENT,
            port: 4789,
            local: None,
            timing: Timing::default(),
            namespace: None,
            orphan_grace: Duration::from_secs(60),
        }
    }

    fn fill(sessions: &LocalSessions, slot: u32, peer: &str, discriminator: u32, heard: u64) {
        let session = sessions.slot(slot);
        let [high, low] = words(&address(peer.parse().expect("an address")));
        session.peer_address[0].store(high);
        session.peer_address[1].store(low);
        session.peer_discriminator.store(discriminator.into());
        session.last_probe_ns.store(heard);
    }

    #[test]
    fn of_an_earlier_agent_only_whole_sessions_are_left() {
        let mut sessions = LocalSessions::new();
        let key = |discriminator| mac_key(mac(SPEAKER, discriminator));
        let mut index = |key, slot| sessions.index(key, slot).expect("indexed");
        index(key(1), 1);
        // Another's address, an empty slot, a slot that is none.
        index(key(2), 2);
        index(key(3), 3);
        index(key(4), MAX_SESSIONS);
        // One peer before and after it started anew.
        index(key(5), 5);
        index(key(6), 6);
        fill(&sessions, 1, "192.0.2.1", 1, 0);
        fill(&sessions, 2, "192.0.2.2", 20, 0);
        fill(&sessions, 5, "192.0.2.5", 5, 1_000);
        fill(&sessions, 6, "192.0.2.5", 6, 2_000);
        // Nothing leads there.
        fill(&sessions, 7, "192.0.2.7", 7, 0);

        let known = adopt(&config(), &mut sessions).expect("adopted");
        let mut found: Vec<_> = known
            .iter()
            .map(|(address, known)| (address.to_string(), known.discriminator))
            .collect();
        found.sort_unstable();
        assert_eq!(
            found,
            [("192.0.2.1".to_owned(), 1), ("192.0.2.5".to_owned(), 6)]
        );
        let mut left = sessions.indexed().expect("index");
        left.sort_unstable();
        assert_eq!(left, [(key(1), 1), (key(6), 6)]);
        let taken: Vec<_> = (0..MAX_SESSIONS)
            .filter(|slot| sessions.slot(*slot).peer_discriminator.load() != 0)
            .collect();
        assert_eq!(taken, [1, 6]);
    }
}
