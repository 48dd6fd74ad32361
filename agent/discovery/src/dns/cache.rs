//! Answers until they expire, and one flight a domain.
//!
//! Plain data behind the resolver's lock; `now` is a parameter. Bounded: when full, what has
//! expired goes first, then what would expire soonest. Flights are never evicted, they have their
//! own bound.

use std::{collections::HashMap, sync::Arc};

use nsm_core::nsm::name::Domain;
use tokio::{sync::watch, time::Instant};

use super::{Resolved, Resolver, error::ResolveError};

/// What resolving a domain came to.
pub type Outcome = Result<Arc<Resolved>, ResolveError>;

/// Domains remembered: a proxy talks to tens or hundreds.
pub(super) const MAX_ANSWERS: usize = 4096;

/// Domains being resolved at once: a bound on sockets and tasks.
pub const MAX_FLIGHTS: usize = 512;

#[derive(Default)]
pub(super) struct Cache {
    answers: HashMap<Domain, Kept>,
    flights: HashMap<Domain, watch::Receiver<Option<Outcome>>>,
}

/// An answer as it is kept.
#[derive(Clone)]
pub(super) struct Kept {
    outcome: Outcome,
    answered: Instant,
    expires: Instant,
}

/// What is remembered of one domain.
#[derive(Clone, Debug)]
pub struct Remembered {
    /// The domain.
    pub domain: Domain,
    /// What resolving it came to.
    pub outcome: Outcome,
    /// When that was.
    pub answered: Instant,
    /// Until when it is used.
    pub expires: Instant,
}

/// What is known about a domain.
pub(super) enum Known {
    /// An answer that still holds.
    Answer(Outcome),
    /// A question is in flight; the receiver gets its answer.
    InFlight(watch::Receiver<Option<Outcome>>),
    /// Nobody is asking: the caller shall, and send the answer here.
    Unknown(
        watch::Sender<Option<Outcome>>,
        watch::Receiver<Option<Outcome>>,
    ),
    /// Nobody is asking, but as many as may are asking for others.
    Full,
}

impl Cache {
    /// Looks a domain up; the answer `Unknown` has opened a flight.
    pub(super) fn look_up(&mut self, domain: &Domain, now: Instant) -> Known {
        if let Some(kept) = self.answers.get(domain)
            && kept.expires > now
        {
            return Known::Answer(kept.outcome.clone());
        }
        // A flight whose sender is gone without an answer has crashed: it counts as none.
        if let Some(flight) = self.flights.get(domain)
            && flight.has_changed().is_ok()
        {
            return Known::InFlight(flight.clone());
        }
        if self.flights.len() >= MAX_FLIGHTS {
            self.flights
                .retain(|_, flight| flight.has_changed().is_ok());
        }
        if self.flights.len() >= MAX_FLIGHTS {
            return Known::Full;
        }
        let (sender, receiver) = watch::channel(None);
        self.flights.insert(domain.clone(), receiver.clone());
        Known::Unknown(sender, receiver)
    }

    /// Ends the flight of a domain and keeps its outcome until `expires`.
    pub(super) fn land(
        &mut self,
        domain: Domain,
        outcome: Outcome,
        expires: Instant,
        now: Instant,
    ) {
        self.flights.remove(&domain);
        if self.answers.len() >= MAX_ANSWERS && !self.answers.contains_key(&domain) {
            self.make_room(now);
        }
        let kept = Kept {
            outcome,
            answered: now,
            expires,
        };
        self.answers.insert(domain, kept);
    }

    /// Forgets an answer that is of no use, where it is still the one that is kept and is old enough to be doubted.
    pub(super) fn doubt(
        &mut self,
        domain: &Domain,
        stale: &Resolved,
        now: Instant,
    ) -> Option<Kept> {
        let is_stale = |kept: &mut Kept| {
            let is_it = kept
                .outcome
                .as_ref()
                .is_ok_and(|it| it.expires == stale.expires);
            is_it && now.saturating_duration_since(kept.answered) >= Resolver::AGE_OF_DOUBT
        };
        let kept = self.answers.get_mut(domain)?;
        if is_stale(kept) {
            self.answers.remove(domain)
        } else {
            None
        }
    }

    /// Keeps an answer again that was doubted, in the place of a failure that may pass. It is doubted anew after a while.
    pub(super) fn restore(&mut self, domain: &Domain, kept: Kept) {
        self.answers.insert(
            domain.clone(),
            Kept {
                answered: Instant::now(),
                ..kept
            },
        );
    }

    /// Everything that still holds, ordered by domain.
    pub(super) fn remembered(&self, now: Instant) -> Vec<Remembered> {
        let valid = self.answers.iter().filter(|(_, kept)| kept.expires > now);
        let mut all: Vec<_> = valid
            .map(|(domain, kept)| Remembered {
                domain: domain.clone(),
                outcome: kept.outcome.clone(),
                answered: kept.answered,
                expires: kept.expires,
            })
            .collect();
        all.sort_by(|a, b| a.domain.cmp(&b.domain));
        all
    }

    fn make_room(&mut self, now: Instant) {
        self.answers.retain(|_, kept| kept.expires > now);
        if self.answers.len() < MAX_ANSWERS {
            return;
        }
        let soonest = self
            .answers
            .iter()
            .min_by_key(|(_, kept)| kept.expires)
            .map(|(domain, _)| domain.clone());
        if let Some(domain) = soonest {
            self.answers.remove(&domain);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> (usize, usize) {
        (self.answers.len(), self.flights.len())
    }
}
