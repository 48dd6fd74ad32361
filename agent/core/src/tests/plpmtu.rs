//! The search on simulated paths that carry packets up to some size, change it, and go down.

use std::time::Duration;

use proptest::prelude::*;

use crate::{
    clock::Monotonic,
    liveness::plpmtu::{BASE, Search},
};

const SECOND: Duration = Duration::from_secs(1);

/// How long an answer takes.
const ROUND_TRIP: Duration = Duration::from_millis(20);

/// How long one is waited for.
const WAIT: Duration = Duration::from_millis(50);

/// A path is asked each ten minutes whether it has grown; the search itself takes seconds, with its black hole half a minute.
const SETTLED_WITHIN: Duration = Duration::from_secs(700);

/// What the least of a protocol is, and of which.
const IPV4: u16 = 576;
const IPV6: u16 = 1280;

/// A path of which all small packets come back as long as it is up, and large ones up to `largest`.
struct Simulation {
    search: Search,
    smallest: u16,
    wanted: u16,
    largest: u16,
    is_up: bool,
    now: Monotonic,
    /// Under way: the size, and when it comes in.
    answers: Vec<(u16, Monotonic)>,
    probes: Vec<u16>,
}

/// What happens to the path or to what is wanted of it.
#[derive(Debug, Clone, Copy)]
enum Event {
    Carries(u16),
    Wanted(u16),
    Down,
    Up,
}

impl Simulation {
    fn new(smallest: u16, wanted: u16, largest: u16) -> Self {
        let now = Monotonic::from_nanos(1_000_000_000);
        Self {
            search: Search::new(smallest, wanted, now),
            smallest,
            wanted: wanted.max(smallest),
            largest,
            is_up: true,
            now,
            answers: Vec::new(),
            probes: Vec::new(),
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Carries(largest) => self.largest = largest,
            Event::Wanted(wanted) => {
                self.search.want(wanted, self.now);
                self.wanted = wanted.max(self.smallest);
            }
            Event::Down => self.is_up = false,
            Event::Up => self.is_up = true,
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        let mut steps = 0;
        while self.now < end {
            self.step();
            let next = self.answers.iter().map(|(_, at)| *at);
            // While the path is down the session asks for no large probes, and looks at its own pace.
            let deadline = match self.is_up {
                true => self.search.poll_deadline(),
                false => self.now + SECOND,
            };
            let wake = next.fold(deadline, Monotonic::min);
            self.now = wake.max(self.now + Duration::from_micros(1)).min(end);
            steps += 1;
            assert!(
                steps < 1000 + 10 * time.as_secs(),
                "it spins: {:?}",
                self.search
            );
        }
    }

    fn step(&mut self) {
        let now = self.now;
        let mut come = Vec::new();
        self.answers.retain(|&(size, at)| {
            let is_under_way = at > now;
            if !is_under_way {
                come.push((size, at));
            }
            is_under_way
        });
        for (size, at) in come {
            self.search.handle_answer(size, at);
        }
        // The small probes of the session come back all the time.
        let witness = self.is_up.then_some(now);
        self.search.handle_deadline(now, WAIT, witness, 3);
        while let Some(size) = self
            .is_up
            .then(|| self.search.poll_probe(now, WAIT))
            .flatten()
        {
            assert!(
                (self.smallest..=self.wanted).contains(&size),
                "{size}: {:?}",
                self.search
            );
            self.probes.push(size);
            if size <= self.largest {
                self.answers.push((size, now + ROUND_TRIP));
            }
        }
        let found = self.search.path_mtu();
        assert!(
            found.is_none_or(|mtu| (self.smallest..=self.wanted).contains(&mtu)),
            "{found:?}"
        );
    }

    /// Checks that the search has found what there is to be found.
    fn assert_found(&self) -> Result<(), TestCaseError> {
        let there = self.largest.min(self.wanted).max(self.smallest);
        let found = self.search.path_mtu();
        let least = if there == self.wanted {
            there
        } else {
            there.saturating_sub(4).max(self.smallest)
        };
        prop_assert!(self.search.is_settled(), "{:?}", self.search);
        prop_assert!(
            found.is_some_and(|mtu| (least..=there).contains(&mtu)),
            "{:?} of {}: {:?}",
            found,
            there,
            self.search
        );
        Ok(())
    }
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (400u16..2000).prop_map(Event::Carries),
        (400u16..=9000).prop_map(Event::Carries),
        (400u16..2000).prop_map(Event::Wanted),
        (400u16..=9000).prop_map(Event::Wanted),
        Just(Event::Down),
        Just(Event::Up),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever the path carries is found within a few seconds and bytes.
    #[test]
    fn what_the_path_carries_is_found(
        is_v4: bool, wanted in 600u16..=9000, largest in 600u16..=9000,
    ) {
        let mut simulation = Simulation::new(if is_v4 { IPV4 } else { IPV6 }, wanted, largest);
        simulation.run(10 * SECOND);
        simulation.assert_found()?;
        // Halving 8,000 bytes takes 11 sizes, each asked three times where it fails; the rest are confirmations.
        prop_assert!(simulation.probes.len() <= 1 + 3 * 14 + 4, "{:?}", simulation.probes);
    }

    /// So is what it carries after any changes, in whatever moment of the search they come; an outage says nothing of sizes.
    #[test]
    fn what_changes_is_followed(
        is_v4: bool, wanted in 600u16..=9000, largest in 600u16..=9000,
        events in proptest::collection::vec((0u64..20_000, event()), 1..8),
    ) {
        let mut simulation = Simulation::new(if is_v4 { IPV4 } else { IPV6 }, wanted, largest);
        for (after, event) in events {
            // In the midst of a search more often than not.
            simulation.run(Duration::from_millis(after * after / 20_000));
            simulation.happen(event);
        }
        simulation.happen(Event::Up);
        simulation.run(SETTLED_WITHIN);
        simulation.assert_found()?;
    }

    /// What the links have never changes for an outage alone.
    #[test]
    fn an_outage_changes_nothing_that_was_found(
        largest in 600u16..=1450, outages in proptest::collection::vec((1u64..10_000, 1u64..60_000), 1..6),
    ) {
        let mut simulation = Simulation::new(IPV4, 1450, largest);
        simulation.run(10 * SECOND);
        let found = simulation.search.path_mtu();
        for (up, down) in outages {
            simulation.run(Duration::from_millis(up));
            simulation.happen(Event::Down);
            simulation.run(Duration::from_millis(down));
            simulation.happen(Event::Up);
            prop_assert_eq!(simulation.search.path_mtu(), found);
        }
        simulation.run(10 * SECOND);
        prop_assert_eq!(simulation.search.path_mtu(), found);
    }

    /// No input panics, and what is told stays between the smallest and the wanted.
    #[test]
    fn nothing_panics(inputs in proptest::collection::vec((0u8..5, any::<u16>(), any::<u32>()), 1..200)) {
        let mut search = Search::new(IPV4, 1450, Monotonic::default());
        let mut wanted = 1450;
        for (kind, size, millis) in inputs {
            let at = Monotonic::default() + Duration::from_millis(millis.into());
            match kind {
                0 => search.handle_answer(size, at),
                1 => search.handle_deadline(at, WAIT, Some(at), u32::from(size)),
                2 => search.handle_deadline(at, WAIT, None, 0),
                3 => drop(search.poll_probe(at, WAIT)),
                _ => {
                    search.want(size, at);
                    wanted = size.max(IPV4);
                }
            }
            let _ = search.poll_deadline();
            prop_assert!(search.path_mtu().is_none_or(|mtu| (IPV4..=wanted).contains(&mtu)), "{:?}", search);
        }
    }
}

#[test]
fn a_path_that_carries_what_is_wanted_is_asked_once() {
    let mut simulation = Simulation::new(IPV4, 1450, 1500);
    simulation.run(SECOND);
    assert_eq!(simulation.probes, [1450]);
    assert_eq!(simulation.search.path_mtu(), Some(1450));
}

#[test]
fn where_the_base_fails_the_smallest_is_what_links_have_and_less_is_not_tried() {
    for (smallest, base) in [(IPV4, BASE), (IPV6, IPV6)] {
        let mut simulation = Simulation::new(smallest, 1450, 300);
        simulation.run(20 * SECOND);
        assert_eq!(simulation.search.path_mtu(), Some(smallest));
        assert!(simulation.search.is_settled());
        assert!(
            simulation.probes.starts_with(&[1450, base, base, base]),
            "{:?}",
            simulation.probes
        );
        // Once it carries more, that is found.
        simulation.happen(Event::Carries(1333));
        simulation.run(SETTLED_WITHIN);
        simulation.assert_found().unwrap();
    }
}

#[test]
fn a_size_is_given_up_after_three_probes_of_it() {
    let mut simulation = Simulation::new(IPV4, 1450, 1300);
    simulation.run(10 * SECOND);
    let found = simulation.search.path_mtu().unwrap();
    let mut lost: Vec<u16> = simulation
        .probes
        .iter()
        .copied()
        .filter(|size| *size > found)
        .collect();
    // The first, quick, comes apart from the rest.
    lost.remove(0);
    for chunk in lost.chunks(3) {
        assert_eq!(chunk, [chunk[0]; 3], "{:?}", simulation.probes);
    }
}

#[test]
fn another_wish_in_mid_search_gives_its_size_all_its_probes() {
    let mut simulation = Simulation::new(IPV4, 1450, 1300);
    // Quick, base, three of what is wanted; then one of the size between is lost, and the second is under way.
    while simulation.probes.len() < 7 {
        simulation.run(Duration::from_millis(1));
    }
    assert_eq!(simulation.probes[5..], [1325; 2]);
    simulation.happen(Event::Wanted(1500));
    simulation.run(10 * SECOND);
    let asked = simulation
        .probes
        .iter()
        .filter(|size| **size == 1500)
        .count();
    assert_eq!(asked, 3, "{:?}", simulation.probes);
    simulation.assert_found().unwrap();
}
