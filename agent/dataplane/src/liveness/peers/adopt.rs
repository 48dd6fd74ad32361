//! Sessions of an earlier agent in the sessions' memory.

use std::{
    collections::{BTreeMap, HashSet},
    time::Instant,
};

use nsm_ebpf_common::{
    management::MAX_SESSIONS,
    sbfd::frame::{SPEAKER, mac, session_key},
};

use super::{super::session::peer_address, HealthConfig, HealthError, Orphan};
use crate::bpf::Sessions;

/// The sessions that an earlier agent left. Incomplete ones are cleared: an agent may end between any two steps.
///
/// The index has a session under the Ethernet address of its path, and under that of its node (tag [`SPEAKER`]) where the path is the
/// node's answer path; often they are the same. Two sessions of one address are two peers; that of a peer that has restarted ends with
/// the grace for connections that come back.
pub(super) fn adopt(
    config: &HealthConfig,
    sessions: &mut dyn Sessions,
) -> Result<Vec<Orphan>, HealthError> {
    let expires = Instant::now() + config.orphan_grace;
    let mut orphans: BTreeMap<u32, Orphan> = BTreeMap::new();
    let indexed = sessions.indexed()?;
    let mut whole = HashSet::new();
    for (key, slot) in indexed
        .iter()
        .copied()
        .filter(|(_, slot)| *slot < MAX_SESSIONS)
    {
        let session = sessions.slot(slot);
        let discriminator = session.peer_discriminator.load() as u32;
        let [_, _, mac @ ..] = key.to_be_bytes();
        let [_, tag, ..] = mac;
        let address = peer_address(session);
        let is_whole = discriminator != 0
            && session_key(address.is_ipv4(), self::mac(tag, discriminator)) == key;
        if !is_whole {
            continue;
        }
        whole.insert(key);
        let orphan = orphans.entry(slot).or_insert(Orphan {
            address,
            discriminator,
            at: None,
            slot,
            mac,
            is_answer_path: false,
            expires,
        });
        if tag == SPEAKER {
            orphan.is_answer_path = true;
        } else {
            orphan.mac = mac;
        }
    }
    for (key, _) in indexed {
        if !whole.contains(&key) {
            sessions.forget(key)?;
        }
    }
    for slot in (0..MAX_SESSIONS).filter(|slot| !orphans.contains_key(slot)) {
        let session = sessions.slot(slot);
        if session.peer_discriminator.load() != 0 {
            session.clear();
        }
    }
    Ok(orphans.into_values().collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nsm_core::{liveness::sbfd::Timing, net::Vni};
    use nsm_ebpf_common::management::words;

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

    fn fill(sessions: &LocalSessions, slot: u32, peer: &str, discriminator: u32) {
        let session = sessions.slot(slot);
        let [high, low] = words(&address(peer.parse().expect("an address")));
        session.peer_address[0].store(high);
        session.peer_address[1].store(low);
        session.peer_discriminator.store(discriminator.into());
    }

    #[test]
    fn of_an_earlier_agent_only_whole_sessions_are_left() {
        let mut sessions = LocalSessions::new();
        let key = |discriminator| session_key(true, mac(SPEAKER, discriminator));
        let tagged = session_key(true, mac(SPEAKER + 1, 5));
        let six = session_key(false, mac(SPEAKER, 5));
        let mut index = |key, slot| sessions.index(key, slot).expect("indexed");
        index(key(1), 1);
        // The address of another session, an empty slot, a slot out of range, another link.
        index(key(2), 2);
        index(key(3), 3);
        index(key(4), MAX_SESSIONS);
        index(session_key(false, mac(SPEAKER, 8)), 8);
        // One node on three paths, of which the second is its answer path; and another node behind the first address.
        index(tagged, 5);
        index(key(5), 6);
        index(session_key(true, mac(SPEAKER + 2, 5)), 6);
        index(six, 9);
        index(key(10), 10);
        fill(&sessions, 1, "192.0.2.1", 1);
        fill(&sessions, 2, "192.0.2.2", 20);
        fill(&sessions, 5, "192.0.2.5", 5);
        fill(&sessions, 6, "192.0.2.6", 5);
        fill(&sessions, 8, "192.0.2.8", 8);
        fill(&sessions, 9, "2001:db8::5", 5);
        fill(&sessions, 10, "192.0.2.5", 10);
        // Not in the index.
        fill(&sessions, 7, "192.0.2.7", 7);

        let orphans = adopt(&config(), &mut sessions).expect("adopted");
        let found: Vec<_> = orphans
            .iter()
            .map(|it| {
                (
                    it.slot,
                    it.address.to_string(),
                    it.mac[1] - SPEAKER,
                    it.is_answer_path,
                )
            })
            .collect();
        let way = |slot, address: &str, tag, is_answer_path| {
            (slot, address.to_owned(), tag, is_answer_path)
        };
        assert_eq!(
            found,
            [
                way(1, "192.0.2.1", 0, true),
                way(5, "192.0.2.5", 1, false),
                way(6, "192.0.2.6", 2, true),
                way(9, "2001:db8::5", 0, true),
                way(10, "192.0.2.5", 0, true),
            ]
        );
        let mut left: Vec<_> = sessions.indexed().expect("index");
        left.sort_unstable_by_key(|(key, slot)| (*slot, *key));
        let slots: Vec<_> = left.iter().map(|(_, slot)| *slot).collect();
        assert_eq!(slots, [1, 5, 6, 6, 9, 10]);
        let taken: Vec<_> = (0..MAX_SESSIONS)
            .filter(|slot| sessions.slot(*slot).peer_discriminator.load() != 0)
            .collect();
        assert_eq!(taken, [1, 5, 6, 9, 10]);
    }
}
