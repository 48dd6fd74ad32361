//! The probes of late, and what became of each.

use std::{collections::VecDeque, time::Duration};

use super::{
    Seq,
    rtt::{Minute, Settled},
};
use crate::clock::Monotonic;

/// Probes that are kept. More than a verdict can need ([`super::loss::MOST_PROBES`]) and enough to measure the loss of late; less than
/// the numbers of [`Seq`], so that each names one probe.
const WINDOW: usize = 128;

/// After this a probe's fate is settled for the statistics.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
struct Sent {
    asked_at: Monotonic,
    left_at: Option<Monotonic>,
    answered: bool,
    /// Sent while the path was not up, or the reason why it went down: no measure of random loss.
    outage: bool,
    /// A large probe: its answer proves the path, its loss proves nothing but its size.
    padded_to: Option<u16>,
}

/// The probes since the last one that was answered, which left and are not padded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Run {
    /// All of them.
    pub(super) left: u32,
    /// Those that left long enough ago for an answer to have come.
    pub(super) missed: u32,
    /// When the first of them left.
    pub(super) oldest: Option<Monotonic>,
}

/// No probe of this number waits for an answer.
#[derive(Debug)]
pub(super) struct Stale;

#[derive(Debug, Clone)]
pub(super) struct Window {
    ring: VecDeque<Sent>,
    next: Seq,
    /// How many at the front are in the statistics.
    settled: usize,
    /// What left before is no evidence: the peer was not expected to answer.
    excused_before: Monotonic,
}

impl Window {
    pub(super) fn new(first: Seq) -> Self {
        Self {
            ring: VecDeque::with_capacity(WINDOW),
            next: first,
            settled: 0,
            excused_before: Monotonic::default(),
        }
    }

    /// Probes that left before `at` and are not answered count neither for a verdict nor as loss.
    pub(super) fn excuse_before(&mut self, at: Monotonic) {
        self.excused_before = at;
        self.mark_outage();
    }

    /// A probe is about to be sent.
    pub(super) fn push(
        &mut self,
        now: Monotonic,
        outage: bool,
        padded_to: Option<u16>,
        minute: &mut Minute,
    ) -> Seq {
        if self.ring.len() == WINDOW {
            if self.settled == 0 {
                self.settle_next(minute);
            }
            self.ring.pop_front();
            self.settled -= 1;
        }
        self.ring.push_back(Sent {
            asked_at: now,
            left_at: None,
            answered: false,
            outage,
            padded_to,
        });
        let seq = self.next;
        self.next = seq.next();
        seq
    }

    fn find(&mut self, seq: Seq) -> Option<&mut Sent> {
        let back = usize::from(seq.before(self.next));
        let at = self.ring.len().checked_sub(back)?;
        self.ring.get_mut(at)
    }

    /// A probe left this node. The first stamp counts.
    pub(super) fn left(&mut self, seq: Seq, at: Monotonic) {
        if let Some(sent) = self.find(seq) {
            sent.left_at.get_or_insert(at);
        }
    }

    /// A probe was answered; gives its padding. What was answered has left, whether or not its stamp was seen.
    pub(super) fn answered(
        &mut self,
        seq: Seq,
        at: Monotonic,
        round_trip: Duration,
    ) -> Result<Option<u16>, Stale> {
        let sent = self.find(seq).filter(|sent| !sent.answered).ok_or(Stale)?;
        sent.answered = true;
        sent.left_at.get_or_insert(at - round_trip);
        Ok(sent.padded_to)
    }

    /// The trailing probes without answer, newest first.
    fn unanswered(&self) -> impl Iterator<Item = (usize, Monotonic)> {
        self.ring
            .iter()
            .enumerate()
            .rev()
            .take_while(|(_, sent)| !sent.answered)
            .filter(|(_, sent)| sent.padded_to.is_none())
            .filter_map(|(at, sent)| Some((at, sent.left_at?)))
            .filter(|(_, left_at)| *left_at >= self.excused_before)
    }

    /// What is unanswered, where an answer is missed after `rto`.
    pub(super) fn run(&self, now: Monotonic, rto: Duration) -> Run {
        let mut run = Run::default();
        for (_, left_at) in self.unanswered() {
            run.left += 1;
            if left_at + rto <= now {
                run.missed += 1;
            }
            run.oldest = Some(left_at);
        }
        run
    }

    /// When the `n`-th of the unanswered probes left, the oldest being the first.
    pub(super) fn nth_unanswered(&self, n: u32) -> Option<Monotonic> {
        let left = u32::try_from(self.unanswered().count()).unwrap_or(u32::MAX);
        let newer = left.checked_sub(n)?;
        self.unanswered()
            .nth(newer as usize)
            .map(|(_, left_at)| left_at)
    }

    /// The trailing probes are the reason why the path went down.
    pub(super) fn mark_outage(&mut self) {
        for sent in self.ring.iter_mut().rev() {
            if sent.answered {
                break;
            }
            sent.outage = true;
        }
    }

    /// Trailing probes that were handed to the kernel and did not leave, and when the first of them was.
    pub(super) fn kept_back(&self) -> Option<(u32, Monotonic)> {
        let kept = self
            .ring
            .iter()
            .rev()
            .take_while(|sent| sent.left_at.is_none());
        kept.fold(None, |found: Option<(u32, Monotonic)>, sent| {
            Some((found.map_or(1, |(count, _)| count + 1), sent.asked_at))
        })
    }

    /// Probes before the last one that was answered, and those of them that were lost: what is measured of late.
    pub(super) fn recent_loss(&self) -> (u32, u32) {
        let settled = self
            .ring
            .iter()
            .rev()
            .skip_while(|sent| !sent.answered)
            .filter(|sent| sent.left_at.is_some() && !sent.outage && sent.padded_to.is_none());
        settled.fold((0, 0), |(total, lost), sent| {
            (total + 1, lost + u32::from(!sent.answered))
        })
    }

    /// Puts what is old enough into the statistics, but for a run of silence that may be the loss of the path: where probes are far apart it
    /// would pass for random loss before it is long enough for a verdict, which would then take ever more of it.
    pub(super) fn settle(&mut self, now: Monotonic, minute: &mut Minute) {
        let silent = |sent: &&Sent| !sent.answered && !sent.outage;
        let decided = self.ring.len() - self.ring.iter().rev().take_while(silent).count();
        while self.settled < decided
            && self
                .ring
                .get(self.settled)
                .is_some_and(|sent| sent.asked_at + SETTLED_AFTER <= now)
        {
            self.settle_next(minute);
        }
    }

    fn settle_next(&mut self, minute: &mut Minute) {
        let Some(sent) = self.ring.get(self.settled) else {
            return;
        };
        self.settled += 1;
        if sent.left_at.is_none() || sent.padded_to.is_some() {
            return;
        }
        minute.settle(match (sent.answered, sent.outage) {
            (true, _) => Settled::Answered,
            (false, true) => Settled::Outage,
            (false, false) => Settled::Lost,
        });
    }
}
