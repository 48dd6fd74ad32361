//! Which connections an event concerns, so that it touches those and scans nothing.
//!
//! Connections are found by the path that is watched for them, by the other end of their tunnel, and by the segments of their NSM path.
//! By next hop they are found at the peer itself ([`crate::peer::peers::Peer`]).

use std::{
    collections::BTreeSet,
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    sync::Arc,
};

use nsm_core::liveness::PathId;
use nsm_proto::connection::{Connection, MonitorScopeSelector};

use crate::connection::model::Established;

/// The id of our segment, by which a connection is stored.
pub(crate) type ConnectionId = Arc<str>;

/// Connections by one kind of key: pairs in order, so that the connections of a key lie together.
#[derive(Debug)]
struct Index<K>(BTreeSet<(K, ConnectionId)>);

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<K: Ord + Copy> Index<K> {
    fn get(&self, key: K) -> Vec<ConnectionId> {
        let first = (key, ConnectionId::from(""));
        self.0
            .range(first..)
            .take_while(|(of, _)| *of == key)
            .map(|(_, id)| Arc::clone(id))
            .collect()
    }

    fn replace(&mut self, id: &ConnectionId, old: &[K], new: &[K]) {
        if old == new {
            return;
        }
        for key in old.iter().filter(|key| !new.contains(key)) {
            self.0.remove(&(*key, Arc::clone(id)));
        }
        for key in new.iter().filter(|key| !old.contains(key)) {
            self.0.insert((*key, Arc::clone(id)));
        }
    }
}

/// The indexes of the established connections.
#[derive(Debug, Default)]
pub(super) struct Indexes {
    by_path: Index<PathId>,
    by_remote: Index<IpAddr>,
    /// By hashes of segment ids and names: an entry costs its connection 24 bytes. Two texts with one hash cost a comparison.
    by_segment: Index<u64>,
    hasher: RandomState,
}

impl Indexes {
    /// The connection `id` was `old` and is `new` from now on.
    pub(super) fn replace(
        &mut self,
        id: &ConnectionId,
        old: Option<&Established>,
        new: Option<&Established>,
    ) {
        let watched = |it: Option<&Established>| it.and_then(|it| it.path.watched);
        self.by_path
            .replace(id, watched(old).as_slice(), watched(new).as_slice());
        let remote = |it: Option<&Established>| Some(it?.remote()?.0);
        self.by_remote
            .replace(id, remote(old).as_slice(), remote(new).as_slice());
        let segments = |it: Option<&Established>| match it {
            Some(it) => self.segment_keys(&it.view),
            None => Vec::new(),
        };
        let (old, new) = (segments(old), segments(new));
        self.by_segment.replace(id, &old, &new);
    }

    /// Those for which `path` is watched.
    pub(super) fn on_path(&self, path: PathId) -> Vec<ConnectionId> {
        self.by_path.get(path)
    }

    /// Those whose tunnel ends at `remote`.
    pub(super) fn to(&self, remote: IpAddr) -> Vec<ConnectionId> {
        self.by_remote.get(remote)
    }

    /// Those that a selector may mean, some that it does not mean among them; none: it names no segment and means any.
    pub(super) fn candidates(&self, selector: &MonitorScopeSelector) -> Option<Vec<ConnectionId>> {
        let segments = selector.path_segments.iter();
        // An id belongs to one connection, a name to all that go through a hop.
        let ids = segments.clone().map(|segment| (Part::Id, &segment.id));
        let names = segments.map(|segment| (Part::Name, &segment.name));
        let (part, text) = ids.chain(names).find(|(_, text)| !text.is_empty())?;
        Some(self.by_segment.get(self.segment_key(part, text)))
    }

    fn segment_keys(&self, view: &Connection) -> Vec<u64> {
        view.path
            .iter()
            .flat_map(|path| &path.path_segments)
            .flat_map(|segment| [(Part::Id, &segment.id), (Part::Name, &segment.name)])
            .filter(|(_, text)| !text.is_empty())
            .map(|(part, text)| self.segment_key(part, text))
            .collect()
    }

    fn segment_key(&self, part: Part, text: &str) -> u64 {
        self.hasher.hash_one((part, text))
    }
}

/// What of a segment is meant.
#[derive(Debug, Clone, Copy, Hash)]
enum Part {
    Id,
    Name,
}

#[cfg(test)]
mod tests;
