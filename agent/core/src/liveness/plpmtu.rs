//! How large packets a path carries, found out by sending some: packetization layer path MTU discovery (RFC 8899).
//!
//! Probes are packets of the tunnel with "do not fragment" set, so no ICMP is needed, and none is trusted. Sizes are those of the
//! *inner* IP packet: what is found is the MTU that the tunnel's links can have.
//!
//! The search: one quick probe of the wanted size, for most paths carry it. Where it stays unanswered the base is confirmed, then the sizes
//! between are halved. The size found is confirmed again and again; when it gets lost (a black hole: the path MTU has shrunk without an ICMP message)
//! the MTU falls to the base at once, so that traffic goes on, and is searched anew. Every ten minutes a path that carries less than wanted
//! is asked whether it has grown.
//!
//! Loss of a large probe counts only while small ones come back: a path that is down is no evidence about sizes. That also is why the
//! search may go faster than RFC 8899's PROBE_TIMER, which has no such witness; the confirmations keep to it.

use std::time::Duration;

use crate::clock::Monotonic;

/// The size that nearly every path carries (RFC 8899 section 5.1.2).
pub const BASE: u16 = 1200;

/// Probes of one size that are lost before it counts as too large, at least (RFC 8899 section 5.1.2): more where small ones get lost, too.
const MAX_PROBES: u32 = 3;

/// Confirmations that are lost before the size is a black hole, at least. Shrinking costs throughput and a lost probe nothing; where 10 % of
/// all packets are lost each way, that is 19 % of the probes, chance alone would lose six in a row every 18 hours: there it takes more.
const BLACK_HOLE_PROBES: u32 = 6;

/// The shortest wait for the answer to a search probe: reflectors limit their rate, and links of little bandwidth need their time.
const SHORTEST_WAIT: Duration = Duration::from_millis(100);

/// Between two confirmations of the size found. RFC 8899 allows 1 s; a transfer that hangs in a black hole this long goes on by itself.
const CONFIRM_EVERY: Duration = Duration::from_secs(3);

/// RFC 8899 section 5.1.1, PMTU_RAISE_TIMER.
const RAISE_EVERY: Duration = Duration::from_secs(600);

/// The search ends when what is left between works and fails is less than so many bytes.
const CLOSE_ENOUGH: u16 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The wanted size, once.
    Quick,
    /// The base, or below it the smallest.
    Base,
    /// Between what works and what fails.
    Search,
    /// Found: confirmed from time to time.
    Found,
}

#[derive(Debug, Clone, Copy)]
struct InFlight {
    size: u16,
    sent: Monotonic,
    until: Monotonic,
}

/// The search on one path.
#[derive(Debug, Clone)]
pub struct Search {
    smallest: u16,
    base: u16,
    wanted: u16,
    phase: Phase,
    /// The largest size that is known to work.
    works: Option<u16>,
    /// The smallest size that fails.
    fails: u16,
    /// Lost probes of the size that is asked for now.
    lost: u32,
    in_flight: Option<InFlight>,
    next: Monotonic,
    raise_at: Monotonic,
}

impl Search {
    /// A search that begins at `now`. `smallest`: what the path must carry in any case (576 for IPv4, 1280 for IPv6); `wanted`: what is hoped
    /// for, bytes of the inner IP packet.
    #[must_use]
    pub fn new(smallest: u16, wanted: u16, now: Monotonic) -> Self {
        let wanted = wanted.max(smallest);
        Self {
            smallest,
            base: BASE.clamp(smallest, wanted),
            wanted,
            phase: Phase::Quick,
            works: None,
            fails: wanted.saturating_add(1),
            lost: 0,
            in_flight: None,
            next: now,
            raise_at: now + RAISE_EVERY,
        }
    }

    /// Changes the wanted size. The search goes on from its present result.
    pub fn want(&mut self, wanted: u16, now: Monotonic) {
        let wanted = wanted.max(self.smallest);
        if wanted == self.wanted {
            return;
        }
        self.wanted = wanted;
        self.base = BASE.clamp(self.smallest, wanted);
        self.works = self.works.map(|works| works.min(wanted));
        if self.phase == Phase::Found {
            self.raise(now);
        } else {
            self.ask_anew(now);
        }
    }

    /// The largest size that is known to work, bytes; `None` before the first answer.
    #[must_use]
    pub fn path_mtu(&self) -> Option<u16> {
        self.works
    }

    /// Whether the search is over for now.
    #[cfg(test)]
    pub(crate) fn is_settled(&self) -> bool {
        self.phase == Phase::Found
    }

    /// When [`Search::handle_deadline`] or [`Search::poll_probe`] has something to do.
    #[must_use]
    pub fn poll_deadline(&self) -> Monotonic {
        match self.in_flight {
            Some(flight) => flight.until,
            None => self.next.min(self.raise_at),
        }
    }

    /// The size of a probe that is to be sent at `now`; it is awaited for `wait`, and for 100 ms at least.
    pub fn poll_probe(&mut self, now: Monotonic, wait: Duration) -> Option<u16> {
        if self.in_flight.is_some() || now < self.next {
            return None;
        }
        let size = self.candidate();
        self.in_flight = Some(InFlight {
            size,
            sent: now,
            until: now + wait.max(SHORTEST_WAIT),
        });
        Some(size)
    }

    fn candidate(&self) -> u16 {
        match (self.phase, self.works) {
            (Phase::Quick, _) => self.wanted,
            (Phase::Base, _) if self.base < self.fails => self.base,
            (Phase::Base, _) => self.smallest,
            (Phase::Found, works) => works.unwrap_or(self.smallest),
            // The quick probe may have been lost by chance: most paths carry what is wanted.
            (Phase::Search, _) if self.fails > self.wanted => self.wanted,
            (Phase::Search, works) => {
                let works = works.unwrap_or(self.smallest);
                works + (self.fails.saturating_sub(works)) / 2
            }
        }
    }

    /// A large probe of `size` was answered.
    pub fn handle_answer(&mut self, size: u16, at: Monotonic) {
        if size > self.wanted {
            return;
        }
        if self.in_flight.is_some_and(|flight| flight.size == size) {
            self.in_flight = None;
            self.next = at;
        } else if self.phase != Phase::Found && self.works.is_none_or(|works| size < works) {
            return;
        }
        self.lost = 0;
        // A late answer of a size that was given up: it works after all.
        self.fails = self.fails.max(size.saturating_add(1));
        self.works = self.works.max(Some(size));
        self.go_on(at);
    }

    /// Time has come to `now`. `last_answer`: when the last answer to any probe came, if the path is up; `needed`: how many probes in a row
    /// must be lost on this path to be more than chance.
    pub fn handle_deadline(
        &mut self,
        now: Monotonic,
        wait: Duration,
        last_answer: Option<Monotonic>,
        needed: u32,
    ) {
        if let Some(flight) = self.in_flight
            && flight.until <= now
        {
            if last_answer.is_some_and(|answer| answer > flight.sent) {
                self.in_flight = None;
                self.next = now;
                self.handle_loss(flight.size, needed, now);
            } else {
                // Nothing came back at all, which is no evidence about sizes. Wait for a small probe that does.
                self.in_flight = Some(InFlight {
                    until: now + wait.max(SHORTEST_WAIT),
                    ..flight
                });
            }
        }
        if self.raise_at <= now {
            self.raise_at = now + RAISE_EVERY;
            if self.phase == Phase::Found && self.works.is_some_and(|works| works < self.wanted) {
                self.raise(now);
            }
        }
    }

    fn raise(&mut self, now: Monotonic) {
        self.phase = Phase::Search;
        self.ask_anew(now);
        self.go_on(now);
    }

    /// Nothing that failed so far counts any more, nor does the loss of what is under way: it is of another size than the next.
    fn ask_anew(&mut self, now: Monotonic) {
        self.fails = self.wanted.saturating_add(1);
        self.lost = 0;
        self.in_flight = None;
        self.next = now;
    }

    fn handle_loss(&mut self, size: u16, needed: u32, now: Monotonic) {
        self.lost += 1;
        match self.phase {
            Phase::Quick => {
                self.phase = Phase::Base;
                self.lost = 0;
            }
            Phase::Base if self.lost >= MAX_PROBES.max(needed) => {
                self.lost = 0;
                self.fails = self.fails.min(size);
                self.works = self.works.map(|works| works.min(self.smallest));
                if size <= self.smallest {
                    // Less than the protocol demands: this is the least that links can have.
                    self.works = Some(self.smallest);
                    self.find(now);
                }
            }
            Phase::Search if self.lost >= MAX_PROBES.max(needed) => {
                self.lost = 0;
                self.fails = self.fails.min(size);
                self.go_on(now);
            }
            Phase::Found if self.lost >= BLACK_HOLE_PROBES.max(needed) => self.fall(size, now),
            Phase::Base | Phase::Search | Phase::Found => {}
        }
    }

    /// What worked does so no more.
    fn fall(&mut self, size: u16, now: Monotonic) {
        self.lost = 0;
        if size <= self.smallest {
            self.find(now);
            return;
        }
        self.fails = size;
        let base = if self.base < size {
            self.base
        } else {
            self.smallest
        };
        self.works = Some(base);
        self.phase = Phase::Base;
        self.next = now;
    }

    /// After something new is known.
    fn go_on(&mut self, now: Monotonic) {
        let works = self.works.unwrap_or(0);
        let is_close =
            self.fails.saturating_sub(works) <= CLOSE_ENOUGH && self.fails <= self.wanted;
        if works >= self.wanted || is_close {
            self.find(now);
        } else if self.phase == Phase::Found {
            self.next = self.next.max(now + CONFIRM_EVERY);
        } else if self.works.is_some() {
            self.phase = Phase::Search;
        }
    }

    fn find(&mut self, now: Monotonic) {
        if self.phase != Phase::Found {
            self.phase = Phase::Found;
            self.raise_at = now + RAISE_EVERY;
        }
        self.lost = 0;
        self.next = now + CONFIRM_EVERY;
    }
}
