//! Answers until they expire, and one flight a domain.
//!
//! Plain data behind the resolver's lock; `now` is a parameter. Bounded: when full, what has
//! expired goes first, then what would expire soonest. Flights are never evicted, they have their
//! own bound.

use std::{collections::HashMap, sync::Arc};

use nsm_core::nsm::name::Domain;
use tokio::{sync::watch, time::Instant};

use super::{Resolved, error::ResolveError};

/// What resolving a domain came to.
pub(super) type Outcome = Result<Arc<Resolved>, ResolveError>;

/// Domains remembered: a proxy talks to tens or hundreds.
pub(super) const MAX_ANSWERS: usize = 4096;

/// Domains being resolved at once: a bound on sockets and tasks.
pub(super) const MAX_FLIGHTS: usize = 512;

#[derive(Default)]
pub(super) struct Cache {
    answers: HashMap<Domain, Kept>,
    flights: HashMap<Domain, watch::Receiver<Option<Outcome>>>,
}

struct Kept {
    outcome: Outcome,
    expires: Instant,
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
        self.answers.insert(domain, Kept { outcome, expires });
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
