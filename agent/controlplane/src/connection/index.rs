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
use nsm_proto::connection::{MonitorScopeSelector, PathSegment};
use slab::Slab;

use crate::connection::model::Established;

/// The id of our segment, by which a connection is stored.
pub(crate) type ConnectionId = Arc<str>;

/// A connection in the indexes. Each has some ten entries: with its id in them they would take three times the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Number(u32);

/// Connections by one kind of key: pairs in order, so that the connections of a key lie together.
#[derive(Debug)]
struct Index<K>(BTreeSet<(K, Number)>);

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<K: Ord + Copy> Index<K> {
    fn get(&self, key: K) -> impl Iterator<Item = Number> {
        let all = (key, Number(0))..=(key, Number(u32::MAX));
        self.0.range(all).map(|(_, number)| *number)
    }

    fn replace(&mut self, number: Number, old: &[K], new: &[K]) {
        if old == new {
            return;
        }
        for key in old.iter().filter(|key| !new.contains(key)) {
            self.0.remove(&(*key, number));
        }
        for key in new.iter().filter(|key| !old.contains(key)) {
            self.0.insert((*key, number));
        }
    }
}

/// The indexes of the established connections.
#[derive(Debug, Default)]
pub(super) struct Indexes {
    ids: Slab<ConnectionId>,
    by_path: Index<PathId>,
    by_remote: Index<IpAddr>,
    /// By hashes of the ids of segments, an entry of 8 bytes each. Two ids with one hash cost a comparison.
    by_segment_id: Index<u32>,
    /// By hashes of the names of segments.
    by_segment_name: Index<u32>,
    hasher: RandomState,
}

impl Indexes {
    /// The connection `id` was `old` and is `new` from now on. It has a `number` as long as there is one.
    pub(super) fn replace(
        &mut self,
        id: &ConnectionId,
        number: &mut Option<Number>,
        old: Option<&Established>,
        new: Option<&Established>,
    ) {
        let at = *number.get_or_insert_with(|| self.number(id));
        let watched = |it: Option<&Established>| it.and_then(|it| it.path.watched);
        self.by_path
            .replace(at, watched(old).as_slice(), watched(new).as_slice());
        let remote = |it: Option<&Established>| Some(it?.remote()?.0);
        self.by_remote
            .replace(at, remote(old).as_slice(), remote(new).as_slice());
        self.replace_segments(at, segments(old), segments(new));
        if new.is_none() {
            self.ids.remove(at.0 as usize);
            *number = None;
        }
    }

    fn replace_segments(&mut self, at: Number, old: &[PathSegment], new: &[PathSegment]) {
        // Most changes are of a path's state.
        let is_same =
            |(it, other): (&PathSegment, &PathSegment)| it.id == other.id && it.name == other.name;
        if old.len() == new.len() && old.iter().zip(new).all(is_same) {
            return;
        }
        let ids = [old, new].map(|it| self.keys(it, |segment| &segment.id));
        self.by_segment_id.replace(at, &ids[0], &ids[1]);
        let names = [old, new].map(|it| self.keys(it, |segment| &segment.name));
        self.by_segment_name.replace(at, &names[0], &names[1]);
    }

    fn number(&mut self, id: &ConnectionId) -> Number {
        let number = self.ids.insert(Arc::clone(id));
        Number(
            number
                .try_into()
                .expect("there are fewer connections than 32 bits count"),
        )
    }

    /// Those for which `path` is watched.
    pub(super) fn on_path(&self, path: PathId) -> Vec<ConnectionId> {
        self.ids_of(self.by_path.get(path))
    }

    /// Those whose tunnel ends at `remote`.
    pub(super) fn to(&self, remote: IpAddr) -> Vec<ConnectionId> {
        self.ids_of(self.by_remote.get(remote))
    }

    /// Those that a selector may mean, some that it does not mean among them; none: it names no segment and means any.
    pub(super) fn candidates(&self, selector: &MonitorScopeSelector) -> Option<Vec<ConnectionId>> {
        let segments = &selector.path_segments;
        // An id belongs to one connection, a name to all that go through a hop.
        if let Some(of) = segments.iter().find(|segment| !segment.id.is_empty()) {
            return Some(self.ids_of(self.by_segment_id.get(self.key(&of.id))));
        }
        let of = segments.iter().find(|segment| !segment.name.is_empty())?;
        Some(self.ids_of(self.by_segment_name.get(self.key(&of.name))))
    }

    fn ids_of(&self, numbers: impl Iterator<Item = Number>) -> Vec<ConnectionId> {
        let ids = numbers.filter_map(|number| self.ids.get(number.0 as usize));
        ids.cloned().collect()
    }

    fn keys(&self, segments: &[PathSegment], text: fn(&PathSegment) -> &str) -> Vec<u32> {
        let texts = segments.iter().map(text).filter(|text| !text.is_empty());
        texts.map(|text| self.key(text)).collect()
    }

    fn key(&self, text: &str) -> u32 {
        self.hasher.hash_one(text) as u32
    }
}

fn segments(established: Option<&Established>) -> &[PathSegment] {
    let path = established.and_then(|it| it.view.path.as_ref());
    path.map_or(&[], |path| &path.path_segments)
}

#[cfg(test)]
mod tests;
