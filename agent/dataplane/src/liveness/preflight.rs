//! Counts of proofs by their outcome: they show what Requests waited for.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

use nsm_core::liveness::sbfd::{Cause, Proof, Snapshot, State};

/// Proofs ([`super::Peer::prove`]), by outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Preflights {
    /// The session was up before; there was no wait.
    pub standing: u64,
    /// A path that was not known to be good was proved by answers to probes.
    pub answered: u64,
    /// The answers that this took, of all of them: one each where peers are new and paths are good.
    pub answers: u64,
    /// No answer came, or not enough.
    pub silent: u64,
    /// The peer's reflector answered that it is switched off.
    pub switched_off: u64,
    /// The wait ended early: it took too long, the caller went away, or the plane was closed.
    pub cut: u64,
}

/// The counters.
#[derive(Debug, Default)]
pub(super) struct Count(Mutex<Preflights>);

impl Count {
    pub(super) fn now(&self) -> Preflights {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the wait for a proof. Without [`Wait::end`] it is counted as cut.
    pub(super) const fn wait(&self) -> Wait<'_> {
        Wait {
            count: self,
            is_over: false,
        }
    }

    /// Counts a proof of a session that was up.
    pub(super) fn add_standing(&self) {
        self.with(|count| count.standing += 1);
    }

    /// Counts a proof by probes; `answers`: as [`PeerCell::answers`].
    pub(super) fn add(&self, proof: Proof, answers: u32) {
        self.with(|count| match proof {
            Proof::Reached => {
                count.answered += 1;
                count.answers += u64::from(answers);
            }
            Proof::Silent { .. } => count.silent += 1,
            Proof::SwitchedOff => count.switched_off += 1,
            // Not an outcome.
            Proof::Pending => {}
        });
    }

    fn with(&self, change: impl FnOnce(&mut Preflights)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A proof that is waited for.
#[must_use]
pub(super) struct Wait<'a> {
    count: &'a Count,
    is_over: bool,
}

impl Wait<'_> {
    /// The proof is there: as [`Count::add`].
    pub(super) fn end(mut self, proof: Proof, answers: u32) {
        self.is_over = true;
        self.count.add(proof, answers);
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.count.with(|count| count.cut += 1);
        }
    }
}

/// How good a path is; the better is the larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// Not proved.
    Down,
    /// The session is up, and answers are overdue.
    Doubted,
    /// Its probes are answered.
    Good,
}

/// The state of a session, readable without a request to the prober.
#[derive(Debug, Default)]
pub(crate) struct PeerCell {
    up: AtomicBool,
    doubted: AtomicBool,
    answers: AtomicU32,
}

impl PeerCell {
    /// Whether the session is up.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// How good the path is.
    pub(super) fn standing(&self) -> Standing {
        match (self.is_up(), self.doubted.load(Ordering::Acquire)) {
            (false, _) => Standing::Down,
            (true, true) => Standing::Doubted,
            (true, false) => Standing::Good,
        }
    }

    /// The answers that brought the session up.
    pub(super) fn answers(&self) -> u32 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Notes the state of the session; `doubted`: answers are overdue.
    pub(super) fn note(&self, snapshot: &Snapshot, doubted: bool) {
        if let Some(Cause::Answered { answers }) = snapshot.cause {
            self.answers.store(answers, Ordering::Relaxed);
        }
        self.doubted.store(doubted, Ordering::Release);
        self.up
            .store(snapshot.state == State::Up, Ordering::Release);
    }

    /// Nothing is proved of it.
    pub(super) fn clear(&self) {
        self.up.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_proof_that_nobody_waits_for_any_more_is_counted_once() {
        let count = Count::default();
        let proves = async |proof: Option<Proof>| {
            let wait = count.wait();
            let proof = match proof {
                Some(proof) => proof,
                None => std::future::pending().await,
            };
            wait.end(proof, 2);
        };
        proves(Some(Proof::Reached)).await;
        tokio::select! {
            biased;
            () = proves(None) => unreachable!("it waits for ever"),
            () = async { assert_eq!(count.now().cut, 0, "it may still end") } => {}
        }
        let expected = Preflights {
            answered: 1,
            answers: 2,
            cut: 1,
            ..Preflights::default()
        };
        assert_eq!(count.now(), expected);
    }
}
