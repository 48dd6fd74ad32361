//! Whether what the card counts can be believed.
//!
//! Packets may leave by another interface than those with our programs: a route moved, a card was made anew, somebody took the
//! programs off. The card's count then stands still while the tunnel's grows, which looks like an output filter and is none. So what the
//! counts seem to say is told only after somebody looked at routes and hooks ([`Card::poll_look`]), and of a card that did not count
//! along while the path was up nothing is told at all.

use std::time::Duration;

use super::{Stages, TELLING};
use crate::clock::Monotonic;

/// Between two looks at the same path, while there is something to be looked at: a look asks the kernel a few times.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What a look at routes and hooks has found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Look {
    /// What leaves for the peer is counted at the card, and was before the look.
    pub card: bool,
    /// What comes to the management link is counted there, and was before the look.
    pub link: bool,
}

/// The counts of one path, seen over time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Card {
    /// As the stages were when they were compared last, while the path was up.
    compared: Stages,
    /// Packets came back that had not left by this card.
    is_blind: bool,
    found: Look,
    looked: Option<Monotonic>,
}

impl Card {
    /// Nothing that was counted until now is to be compared any more.
    pub fn compare_from(&mut self, stages: Stages) {
        self.compared = stages;
    }

    /// The path is up, and this came to the stages. Where every probe so far was answered, all of them left this node: if not by the
    /// card that counts, then by another.
    pub fn note_up(&mut self, stages: &Stages, all_answered: bool) {
        self.found = Look::default();
        let grown = stages.since(&self.compared);
        if all_answered && grown.link_out >= TELLING {
            self.is_blind = grown.own_output_drops().is_some();
            self.compared = *stages;
        }
    }

    /// Whether somebody is to look at routes and hooks now; `since_up`: the stages since the path was up.
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

    /// Somebody looked. What was counted until now on a way that is not believed says nothing: here and in `when_up`, the stages as
    /// they were when the path was up, that way is compared with what is counted from `now` on. The other way's stays.
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

    /// Of the stages what can be believed.
    #[must_use]
    pub fn believed(&self, stages: &Stages, since_up: &Stages) -> Stages {
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
