//! The path of a connection: one segment for each hop from the client to the endpoint.
//!
//! On the way down each server finds `index` at its predecessor's segment, checks that this segment is the sender's (its id is the
//! connection's id), moves the index to its own segment and goes on under its own id. On the way up it moves the index back. A hop
//! that is met again, because the Request is a refresh, keeps its id: the id is what makes the Request a refresh.
//!
//! Segments below ours are kept as they came, even when ours is new. NSM does so, and it matters when a client heals over another
//! forwarder: the endpoint then finds its connection, refreshes it, and keeps its addresses. Names and ids below are claims of the sender
//! and nothing else; each hop below checks its own.

use std::{collections::BTreeMap, time::SystemTime};

/// The most segments that a path may have. NSM's interdomain path has eight; the bound ends a loop between proxies.
pub const MAX_SEGMENTS: usize = 64;

/// One hop of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segment {
    /// The hop's name.
    pub name: String,
    /// The connection's id at this hop.
    pub id: String,
    /// The hop's token for the next one (a JWT).
    pub token: String,
    /// When the token, and with it the connection at this hop, expires.
    pub expires: Option<SystemTime>,
    /// Counters that the hop publishes.
    pub metrics: BTreeMap<String, String>,
}

/// The hops of a connection, and the sender among them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Path {
    /// The index of the sender's segment.
    pub index: u32,
    /// The hops, the client first.
    pub segments: Vec<Segment>,
}

/// Our place on a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// Our segment.
    pub index: u32,
    /// The connection's id at this hop.
    pub id: String,
    /// The sender's segment; none at the hop that began the path.
    pub previous: Option<u32>,
    /// The path named us already: the Request is a refresh.
    pub known: bool,
}

/// What is wrong with a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The connection has no id.
    #[error("connection.id is empty: send the id of the path segment at path.index")]
    NoConnectionId,
    /// There is no path, or one without segments.
    #[error(
        "connection {connection_id} has no path segments: send a path with the sender's segment (name, id = connection.id, token, expires) and its index"
    )]
    Empty {
        /// The connection's id.
        connection_id: String,
    },
    /// The index points behind the last segment.
    #[error("path.index {index} is out of range: the path has {len} segments")]
    IndexOutOfRange {
        /// The index as sent.
        index: u32,
        /// How many segments there are.
        len: usize,
    },
    /// The sender's segment is another connection's.
    #[error(
        "connection.id {connection_id} differs from the id {segment_id} of its path segment {index} ({name}): they must be equal"
    )]
    IdMismatch {
        /// The connection's id.
        connection_id: String,
        /// The id in the sender's segment.
        segment_id: String,
        /// Where the sender's segment is.
        index: u32,
        /// The sender's name.
        name: String,
    },
    /// The sender's segment has no expiry.
    #[error(
        "expiration for the previous path segment cannot be nil: segment {index} ({name}) has no expires; send it, or the metadata nsm-client-token-expires"
    )]
    NoExpiry {
        /// Where the sender's segment is.
        index: u32,
        /// The sender's name.
        name: String,
    },
    /// More hops than any real path has.
    #[error(
        "the path has {0} segments, at most {MAX_SEGMENTS} are allowed: look for proxies that send to each other in a circle"
    )]
    TooLong(usize),
    /// A reply came back with another index.
    #[error("the reply has path.index {got}, {sent} was sent")]
    ReplyIndex {
        /// The index that we sent.
        sent: u32,
        /// The index in the reply.
        got: u32,
    },
    /// A reply lost segments that we sent.
    #[error(
        "the reply has {got} path segments, at least the first {needed} that were sent must come back"
    )]
    ReplyTruncated {
        /// How many must come back.
        needed: usize,
        /// How many came.
        got: usize,
    },
    /// A reply renamed a hop above the one that answered.
    #[error("the reply names path segment {index} {got}, {sent} was sent")]
    ReplyName {
        /// Which segment.
        index: usize,
        /// The name that we sent.
        sent: String,
        /// The name in the reply.
        got: String,
    },
    /// A reply changed the id of a hop above the one that answered.
    #[error("the reply gives path segment {index} ({name}) the id {got}, {sent} was sent")]
    ReplyId {
        /// Which segment.
        index: usize,
        /// The segment's name.
        name: String,
        /// The id that we sent.
        sent: String,
        /// The id in the reply.
        got: String,
    },
}

impl Path {
    /// The path of a connection that begins here, and our place on it.
    #[must_use]
    pub fn begin(own_name: &str, id: String) -> (Self, Hop) {
        let segment = Segment {
            name: own_name.to_owned(),
            id: id.clone(),
            ..Segment::default()
        };
        (
            Self {
                index: 0,
                segments: vec![segment],
            },
            Hop {
                index: 0,
                id,
                previous: None,
                known: false,
            },
        )
    }

    /// A server's step on the way down: checks the sender's segment and moves on to our own, which is added where the path does not
    /// have it. A new segment gets its id from `new_id` and has neither token nor expiry yet.
    ///
    /// The sender's expiry is looked at here: put the token metadata of the call into the segment at `index` before.
    ///
    /// # Errors
    /// The path breaks one of the server's rules of NSM (`updatepath`); it is then unchanged.
    pub fn descend(
        &mut self,
        connection_id: &str,
        own_name: &str,
        new_id: impl FnOnce() -> String,
    ) -> Result<Hop, PathError> {
        let previous = self.index;
        let own = self.check_sender(connection_id)?;
        // In range: the sender's segment exists at `own - 1`.
        let known = self.knows(own_name);
        if !known {
            let segment = Segment {
                name: own_name.to_owned(),
                id: new_id(),
                ..Segment::default()
            };
            match self.segments.get_mut(own) {
                Some(other) => *other = segment,
                None => self.segments.push(segment),
            }
        }
        self.index = previous + 1;
        Ok(Hop {
            index: self.index,
            id: self.segments[own].id.clone(),
            previous: Some(previous),
            known,
        })
    }

    /// Checks what the sender sent; gives the place of our own segment, at most [`MAX_SEGMENTS`] − 1.
    fn check_sender(&self, connection_id: &str) -> Result<usize, PathError> {
        if connection_id.is_empty() {
            return Err(PathError::NoConnectionId);
        }
        if self.segments.is_empty() {
            return Err(PathError::Empty {
                connection_id: connection_id.to_owned(),
            });
        }
        let index = self.index;
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        let Some(sender) = self.segments.get(at) else {
            return Err(PathError::IndexOutOfRange {
                index,
                len: self.segments.len(),
            });
        };
        let own = at + 1;
        if self.segments.len().max(own + 1) > MAX_SEGMENTS {
            return Err(PathError::TooLong(self.segments.len().max(own + 1)));
        }
        if sender.id != connection_id {
            return Err(PathError::IdMismatch {
                connection_id: connection_id.to_owned(),
                segment_id: sender.id.clone(),
                index,
                name: sender.name.clone(),
            });
        }
        if sender.expires.is_none() {
            return Err(PathError::NoExpiry {
                index,
                name: sender.name.clone(),
            });
        }
        Ok(own)
    }

    /// Whether the segment after the sender's is of `own_name`, with an id: [`Path::descend`] then needs no new one.
    #[must_use]
    pub fn knows(&self, own_name: &str) -> bool {
        usize::try_from(self.index)
            .ok()
            .and_then(|sender| self.segments.get(sender.checked_add(1)?))
            .is_some_and(|segment| segment.name == own_name && !segment.id.is_empty())
    }

    /// A server's step on the way up: the index is the sender's again. The hop that began the path stays where it is.
    pub fn ascend(&mut self, hop: &Hop) {
        self.index = hop.previous.unwrap_or(hop.index);
    }

    /// The hops' names, the client's first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().map(|segment| segment.name.as_str())
    }
}

/// Checks what a downstream hop answered to `sent`: the index, names and ids down to our own segment are what we sent, for they are ours
/// and our senders' to give. The segments behind are the downstream's: more than before, or fewer where an endpoint trimmed the path.
/// The answer is its index, and the names and ids of its segments.
///
/// # Errors
/// One variant for each fault; the caller closes the connection downstream.
pub fn check_reply<'a>(
    sent: &Path,
    index: u32,
    segments: impl ExactSizeIterator<Item = (&'a str, &'a str)>,
) -> Result<(), PathError> {
    if index != sent.index {
        return Err(PathError::ReplyIndex {
            sent: sent.index,
            got: index,
        });
    }
    let count = segments.len();
    if count > MAX_SEGMENTS {
        return Err(PathError::TooLong(count));
    }
    let needed = usize::try_from(sent.index)
        .unwrap_or(usize::MAX)
        .saturating_add(1);
    if count < needed {
        return Err(PathError::ReplyTruncated { needed, got: count });
    }
    let both = sent.segments.iter().zip(segments).take(needed);
    for (index, (ours, (name, id))) in both.enumerate() {
        if ours.name != name {
            return Err(PathError::ReplyName {
                index,
                sent: ours.name.clone(),
                got: name.to_owned(),
            });
        }
        if ours.id != id {
            return Err(PathError::ReplyId {
                index,
                name: ours.name.clone(),
                sent: ours.id.clone(),
                got: id.to_owned(),
            });
        }
    }
    Ok(())
}

/// Whether the segments of a monitor's selector match somewhere on a path. Both are lists of (name, id). The selector matches as one
/// contiguous run, an empty name or id in it matches any, and an empty selector matches every path (NSM's `MonitorScopeSelector`).
#[must_use]
pub fn selector_matches(selector: &[(&str, &str)], path: &[(&str, &str)]) -> bool {
    let fits = |wanted: &str, found: &str| wanted.is_empty() || wanted == found;
    selector.is_empty()
        || path.windows(selector.len()).any(|run| {
            selector
                .iter()
                .zip(run)
                .all(|(wanted, found)| fits(wanted.0, found.0) && fits(wanted.1, found.1))
        })
}
