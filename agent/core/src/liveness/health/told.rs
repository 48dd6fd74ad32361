//! What the peer's agent tells of the path, and when that is evidence.
//!
//! Its way in is our way out, and what comes in it knows at first hand. It is asked where nothing of it comes in, for then our own
//! probes tell of the way out nothing. Three rules decide whether its word counts:
//!
//! 1. **A word is what the peer holds now, as long as the stream stands that brought it.** Its agent publishes each change, and
//!    nothing while there is none, so a word that is old need not be outdated. One whose stream has ended is withdrawn by whoever
//!    gave it to us; until that is noticed, it stands.
//! 2. **The peer must have had time to notice.** A word that came after the silence began is of this loss. One that came before
//!    counts when the peer could have changed it since: its own detection is as fast as ours, and [`PEER_NOTICES`] is several times
//!    that and the way of the word. (It may be the one to notice first, when our probes are further apart; its word then waits.)
//! 3. **Up counts only from a peer that has noticed.** What breaks our round trip breaks its own, too, so one that knows of the loss
//!    does not say that its way out is up. One that says that both are up speaks of the time before: also a long time later, when
//!    it, or the stream, has stopped without anybody knowing. Down needs no such witness: a peer that hears nothing has noticed.
//!
//! Where none counts the way out is unknown: so it is of a peer that is cut off altogether, and for the server's end of a tunnel, to
//! which no stream leads from the client's.

use std::time::Duration;

use super::Verdict;
use crate::clock::Monotonic;

/// Within this a peer has noticed a loss and told so: its detection takes below 200 ms, it looks again at what is not up four times a
/// second, and the rest is for the word to travel.
pub const PEER_NOTICES: Duration = Duration::from_secs(1);

/// What a peer's agent says of the two ways between it and us, seen from its side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// From us to it.
    pub inward: Verdict,
    /// From it to us.
    pub outward: Verdict,
}

/// A word that was told, and stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// What was said.
    pub word: Word,
    /// When it came.
    pub at: Monotonic,
}

impl Told {
    /// What it says of our way out at `now`, on which probes stay unanswered since `silent_since`; `None`: nothing that counts.
    pub(super) fn way_out(&self, silent_since: Monotonic, now: Monotonic) -> Option<Verdict> {
        let has_noticed = self.at > silent_since || now.since(silent_since) >= PEER_NOTICES;
        match self.word.inward {
            Verdict::Down if has_noticed => Some(Verdict::Down),
            Verdict::Up if has_noticed && self.word.outward != Verdict::Up => Some(Verdict::Up),
            _ => None,
        }
    }
}
