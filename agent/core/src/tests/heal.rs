use std::time::Duration;

use crate::{clock::Monotonic, nsm::heal::*};

const UNHEARD: Loss = Loss::ControlPlane { is_path_good: true };
const BLIND: Loss = Loss::ControlPlane {
    is_path_good: false,
};

const LOSSES: [Loss; 7] = [
    Loss::Agent,
    Loss::Link,
    UNHEARD,
    BLIND,
    Loss::Path,
    Loss::Refused,
    Loss::Endpoint,
];

const FAILURES: [Failure; 5] = [
    Failure::Agent,
    Failure::Silence,
    Failure::Unavailable,
    Failure::Unknown,
    Failure::Refused,
];

const KEEPING: Step = Step::Reselect { closes: false };
const CLOSING: Step = Step::Reselect { closes: true };
const MOMENT: Duration = Duration::from_millis(1);

fn start() -> Monotonic {
    Monotonic::from_nanos(1_000_000_000)
}

fn lost(loss: Loss) -> Healer {
    let mut healer = Healer::default();
    healer.handle_loss(loss, STABLE, start(), 0.5);
    healer
}

#[test]
fn what_is_lost_decides_what_is_asked_for() {
    for (loss, expected) in [
        (Loss::Agent, Step::Same),
        (UNHEARD, Step::Same),
        (BLIND, Step::Same),
        (Loss::Link, Step::Same),
        (Loss::Path, KEEPING),
        (Loss::Refused, KEEPING),
        (Loss::Endpoint, CLOSING),
    ] {
        let step = Healer::default().handle_loss(loss, STABLE, start(), 0.5);
        assert_eq!(step, (expected, Duration::ZERO), "{loss:?}");
    }
}

/// Every loss with every failure, at once and when no patience is left.
#[test]
fn what_a_failed_try_means_depends_on_what_was_lost() {
    use Failure::{Agent, Refused, Silence, Unavailable, Unknown};
    for loss in LOSSES {
        for failure in FAILURES {
            for is_late in [false, true] {
                let expected = match (loss, failure, is_late) {
                    (Loss::Path | Loss::Refused, _, _) => KEEPING,
                    (Loss::Endpoint, _, _) => CLOSING,
                    (Loss::Agent, Agent | Silence, _) => Step::Same,
                    // It is back: from now on what lies behind it is waited for.
                    (Loss::Agent, Unavailable | Unknown, _) => Step::Same,
                    // A refusal is no proof that packets do not pass.
                    (Loss::Agent | Loss::Link | Loss::ControlPlane { .. }, Refused, _) => KEEPING,
                    (Loss::Link | Loss::ControlPlane { .. }, _, false) => Step::Same,
                    (Loss::Link | Loss::ControlPlane { .. }, _, true) => KEEPING,
                };
                let patience = match loss {
                    BLIND => BLIND_PATIENCE,
                    _ => PATIENCE,
                };
                let at = start() + if is_late { patience } else { patience - MOMENT };
                let mut healer = lost(loss);
                let (step, _) = healer.handle_failure(failure, at, 0.5);
                assert_eq!(
                    step, expected,
                    "{loss:?}, then {failure:?}, late: {is_late}"
                );
                if step == Step::Same {
                    continue;
                }
                // For good: nothing that others say makes the old one wanted again, or worse than it was.
                for later in FAILURES {
                    let (step, _) = healer.handle_failure(later, at, 0.5);
                    assert_eq!(step, expected, "{loss:?}, {failure:?}, then {later:?}");
                }
            }
        }
    }
}

/// An agent that has been started again may be there before those that it asks.
#[test]
fn an_agent_that_is_back_may_need_a_moment() {
    for failure in [Failure::Unavailable, Failure::Unknown] {
        let mut healer = lost(Loss::Agent);
        let back = start() + Duration::from_secs(20);
        let mut ask = |failure, after| healer.handle_failure(failure, back + after, 0.5).0;
        assert_eq!(ask(Failure::Agent, Duration::ZERO), Step::Same);
        assert_eq!(ask(failure, MOMENT), Step::Same);
        assert_eq!(ask(failure, BLIND_PATIENCE), Step::Same);
        assert_eq!(ask(failure, BLIND_PATIENCE + MOMENT), KEEPING);
    }
}

/// What is told of the path while its agent is waited for decides how long that is worth it.
#[test]
fn a_path_that_is_seen_no_more_is_waited_for_less() {
    let after = |times: &[(Loss, u64)], seconds| {
        let mut healer = lost(times[0].0);
        for (news, at) in &times[1..] {
            let at = start() + Duration::from_secs(*at);
            assert_eq!(healer.handle_news(*news, at), None);
        }
        let at = start() + Duration::from_secs(seconds);
        healer.handle_failure(Failure::Unavailable, at, 0.5).0
    };
    let turns_blind = [(UNHEARD, 0), (BLIND, 30), (BLIND, 35)];
    assert_eq!(after(&turns_blind, 39), Step::Same);
    assert_eq!(after(&turns_blind, 40), KEEPING);
    assert_eq!(after(&[(UNHEARD, 0), (BLIND, 55)], 60), KEEPING);
    let turns_good = [(BLIND, 0), (UNHEARD, 5)];
    assert_eq!(after(&turns_good, 59), Step::Same);
    assert_eq!(after(&turns_good, 60), KEEPING);
}

#[test]
fn an_endpoint_may_be_unknown_while_it_registers_again() {
    let back = start() + Duration::from_secs(20);
    let mut healer = lost(UNHEARD);
    let mut ask = |failure, after| healer.handle_failure(failure, back + after, 0.5).0;
    assert_eq!(ask(Failure::Unavailable, Duration::ZERO), Step::Same);
    assert_eq!(ask(Failure::Unknown, MOMENT), Step::Same);
    // Its agent went once more: it has as much time again.
    assert_eq!(ask(Failure::Unavailable, REGISTERS_AGAIN), Step::Same);
    assert_eq!(ask(Failure::Unknown, REGISTERS_AGAIN), Step::Same);
    assert_eq!(
        ask(Failure::Unknown, 2 * REGISTERS_AGAIN - MOMENT),
        Step::Same
    );
    // A registry may have forgotten what stands: it stands until another does.
    assert_eq!(ask(Failure::Unknown, 2 * REGISTERS_AGAIN), KEEPING);
}

/// What else is lost counts only as long as the same endpoint is asked for.
#[test]
fn news_count_while_the_control_plane_is_waited_for() {
    for loss in LOSSES {
        for news in LOSSES {
            let expected = match (loss, news) {
                (Loss::Link | Loss::ControlPlane { .. }, Loss::Path | Loss::Refused) => {
                    Some(KEEPING)
                }
                (Loss::Link | Loss::ControlPlane { .. }, Loss::Endpoint) => Some(CLOSING),
                _ => None,
            };
            let mut healer = lost(loss);
            let before = lost(loss).handle_failure(Failure::Silence, start(), 0.5).0;
            assert_eq!(
                healer.handle_news(news, start()),
                expected,
                "{loss:?}, {news:?}"
            );
            let (step, _) = healer.handle_failure(Failure::Silence, start(), 0.5);
            assert_eq!(step, expected.unwrap_or(before), "{loss:?}, {news:?}");
        }
    }
    assert_eq!(Healer::default().handle_news(Loss::Path, start()), None);
}

#[test]
fn a_refresh_that_fails_says_what_is_lost() {
    for (failure, loss) in [
        (Failure::Agent, Loss::Agent),
        (Failure::Silence, BLIND),
        (Failure::Unavailable, BLIND),
        (Failure::Unknown, BLIND),
        (Failure::Refused, Loss::Refused),
    ] {
        assert_eq!(failure.loss(), loss);
    }
}

/// Only the endpoint's own end closes what stands: a refresh that fails, for whatever reason and how often, does not.
#[test]
fn a_refresh_that_fails_closes_nothing() {
    for failure in FAILURES {
        let mut healer = Healer::default();
        let mut step = healer.handle_loss(failure.loss(), STABLE, start(), 0.5).0;
        for (seconds, next) in (0..).step_by(7).zip(FAILURES.into_iter().cycle().take(20)) {
            assert_ne!(step, CLOSING, "{failure:?}");
            let at = start() + Duration::from_secs(seconds);
            step = healer.handle_failure(next, at, 0.5).0;
        }
    }
}

#[test]
fn tries_that_fail_wait_longer() {
    let mut healer = Healer::default();
    healer.handle_loss(UNHEARD, STABLE, start(), 1.0);
    let (_, first) = healer.handle_failure(Failure::Unavailable, start(), 1.0);
    assert_eq!(first, 3 * SHORTEST_WAIT);
    let (_, second) = healer.handle_failure(Failure::Unavailable, start(), 1.0);
    assert!(second > first);
}

#[test]
fn a_connection_that_comes_and_goes_is_asked_for_slower() {
    let mut healer = Healer::default();
    let waits: Vec<_> = (0..4)
        .map(|_| {
            healer
                .handle_loss(Loss::Endpoint, Duration::ZERO, start(), 1.0)
                .1
        })
        .collect();
    assert!(waits.is_sorted() && waits[1] < waits[3], "{waits:?}");
    assert_eq!(waits[0], Duration::ZERO, "the first loss");
    let again = healer.handle_loss(Loss::Path, STABLE, start(), 1.0);
    assert_eq!(again, (KEEPING, Duration::ZERO));
}

#[test]
fn a_bad_grant_is_looked_at_again_after_a_wait() {
    let mut healer = Healer::default();
    assert_eq!(healer.handle_bad_grant(start(), 1.0), 3 * SHORTEST_WAIT);
    let (step, wait) = healer.handle_loss(Loss::Path, Duration::ZERO, start(), 1.0);
    assert_eq!(step, KEEPING);
    assert!(wait > 3 * SHORTEST_WAIT, "it came and went");
}
