//! Whose an entry is, and what is charged for it.
//!
//! An entry is of who registered it first, until it is unregistered or lapses. A network service is offered by several: it stays with its
//! owner as long as that offers an endpoint of it, and for [`CLAIM`] after it was registered. Then it passes to whoever has offered it for
//! longest, so that neither a pod that is replaced leaves it to nobody, nor a newcomer takes it from those that serve it.

use std::time::Duration;

use nsm_core::identity::Owner;
use tokio::time::Instant;

use crate::places::Place;

/// How long a service stays with an owner that offers no endpoint of it: between the registrations of both, and while it starts again.
pub(super) const CLAIM: Duration = Duration::from_secs(10 * 60);

/// The registration of an entry.
#[derive(Debug)]
pub(super) struct Registered {
    pub(super) owner: Owner,
    /// When the owner has registered it first, and last.
    pub(super) first: Instant,
    pub(super) last: Instant,
    /// Its place among the entries.
    pub(super) _place: Place,
    /// Its bytes.
    pub(super) bytes: Place,
}

impl Registered {
    /// Whose a service is, whose endpoints are registered by `offering`: who has offered it for longest comes first.
    pub(super) fn owner_among(&self, offering: &[Owner], now: Instant) -> Option<Owner> {
        if now < self.last + CLAIM || offering.contains(&self.owner) {
            return Some(self.owner);
        }
        offering.first().copied()
    }
}

#[cfg(test)]
mod tests {
    use nsm_core::identity::share::Holder;

    use super::*;
    use crate::places::{Budget, Limits};

    #[test]
    fn a_service_passes_to_who_offers_it_when_its_owner_is_gone() {
        let user = |user| Owner::Process {
            user: Some(user),
            namespace: None,
            home: None,
        };
        let start = Instant::now();
        let budget = Budget::new(&Limits::wide());
        let registered = Registered {
            owner: user(1),
            first: start,
            last: start,
            _place: budget.entries.take(Holder::our_own(), 1).unwrap(),
            bytes: budget.bytes.take(Holder::our_own(), 1).unwrap(),
        };
        let late = start + CLAIM;
        let early = late - Duration::from_secs(1);
        for (offering, at, owner) in [
            (vec![], early, Some(user(1))),
            (vec![user(2)], early, Some(user(1))),
            (vec![user(2), user(1)], late, Some(user(1))),
            (vec![user(2), user(3)], late, Some(user(2))),
            (vec![], late, None),
        ] {
            assert_eq!(registered.owner_among(&offering, at), owner, "{offering:?}");
        }
    }
}
