//! Whether the counts of the network card can be trusted.
//!
//! Packets may leave by an interface without our programs: a route moved, a card was replaced, the programs were removed. The card's
//! count then stands still while the count of the probe link grows, as with an output filter. So a loss between the two is a
//! conclusion only after routes and hooks were checked ([`Card::poll_look`]). A card whose count did not grow while the path was up
//! is not trusted at all.

use std::time::Duration;

use super::{Stages, evidence::SIGNIFICANT};
use crate::clock::Monotonic;

/// Between two checks of one path: a check makes a few system calls.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The result of a check of routes and hooks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Look {
    /// Packets to the peer are counted at the card, and were before the check.
    pub card: bool,
    /// Packets that reach the probe link are counted there, and were before the check.
    pub link: bool,
}

/// The counts of one path over time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Card {
    /// The stages at the last comparison while the path was up.
    compared: Stages,
    /// Answers arrived to packets that this card did not count.
    is_blind: bool,
    found: Look,
    looked: Option<Monotonic>,
}

impl Card {
    /// Begins a new comparison with these stages.
    pub fn compare_from(&mut self, stages: Stages) {
        self.compared = stages;
    }

    /// Notes the stages of a path that is up. Where every probe so far was answered, all of them left this node: those that this card
    /// did not count left by another one.
    pub fn note_up(&mut self, stages: &Stages, all_answered: bool) {
        self.found = Look::default();
        let grown = stages.since(&self.compared);
        if all_answered && grown.link_out >= SIGNIFICANT {
            self.is_blind = grown.own_output_drops().is_some();
            self.compared = *stages;
        }
    }

    /// Whether routes and hooks are to be checked now; `since_up`: the stages since the path was up.
    pub fn poll_look(&mut self, since_up: &Stages, now: Monotonic) -> bool {
        let has_doubts = self.is_blind
            || since_up.own_output_drops().is_some()
            || since_up.own_input_drops().is_some();
        let is_due = self
            .looked
            .is_none_or(|looked| now.since(looked) >= LOOK_AGAIN);
        if has_doubts && is_due {
            self.looked = Some(now);
        }
        has_doubts && is_due
    }

    /// Takes the result of a check. Counts of a direction that is not trusted are dropped: here and in `when_up`, the stages when the
    /// path was up, that direction is compared with what is counted from `now` on. The other direction keeps its counts.
    pub fn handle_look(&mut self, found: Look, now: &Stages, when_up: &mut Stages) {
        self.found = found;
        for then in [&mut self.compared, when_up] {
            if !found.card {
                then.link_out = now.link_out;
                then.card_out = now.card_out;
            }
            if !found.link {
                then.card_in = now.card_in;
                then.link_in = now.link_in;
            }
        }
    }

    /// The stages that can be trusted.
    #[must_use]
    pub fn trusted(&self, stages: &Stages, since_up: &Stages) -> Stages {
        let card_out_counts =
            !self.is_blind && (self.found.card || since_up.own_output_drops().is_none());
        let card_in_counts = self.found.link || since_up.own_input_drops().is_none();
        Stages {
            card_out: stages.card_out.filter(|_| card_out_counts),
            card_in: stages.card_in.filter(|_| card_in_counts),
            ..*stages
        }
    }
}
