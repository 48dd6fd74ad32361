//! The session machine. The module above describes its driver and its rules.

use std::{collections::VecDeque, time::Duration};

use super::{
    Accepted, Answer, Cause, Change, Deadline, PeerProbe, Probe, Proof, Seq, Snapshot, State,
    Statistics, Wake, WireState,
    loss::{MOST_PROBES, needed_probes},
    rtt::{Minute, RoundTrip},
    timing::Timing,
    window::{Run, Window},
};
use crate::{clock::Monotonic, liveness::plpmtu::Search};

/// Probes of a proof: with one of five lost on each way, one in 10,000 proofs of a good path fails.
const PROOF_PROBES: u32 = 5;

/// Their distance: five are out within 80 ms, and a burst of loss on the way has time to pass.
const PROOF_INTERVAL: Duration = Duration::from_millis(20);

/// The pace of suspicion. A faster one is of no use: an answer is overdue after 10 ms at least.
const SUSPICION_INTERVAL: Duration = Duration::from_millis(10);

/// The pace of suspicion on a path that loses much: 40 probes fit into [`Timing::silence`], and a peer that suspects stays below the rate that
/// reflectors let pass.
const FASTEST_INTERVAL: Duration = Duration::from_millis(3);

/// How long a path that went down is probed at the usual pace: most losses are short.
const FAST_AFTER_LOSS: Duration = Duration::from_secs(10);

/// How long the peer may take to join after this side. The server joins before it answers the Request, the client when it has the answer:
/// the silence until then is no loss. NSM's clients give a Request 15 s (`NSM_REQUEST_TIMEOUT` of cmd-nsc).
const PEER_JOINS_WITHIN: Duration = Duration::from_secs(15);

/// Losses within this time make the next proof longer.
const FLAP_MEMORY: Duration = Duration::from_secs(60);

/// Losses that are remembered: after five the path must answer 32 times in a row.
const FLAPS: usize = 5;

/// A session whose probes are handed to the kernel and do not leave for so long has no verdict.
const KEPT_BACK_FOR: Duration = Duration::from_secs(1);

/// So many probes at least must have been kept back.
const KEPT_BACK: u32 = 3;

/// Changes that are kept until they are fetched. State and path MTU can each change a few times meanwhile; older changes are of no use.
const CHANGES: usize = 8;

/// The progress of a proof.
#[derive(Debug, Clone, Copy)]
enum Burst {
    /// Probes still to be sent, and when the first was.
    Sending { left: u32, began: Option<Monotonic> },
    /// All are sent, the last at this time.
    Waiting { began: Monotonic, last: Monotonic },
    /// Over.
    Over(Proof),
}

/// The initiator's session with one peer.
#[derive(Debug, Clone)]
pub struct Session {
    timing: Timing,
    state: State,
    began: Monotonic,
    since: Monotonic,
    cause: Option<Cause>,
    window: Window,
    round_trip: RoundTrip,
    minute: Minute,
    last_answer: Option<Monotonic>,
    /// When the first probe left that is unanswered, as are all after it: long ago, the window has it no more.
    silent_since: Option<Monotonic>,
    /// Answers since the last one that was missed, while the path is not up.
    answers_in_row: u32,
    /// When the path was lost, of late.
    losses: VecDeque<Monotonic>,
    next_transmit: Monotonic,
    last_transmit: Option<Monotonic>,
    /// When the last packet of any size was sent.
    last_sent: Option<Monotonic>,
    /// The least distance of two packets that the peer's reflector accepts.
    peer_interval: Duration,
    fast_until: Monotonic,
    suspected: bool,
    /// Probes are handed to the kernel and do not leave: no verdict is possible.
    is_kept_back: bool,
    /// Answers are expected: a proof was requested, the peer has sent a probe, or it had the time to join. Silence before that is no loss.
    expects_answers: bool,
    burst: Burst,
    peer: Option<PeerProbe>,
    peer_gap: Duration,
    search: Option<Search>,
    changes: VecDeque<Change>,
}

impl Session {
    /// A session that sends its first probe at `now`, with the number `first`: draw it, so that an answer to a probe of an earlier life is none.
    #[must_use]
    pub fn new(timing: Timing, first: Seq, now: Monotonic) -> Self {
        Self {
            timing,
            state: State::Unknown,
            began: now,
            since: now,
            cause: None,
            window: Window::new(first),
            round_trip: RoundTrip::default(),
            minute: Minute::new(now),
            last_answer: None,
            silent_since: None,
            answers_in_row: 0,
            losses: VecDeque::with_capacity(FLAPS),
            next_transmit: now,
            last_transmit: None,
            last_sent: None,
            peer_interval: Duration::ZERO,
            fast_until: now,
            suspected: false,
            is_kept_back: false,
            expects_answers: false,
            burst: Burst::Sending {
                left: PROOF_PROBES,
                began: None,
            },
            peer: None,
            peer_gap: timing.interval,
            search: None,
            changes: VecDeque::with_capacity(CHANGES),
        }
    }

    /// Begins the search for the path MTU: whether the path carries inner packets of `wanted` bytes, and else how large ones, down to
    /// `smallest`.
    pub fn want_mtu(&mut self, smallest: u16, wanted: u16, now: Monotonic) {
        match &mut self.search {
            Some(search) => search.want(wanted, now),
            None => self.search = Some(Search::new(smallest, wanted, now)),
        }
    }

    /// Begins a proof. On a path that is not up that is a burst of probes; [`Session::proof`] has its outcome.
    pub fn prove(&mut self, now: Monotonic) {
        let is_under_way = matches!(self.burst, Burst::Sending { .. } | Burst::Waiting { .. });
        if matches!(self.state, State::Up | State::AdminDown) || is_under_way {
            self.expects_answers = true;
            return;
        }
        self.expect_answers(now);
        self.begin_burst(now);
    }

    /// Answers are expected from `now` on. Probes that left before are no evidence.
    fn expect_answers(&mut self, now: Monotonic) {
        if !self.expects_answers {
            self.expects_answers = true;
            self.window.excuse_before(now);
            self.silent_since = None;
        }
    }

    fn begin_burst(&mut self, now: Monotonic) {
        self.burst = Burst::Sending {
            left: PROOF_PROBES.max(self.answers_needed(now) + PROOF_PROBES - 1),
            began: None,
        };
        self.next_transmit = self.next_transmit.min(now);
    }

    /// The progress of the last proof. A new session begins with one.
    #[must_use]
    pub fn proof(&self) -> Proof {
        match self.burst {
            _ if self.state == State::Up => Proof::Reached,
            _ if self.state == State::AdminDown => Proof::SwitchedOff,
            // What was reached once, and is not up, has not left a probe since.
            Burst::Over(Proof::Reached) => Proof::Silent {
                probes: 0,
                waited: Duration::ZERO,
            },
            Burst::Over(proof) => proof,
            Burst::Sending { .. } | Burst::Waiting { .. } => Proof::Pending,
        }
    }

    /// A probe has its egress stamp.
    pub fn handle_left(&mut self, seq: Seq, at: Monotonic) {
        self.window.left(seq, at);
    }

    /// An answer has its ingress stamp.
    pub fn handle_answer(&mut self, answer: Answer) -> Accepted {
        // A reflector sends no other state (RFC 7880 section 7.2.2).
        if !matches!(answer.state, WireState::Up | WireState::AdminDown) {
            return Accepted::Stale;
        }
        let at = answer.at;
        let Ok(padded_to) = self.window.answered(answer.seq, at, answer.round_trip) else {
            return Accepted::Stale;
        };
        self.peer_interval = answer.required_min_rx.min(self.timing.slow_interval);
        self.round_trip.sample(answer.round_trip);
        self.minute.round_trip(answer.round_trip);
        self.last_answer = self.last_answer.max(Some(at));
        self.silent_since = None;
        if let (Some(size), Some(search)) = (padded_to, &mut self.search) {
            let before = search.path_mtu();
            search.handle_answer(size, at);
            self.note_path_mtu(before, at);
        }
        if answer.state == WireState::AdminDown {
            self.answers_in_row = 0;
            self.turn(State::AdminDown, at, Cause::AdminDown);
            self.next_transmit = self.next_transmit.max(at + self.timing.slow_interval);
            return Accepted::Yes;
        }
        self.answers_in_row = self.answers_in_row.saturating_add(1);
        self.rise(at);
        Accepted::Yes
    }

    /// The path may be up, after an answer.
    fn rise(&mut self, at: Monotonic) {
        if self.state == State::Up {
            return;
        }
        let answers = self.answers_in_row;
        if answers >= self.answers_needed(at) {
            self.turn(State::Up, at, Cause::Answered { answers });
        }
        // The next proof comes soon, however slow the pace was.
        let soon = at + PROOF_INTERVAL.min(self.timing.interval);
        self.next_transmit = self.next_transmit.min(soon);
    }

    /// Answers in a row until the path is up. A path that was never lost is up with the first; one that comes and goes proves itself longer.
    fn answers_needed(&self, now: Monotonic) -> u32 {
        if self.state == State::Unknown && self.losses.is_empty() {
            return 1;
        }
        let flaps = self
            .losses
            .iter()
            .filter(|lost| now.since(**lost) < FLAP_MEMORY)
            .count();
        2 << flaps.saturating_sub(1).min(FLAPS - 1)
    }

    /// Takes a probe of the peer's own.
    pub fn handle_peer_probe(&mut self, probe: PeerProbe) {
        if let Some(last) = self.peer {
            if probe.at <= last.at {
                return;
            }
            let gap = probe.at.since(last.at);
            self.peer_gap = gap.clamp(FASTEST_INTERVAL, 2 * self.timing.slow_interval);
        }
        self.peer = Some(probe);
        if !self.expects_answers {
            self.expect_answers(probe.at);
            self.begin_burst(probe.at);
        }
    }

    /// Advances the time to `now`. All stamps until then must have been passed before.
    pub fn handle_deadline(&mut self, now: Monotonic) {
        self.minute.advance(now);
        self.expects_answers |= now.since(self.began) >= PEER_JOINS_WITHIN;
        self.window.settle(now, &mut self.minute);
        let rto = self.round_trip.rto();
        let run = self.window.run(now, rto);
        self.silent_since = self.silent_since.or(run.oldest);
        self.suspected = self.state == State::Up && run.missed > 0;
        if self.suspected
            && let Some(last) = self.last_transmit
        {
            self.next_transmit = self.next_transmit.min(last + self.suspicion_interval());
        }
        if self.state != State::Up && run.missed > 0 {
            self.answers_in_row = 0;
        }
        self.notice_kept_back(now);
        if self.is_lost(run, now, rto) {
            self.fall(run, now);
        }
        self.end_burst(run, now, rto);
        self.search_on(now);
    }

    fn is_lost(&self, run: Run, now: Monotonic, rto: Duration) -> bool {
        let Some(oldest) = run.oldest else {
            return false;
        };
        self.probes_needed()
            .is_some_and(|needed| run.missed >= needed)
            && now.since(oldest) >= self.timing.silence.max(rto)
    }

    /// Unanswered probes until the path is down; `None` when it is, when no answer is expected yet, or no verdict is possible.
    fn probes_needed(&self) -> Option<u32> {
        match self.state {
            State::Up => Some(self.more_than_chance()),
            // At their slow pace a longer run would take too long.
            State::Unknown if !self.expects_answers => None,
            State::Unknown | State::AdminDown => Some(PROOF_PROBES),
            State::Down => None,
        }
        .filter(|_| !self.is_kept_back)
    }

    /// Unanswered probes in a row that chance alone does not explain on this path.
    fn more_than_chance(&self) -> u32 {
        needed_probes(self.minute.random_loss(), self.window.recent_loss())
    }

    fn fall(&mut self, run: Run, now: Monotonic) {
        let silence = run
            .oldest
            .map_or(Duration::ZERO, |oldest| now.since(oldest));
        if self.state == State::Up {
            self.fast_until = now + FAST_AFTER_LOSS;
            if self.losses.len() == FLAPS {
                self.losses.pop_front();
            }
            self.losses.push_back(now);
        }
        self.window.mark_outage();
        self.answers_in_row = 0;
        self.suspected = false;
        let cause = Cause::Unanswered {
            probes: run.left,
            silence,
        };
        self.turn(State::Down, now, cause);
    }

    fn notice_kept_back(&mut self, now: Monotonic) {
        let kept = self
            .window
            .kept_back()
            .filter(|(probes, first)| *probes >= KEPT_BACK && now.since(*first) >= KEPT_BACK_FOR);
        self.is_kept_back = kept.is_some();
        if let Some((probes, _)) = kept {
            self.suspected = false;
            self.answers_in_row = 0;
            self.turn(State::Unknown, now, Cause::NothingLeft { probes });
        }
    }

    fn end_burst(&mut self, run: Run, now: Monotonic, rto: Duration) {
        if let Burst::Waiting { began, last } = self.burst
            && (last + rto <= now || self.state == State::Up)
        {
            self.burst = Burst::Over(match self.state {
                State::Up => Proof::Reached,
                _ => Proof::Silent {
                    probes: run.left,
                    waited: now.since(began),
                },
            });
        }
    }

    fn search_on(&mut self, now: Monotonic) {
        let wait = 2 * self.round_trip.rto();
        let alive = self.last_answer.filter(|_| self.state == State::Up);
        let needed = self.more_than_chance();
        if let Some(search) = &mut self.search {
            let before = search.path_mtu();
            search.handle_deadline(now, wait, alive, needed);
            self.note_path_mtu(before, now);
        }
    }

    /// The next probe to send at `now`: call until there is none. `random` is uniform in 0..1.
    pub fn poll_transmit(
        &mut self,
        now: Monotonic,
        random: &mut dyn FnMut() -> f64,
    ) -> Option<Probe> {
        if self.not_before().is_some_and(|at| now < at) {
            return None;
        }
        if now >= self.next_transmit {
            self.count_burst(now);
            let interval = self.interval(now);
            self.next_transmit = now + self.spaced(interval, random);
            self.last_transmit = Some(now);
            return Some(self.probe(now, interval, None));
        }
        let wait = 2 * self.round_trip.rto();
        let size = match &mut self.search {
            Some(search) if self.state == State::Up => search.poll_probe(now, wait)?,
            _ => return None,
        };
        let interval = self.interval(now);
        Some(self.probe(now, interval, Some(size)))
    }

    fn probe(&mut self, now: Monotonic, interval: Duration, padded_to: Option<u16>) -> Probe {
        let outage = self.state != State::Up;
        self.last_sent = Some(now);
        let seq = self.window.push(now, outage, padded_to, &mut self.minute);
        Probe {
            seq,
            state: self.state.on_wire(),
            diagnostic: self.state.diagnostic(),
            interval,
            padded_to,
        }
    }

    fn count_burst(&mut self, now: Monotonic) {
        if let Burst::Sending { left, began } = self.burst {
            let began = began.unwrap_or(now);
            self.burst = match left - 1 {
                0 => Burst::Waiting { began, last: now },
                left => Burst::Sending {
                    left,
                    began: Some(began),
                },
            };
        }
    }

    /// When the peer takes the next packet.
    fn not_before(&self) -> Option<Monotonic> {
        self.last_sent.map(|last| last + self.peer_interval)
    }

    /// The pace of now.
    fn interval(&self, now: Monotonic) -> Duration {
        self.own_interval(now).max(self.peer_interval)
    }

    fn own_interval(&self, now: Monotonic) -> Duration {
        let Timing {
            interval,
            slow_interval,
            ..
        } = self.timing;
        match self.state {
            State::Up if self.suspected => self.suspicion_interval(),
            State::Up => interval,
            State::AdminDown => slow_interval,
            _ if matches!(self.burst, Burst::Sending { .. }) => PROOF_INTERVAL,
            _ if now < self.fast_until || self.answers_in_row > 0 => interval,
            State::Unknown | State::Down => slow_interval,
        }
    }

    /// RFC 5880 section 6.8.7: 75 to 100 % of the interval, so that sessions do not beat in step. A burst and a suspicion are short and keep
    /// theirs; where the peer's pace leaves no room below, the jitter is above.
    fn spaced(&self, interval: Duration, random: &mut dyn FnMut() -> f64) -> Duration {
        if interval < self.timing.interval {
            return interval;
        }
        let random = random().clamp(0.0, 1.0);
        let jittered = interval.mul_f64(0.75 + 0.25 * random);
        if jittered < self.peer_interval {
            return self.peer_interval.mul_f64(1.0 + 0.25 * random);
        }
        jittered
    }

    /// As many probes as a verdict needs are to be out, and missed, when the path has been silent for long enough.
    fn suspicion_interval(&self) -> Duration {
        let needed = self.probes_needed().unwrap_or(MOST_PROBES);
        let rto = self.round_trip.rto();
        let room = self.timing.silence.saturating_sub(2 * rto);
        let own = (room / needed.max(1)).clamp(FASTEST_INTERVAL, SUSPICION_INTERVAL);
        own.max(self.peer_interval)
    }

    /// The next deadline and its reason, once [`Session::poll_transmit`] has nothing more to send.
    #[must_use]
    pub fn poll_deadline(&self) -> Deadline {
        let rto = self.round_trip.rto();
        let sendable = |at: Monotonic| self.not_before().map_or(at, |bound| at.max(bound));
        let mut first = Deadline {
            at: sendable(self.next_transmit),
            reason: Wake::Transmit,
        };
        let mut consider = |at: Option<Monotonic>, reason| {
            if let Some(at) = at
                && at < first.at
            {
                first = Deadline { at, reason };
            }
        };
        let oldest = self.window.nth_unanswered(1);
        if self.state == State::Up && !self.suspected {
            consider(oldest.map(|oldest| oldest + rto), Wake::Suspect);
        } else if let (Some(oldest), Some(needed)) = (oldest, self.probes_needed()) {
            let last = self.window.nth_unanswered(needed);
            let silent = oldest + self.timing.silence.max(rto);
            consider(last.map(|last| silent.max(last + rto)), Wake::Detect);
        }
        if let Burst::Waiting { last, .. } = self.burst {
            consider(Some(last + rto), Wake::Proof);
        }
        if let Some(search) = self.search.as_ref().filter(|_| self.state == State::Up) {
            consider(Some(sendable(search.poll_deadline())), Wake::PathMtu);
        }
        first
    }

    /// The next change, the oldest first.
    pub fn poll_change(&mut self) -> Option<Change> {
        self.changes.pop_front()
    }

    /// The state of the session at `now`.
    #[must_use]
    pub fn snapshot(&self, now: Monotonic) -> Snapshot {
        let rto = self.round_trip.rto();
        Snapshot {
            state: self.state,
            since: self.since,
            cause: self.cause,
            silent_since: self
                .silent_since
                .or_else(|| self.window.run(now, rto).oldest),
            last_answer: self.last_answer,
            rto,
            peer: self.peer,
            peer_gap: self.peer_gap,
            path_mtu: self.search.as_ref().and_then(Search::path_mtu),
        }
    }

    /// Loss and round trips of the last minute.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.minute.statistics()
    }

    fn turn(&mut self, to: State, at: Monotonic, cause: Cause) {
        let from = self.state;
        if from == to {
            return;
        }
        self.state = to;
        self.since = at;
        self.expects_answers = true;
        match (to, cause) {
            (State::Up, _) => self.burst = Burst::Over(Proof::Reached),
            (State::Down, Cause::Unanswered { probes, silence }) => {
                self.burst = Burst::Over(Proof::Silent {
                    probes,
                    waited: silence,
                });
            }
            _ => {}
        }
        self.cause = Some(cause);
        self.push_change(Change::State {
            at,
            from,
            to,
            cause,
        });
    }

    fn note_path_mtu(&mut self, before: Option<u16>, at: Monotonic) {
        let now = self.search.as_ref().and_then(Search::path_mtu);
        if let Some(to) = now.filter(|_| now != before) {
            self.push_change(Change::PathMtu {
                at,
                from: before,
                to,
            });
        }
    }

    fn push_change(&mut self, change: Change) {
        if self.changes.len() == CHANGES {
            self.changes.pop_front();
        }
        self.changes.push_back(change);
    }
}
