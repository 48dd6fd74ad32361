use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::at;
use crate::nsm::expiry::{MIN_REFRESH, close_after, granted_expiry, refresh_after};

#[test]
fn the_earliest_bound_is_granted() {
    let max = Duration::from_secs(600);
    assert_eq!(granted_expiry(at(0), None, &[], max), at(600));
    assert_eq!(
        granted_expiry(at(0), Some(at(700)), &[at(900)], max),
        at(600)
    );
    assert_eq!(
        granted_expiry(at(0), Some(at(60)), &[at(90), at(30)], max),
        at(30)
    );
    assert_eq!(
        granted_expiry(at(100), Some(at(60)), &[], max),
        at(100),
        "never in the past"
    );
}

#[test]
fn no_maximum_overflows() {
    assert_eq!(
        granted_expiry(at(0), Some(at(5)), &[], Duration::MAX),
        at(5)
    );
    assert!(granted_expiry(at(0), None, &[], Duration::MAX) > at(1_000_000));
}

#[test]
fn a_refresh_leaves_a_third() {
    assert_eq!(refresh_after(at(0), at(600)), Duration::from_secs(400));
    assert_eq!(refresh_after(at(0), at(0)), MIN_REFRESH);
    assert_eq!(refresh_after(at(10), at(0)), MIN_REFRESH);
}

#[test]
fn a_connection_is_closed_before_its_token_is_dead() {
    let seconds = Duration::from_secs;
    assert_eq!(close_after(seconds(600)), seconds(597));
    assert_eq!(close_after(seconds(24)), seconds(21));
    assert_eq!(close_after(seconds(8)), seconds(7));
    assert_eq!(close_after(Duration::ZERO), Duration::ZERO);
}

proptest! {
    #[test]
    fn what_is_granted_keeps_every_bound(requested: Option<u32>, bounds in prop::collection::vec(any::<u32>(), 0..5), max: u32) {
        let moment = |seconds: &u32| SystemTime::UNIX_EPOCH + Duration::from_secs((*seconds).into());
        let now = moment(&1_000_000_000);
        let requested = requested.as_ref().map(moment);
        let bounds: Vec<_> = bounds.iter().map(moment).collect();
        let max = Duration::from_secs(max.into());
        let granted = granted_expiry(now, requested, &bounds, max);
        prop_assert!(granted >= now && granted <= now + max);
        for bound in bounds.iter().chain(&requested) {
            prop_assert!(granted <= *bound || granted == now);
        }
        let wait = refresh_after(now, granted);
        prop_assert!(wait >= MIN_REFRESH);
        prop_assert!(wait == MIN_REFRESH || now + wait < granted);
    }
}
