use std::{
    collections::HashSet,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use proptest::prelude::*;

use super::at;
use crate::{
    mechanism::vni_pool::{QUARANTINE, VniPool, VniPoolError},
    net::Vni,
};

const LOW: &str = "192.0.2.1";
const HIGH: &str = "192.0.2.2";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn vni(number: u32) -> Vni {
    number.try_into().unwrap()
}

/// An even VNI, the first free one from the bottom.
fn allocate(pool: &mut VniPool, now: SystemTime) -> Vni {
    pool.allocate(ip(HIGH), ip(LOW), now, || 0).unwrap()
}

#[test]
fn the_parity_follows_the_addresses() {
    let parity = |local: &str, remote: &str| {
        VniPool::default()
            .allocate(ip(local), ip(remote), at(0), || 7)
            .unwrap()
            .get()
            % 2
    };
    assert_eq!(parity(HIGH, LOW), 0, "the client is below: even");
    assert_eq!(parity(LOW, LOW), 0, "equal: even");
    assert_eq!(parity(LOW, HIGH), 1, "the client is above: odd");
    assert_eq!(parity("fd00::2", "fd00::1"), 0);
    assert_eq!(parity("fd00::1", "fd00::2"), 1);
    // Compared as bytes, not as text: 9 is below 10.
    assert_eq!(parity("192.0.2.10", "192.0.2.9"), 0);
}

#[test]
fn a_released_vni_rests() {
    let mut pool = VniPool::default();
    let first = allocate(&mut pool, at(0));
    pool.release(first, at(10));
    assert_eq!(pool.in_use(), 0);
    let almost = at(10) + QUARANTINE - Duration::from_millis(1);
    assert_ne!(allocate(&mut pool, almost), first);
    assert_eq!(allocate(&mut pool, at(10) + QUARANTINE), first);
}

#[test]
fn a_second_release_changes_nothing() {
    let mut pool = VniPool::default();
    let first = allocate(&mut pool, at(0));
    pool.release(first, at(0));
    pool.release(first, at(20));
    assert_eq!(
        allocate(&mut pool, at(0) + QUARANTINE),
        first,
        "the rest is counted from the first release"
    );
    pool.release(vni(77), at(0));
    assert_eq!(pool.in_use(), 1);
}

#[test]
fn a_vni_of_an_earlier_life_is_reclaimed_if_it_could_be_chosen() {
    let mut pool = VniPool::default();
    let mut reclaim = |number| pool.reclaim(vni(number), ip(HIGH), ip(LOW), at(0));
    assert_eq!(reclaim(8), Ok(()));
    assert_eq!(reclaim(8), Err(VniPoolError::Taken(vni(8))), "by another");
    assert_eq!(
        reclaim(9),
        Err(VniPoolError::Taken(vni(9))),
        "the client's to choose"
    );
    assert_eq!(pool.in_use(), 1);
    assert_eq!(
        VniPool::default().reclaim(Vni::MANAGEMENT, ip(LOW), ip(HIGH), at(0)),
        Err(VniPoolError::Reserved(Vni::MANAGEMENT))
    );
}

#[test]
fn a_claimed_vni_is_taken_until_it_is_released() {
    let mut pool = VniPool::default();
    assert_eq!(pool.claim(vni(5), at(0)), Ok(()));
    assert_eq!(pool.claim(vni(5), at(0)), Err(VniPoolError::Taken(vni(5))));
    pool.release(vni(5), at(1));
    assert_eq!(
        pool.claim(vni(5), at(2)),
        Ok(()),
        "the peer may choose one that rests here"
    );
    // The first release's rest ends; the VNI is in use and must not become free by that.
    assert_eq!(
        pool.claim(vni(5), at(1) + QUARANTINE),
        Err(VniPoolError::Taken(vni(5)))
    );
    pool.release(vni(5), at(40));
    let odd = pool.allocate(ip(LOW), ip(HIGH), at(41), || 2).unwrap();
    assert_eq!(odd, vni(7), "5 rests again");
}

#[test]
fn a_rest_is_not_cut_short_by_an_earlier_one() {
    let mut pool = VniPool::default();
    for (claimed, released) in [(0, 0), (5, 20)] {
        pool.claim(vni(2), at(claimed)).unwrap();
        pool.release(vni(2), at(released));
    }
    assert_ne!(allocate(&mut pool, at(0) + QUARANTINE), vni(2));
    assert_eq!(allocate(&mut pool, at(20) + QUARANTINE), vni(2));
}

#[test]
fn the_management_vni_is_never_handed_out() {
    let mut pool = VniPool::default();
    assert_eq!(
        pool.claim(vni(1), at(0)),
        Err(VniPoolError::Reserved(vni(1)))
    );
    assert_eq!(
        pool.allocate(ip(LOW), ip(HIGH), at(0), || 0).unwrap(),
        vni(3)
    );
    let mut pool = VniPool::new(vni(2));
    assert_eq!(allocate(&mut pool, at(0)), vni(4));
}

#[test]
fn a_clock_that_is_set_back_frees_what_rested() {
    let mut pool = VniPool::default();
    let first = allocate(&mut pool, at(1_000_000));
    pool.release(first, at(1_000_000));
    assert_eq!(allocate(&mut pool, at(0)), first);
}

#[test]
fn the_search_wraps_around_the_end() {
    let mut pool = VniPool::default();
    let last = Vni::MAX / 2 - 1;
    let mut allocate = || {
        pool.allocate(ip(HIGH), ip(LOW), at(0), || last)
            .unwrap()
            .get()
    };
    assert_eq!((allocate(), allocate()), (0xff_fffe, 2));
}

#[test]
fn exhaustion_says_how_many_are_in_use() {
    let mut pool = VniPool::small(3);
    for expected in [6, 2, 4] {
        let found = pool.allocate(ip(HIGH), ip(LOW), at(0), || 5).unwrap();
        assert_eq!(found, vni(expected));
    }
    pool.release(vni(2), at(0));
    let error = pool.allocate(ip(HIGH), ip(LOW), at(0), || 5).unwrap_err();
    let expected = VniPoolError::Exhausted {
        parity: "even",
        in_use: 2,
        quarantined: 1,
    };
    assert_eq!(error, expected);
    assert!(
        pool.allocate(ip(LOW), ip(HIGH), at(0), || 5).is_ok(),
        "odd ones are left"
    );
    let rested = pool.allocate(ip(HIGH), ip(LOW), at(0) + QUARANTINE, || 5);
    assert_eq!(rested, Ok(vni(2)));
}

#[test]
fn a_vni_that_is_claimed_rests_no_more() {
    let mut pool = VniPool::small(1);
    pool.claim(vni(2), at(0)).unwrap();
    pool.release(vni(2), at(0));
    pool.claim(vni(2), at(1)).unwrap();
    let error = pool.allocate(ip(HIGH), ip(LOW), at(1), || 0).unwrap_err();
    let expected = VniPoolError::Exhausted {
        parity: "even",
        in_use: 1,
        quarantined: 0,
    };
    assert_eq!(error, expected);
}

#[derive(Debug, Clone)]
enum Step {
    Allocate { client_below: bool, random: u32 },
    Claim(u32),
    Release(usize),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        // Few start points, so that VNIs collide.
        4 => (any::<bool>(), 0u32..6).prop_map(|(client_below, random)| Step::Allocate { client_below, random }),
        2 => (1u32..20).prop_map(Step::Claim),
        3 => (0usize..8).prop_map(Step::Release),
        2 => (0u64..40).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 0..80)
}

proptest! {
    /// Whatever happens, no VNI is handed out that is in use, reserved or at rest, and the parity holds.
    #[test]
    fn an_allocated_vni_was_free(steps in steps()) {
        let mut pool = VniPool::default();
        let mut now = at(0);
        let mut held: Vec<Vni> = Vec::new();
        let mut released: Vec<(Vni, SystemTime)> = Vec::new();
        for step in steps {
            match step {
                Step::Allocate { client_below, random } => {
                    let (local, remote) = if client_below { (HIGH, LOW) } else { (LOW, HIGH) };
                    let found = pool.allocate(ip(local), ip(remote), now, || random).unwrap();
                    prop_assert_eq!(found.get() % 2 == 0, client_below);
                    prop_assert_ne!(found, Vni::MANAGEMENT);
                    prop_assert!(!held.contains(&found));
                    prop_assert!(!released.iter().any(|(vni, when)| *vni == found && now < *when + QUARANTINE));
                    held.push(found);
                }
                Step::Claim(number) => {
                    let expected = match vni(number) {
                        Vni::MANAGEMENT => Err(VniPoolError::Reserved(Vni::MANAGEMENT)),
                        wanted if held.contains(&wanted) => Err(VniPoolError::Taken(wanted)),
                        wanted => { held.push(wanted); Ok(()) }
                    };
                    prop_assert_eq!(pool.claim(vni(number), now), expected);
                }
                Step::Release(index) if index < held.len() => {
                    let vni = held.swap_remove(index);
                    pool.release(vni, now);
                    pool.release(vni, now);
                    released.push((vni, now));
                }
                Step::Release(_) => pool.release(vni(4_000_000), now),
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
            }
            prop_assert_eq!(pool.in_use(), held.len());
            prop_assert_eq!(held.iter().collect::<HashSet<_>>().len(), held.len());
        }
    }
}
