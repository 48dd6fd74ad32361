use std::time::Duration;

use crate::{
    clock::Monotonic,
    liveness::{Card, Look, Stages},
};

fn stages(link_out: u64, card_out: u64, card_in: u64, link_in: u64) -> Stages {
    Stages {
        link_out,
        card_out: Some(card_out),
        card_in: Some(card_in),
        link_in,
    }
}

fn at(seconds: u64) -> Monotonic {
    Monotonic::from_nanos(1_000_000_000_000) + Duration::from_secs(seconds)
}

const GOOD: Look = Look {
    card: true,
    link: true,
};
const NO_CARD: Look = Look {
    card: false,
    ..GOOD
};
const NO_LINK: Look = Look {
    link: false,
    ..GOOD
};

#[test]
fn what_counts_along_is_believed() {
    let mut card = Card::default();
    let now = stages(100, 100, 100, 100);
    card.note_up(&now, true);
    let later = stages(104, 103, 104, 103);
    let since = later.since(&now);
    assert!(!card.poll_look(&since, at(0)), "nothing to look at");
    assert_eq!(card.trusted(&later, &since), later);
}

#[test]
fn a_filter_is_told_only_after_a_look() {
    let mut card = Card::default();
    let up = stages(100, 100, 100, 100);
    card.note_up(&up, true);
    let now = stages(120, 100, 110, 100);
    let since = now.since(&up);
    let silent = card.trusted(&now, &since);
    assert_eq!((silent.card_out, silent.card_in), (None, None));
    assert!(card.poll_look(&since, at(0)));
    assert!(!card.poll_look(&since, at(0)), "asked already");
    let mut when_up = up;
    card.handle_look(GOOD, &now, &mut when_up);
    assert_eq!(card.trusted(&now, &since), now);
    assert_eq!(when_up, up);
    assert!(card.poll_look(&since, at(1)), "things change");
    // Each look is about its own way.
    card.handle_look(NO_LINK, &now, &mut when_up);
    let half = card.trusted(&now, &since);
    assert_eq!((half.card_out, half.card_in), (Some(100), None));
    assert_eq!(when_up, stages(100, 100, 110, 100));
    when_up = up;
    card.handle_look(NO_CARD, &now, &mut when_up);
    let half = card.trusted(&now, &since);
    assert_eq!((half.card_out, half.card_in), (None, Some(110)));
    assert_eq!(when_up, stages(120, 100, 100, 100));
    // What was found of one loss says nothing of the next.
    card.handle_look(GOOD, &now, &mut when_up);
    card.note_up(&stages(130, 110, 120, 110), true);
    assert_eq!(card.trusted(&now, &since).card_out, None);
}

#[test]
fn a_card_that_did_not_count_along_is_not_believed_whatever_hangs_there() {
    let mut card = Card::default();
    card.note_up(&stages(100, 100, 100, 100), true);
    // Too few to say anything, until they are more.
    card.note_up(&stages(102, 100, 100, 102), true);
    let none = Stages::default();
    assert!(!card.poll_look(&none, at(0)));
    // What is under way may have been lost before the card.
    card.note_up(&stages(104, 100, 100, 104), false);
    assert!(!card.poll_look(&none, at(0)));
    card.note_up(&stages(104, 100, 100, 104), true);
    assert!(card.poll_look(&none, at(0)));
    let now = stages(120, 100, 100, 104);
    card.handle_look(GOOD, &now, &mut Stages::default());
    assert_eq!(card.trusted(&now, &none).card_out, None);
    // It counts again.
    card.note_up(&stages(110, 106, 104, 108), true);
    assert!(!card.poll_look(&none, at(9)));
    assert_eq!(card.trusted(&now, &none).card_out, Some(100));
}

#[test]
fn a_way_that_is_never_counted_hides_no_filter_on_the_other() {
    let mut card = Card::default();
    let mut when_up = stages(100, 100, 100, 100);
    card.note_up(&when_up, true);
    for second in 1..10 {
        // Nothing is counted at the card that packets leave by, and nothing passes this node's input.
        let now = stages(100 + 20 * second, 100, 100 + 20 * second, 100);
        let since = now.since(&when_up);
        assert!(card.poll_look(&since, at(second)));
        card.handle_look(NO_CARD, &now, &mut when_up);
        let believed = card.trusted(&now, &now.since(&when_up)).since(&when_up);
        let lost = believed.card_in.map(|came| came - believed.link_in);
        assert_eq!(lost, Some(20 * second));
    }
}

#[test]
fn where_nothing_counts_there_is_nothing_to_look_at() {
    let mut card = Card::default();
    let nothing = Stages {
        link_out: 50,
        card_out: None,
        card_in: None,
        link_in: 40,
    };
    card.note_up(&nothing, true);
    assert!(!card.poll_look(&nothing, at(0)));
    assert_eq!(card.trusted(&nothing, &nothing), nothing);
}
