//! How things are shared out among callers.

use std::collections::HashMap;

use ipnet::IpNet;
use proptest::prelude::*;

use crate::identity::{
    Caller, NetnsCookie, Process,
    relay::Relays,
    share::{Holder, Limit, NoShare, Shares},
};

const LIMIT: Limit = Limit {
    all: 128,
    of_one: 48,
};

/// Hosts of networks that have nothing to do with each other.
fn far(network: u8) -> Holder {
    beside(network, 1)
}

/// A host of a network.
fn beside(network: u8, last: u8) -> Holder {
    Holder::at(Some([192, 0, network, last].into()), &Relays::default())
}

fn near(user: u32) -> Holder {
    Holder::process(Some(user), Some(NetnsCookie(1)))
}

/// Takes one after another, as many as there are.
fn take_all(shares: &mut Shares, holder: Holder, limit: Limit) -> usize {
    (0..)
        .take_while(|_| shares.take(holder, 1, limit).is_ok())
        .count()
}

#[test]
fn one_has_its_limit_and_gives_it_back() {
    let mut shares = Shares::default();
    let limit = Limit {
        all: 128,
        of_one: 3,
    };
    assert_eq!(take_all(&mut shares, far(1), limit), 3);
    assert_eq!(shares.take(far(1), 1, limit), Err(NoShare::OfOne));
    shares.give_back(far(1), 2);
    assert_eq!((shares.of(far(1)), shares.all()), (1, 1));
    assert_eq!(shares.take(far(1), 3, limit), Err(NoShare::OfOne));
    assert_eq!(shares.take(far(1), 2, limit), Ok(()));
    shares.give_back(far(1), 3);
    assert_eq!((shares.holders(), shares.all()), (0, 0));
}

#[test]
fn a_few_of_the_network_leave_room_for_others_for_the_node_and_for_our_own() {
    let mut shares = Shares::default();
    // Of 128 the network may have 96, and the last 24 of these are for those that have two at most.
    let taken = [1, 2, 3, 4].map(|last| take_all(&mut shares, far(last), LIMIT));
    assert_eq!(taken, [48, 24, 2, 2]);
    assert_eq!(shares.take(far(1), 1, LIMIT), Err(NoShare::OfOne));
    assert_eq!(shares.take(far(2), 1, LIMIT), Err(NoShare::Reserved));
    assert_eq!(shares.take(far(5), 2, LIMIT), Ok(()));
    assert_eq!(shares.take(near(1), 10, LIMIT), Ok(()));
    let left = 128 - shares.all();
    assert!(left > 16);
    assert_eq!(take_all(&mut shares, Holder::our_own(), LIMIT), left);
    assert_eq!(shares.take(Holder::our_own(), 1, LIMIT), Err(NoShare::All));
    assert_eq!(shares.take(far(6), 1, LIMIT), Err(NoShare::All));
}

/// However many addresses of a network take part, others have most of the last quarter.
#[test]
fn neighbours_are_one_holder_where_little_is_left() {
    let v6 = |site: u16| {
        let address = format!("2001:db8:{site:x}:7::1").parse().unwrap();
        Holder::at(Some(address), &Relays::default())
    };
    let v6_beside = |network: u16| {
        let address = format!("2001:db8:1:{network:x}::1").parse().unwrap();
        Holder::at(Some(address), &Relays::default())
    };
    let mut shares = Shares::default();
    for last in 0..=255 {
        take_all(&mut shares, beside(1, last), LIMIT);
    }
    for network in 0..256 {
        take_all(&mut shares, v6_beside(network), LIMIT);
    }
    // Of 128 the network may have 96; each of the two has had its 64th beyond the first three quarters of that.
    assert!((72..=76).contains(&shares.all()), "{}", shares.all());
    for network in 2..8 {
        assert_eq!(take_all(&mut shares, far(network), LIMIT), 2);
    }
    assert_eq!(take_all(&mut shares, v6(2), LIMIT), 2);
    // What is given back is forgotten.
    for last in 0..=255 {
        let held = shares.of(beside(1, last));
        shares.give_back(beside(1, last), held);
    }
    assert!(shares.take(beside(1, 77), 2, LIMIT).is_ok());
}

#[test]
fn ranks_follow_from_the_transport() {
    let relays = Relays {
        relay_for: vec!["192.0.2.7/32".parse::<IpNet>().unwrap()],
        registrants: Vec::new(),
    };
    let root = Process {
        is_administrator: true,
        ..Process::unknown()
    };
    let at = |last: u8| Caller::from_address(Some([192, 0, 2, last].into()));
    for (caller, is_own) in [
        (Caller::on_node(root), true),
        (Caller::on_node(Process::unknown()), false),
        (Caller::nsmgr(Process::unknown()), true),
        (at(7), true),
        (at(8), false),
        (Caller::over_network(), false),
    ] {
        let holder = Holder::of(&caller, &relays);
        let taken = take_all(&mut Shares::default(), holder, LIMIT);
        assert_eq!(taken == 128, is_own, "{caller:?}: {taken}");
    }
}

#[test]
fn a_network_of_ipv6_is_one_holder() {
    let at = |text: &str| Holder::at(Some(text.parse().unwrap()), &Relays::default());
    assert_eq!(at("2001:db8::1"), at("2001:db8::ffff:1"));
    assert_ne!(at("2001:db8::1"), at("2001:db8:0:1::1"));
    assert_eq!(at("::ffff:192.0.2.1"), far(2));
    assert_ne!(far(1), far(2));
}

proptest! {
    /// Whatever holders do: the sums are right, our own have an eighth left, and the last quarter goes to those that have little.
    #[test]
    fn nobody_takes_what_is_kept_for_others(calls in prop::collection::vec((0_u8..12, any::<bool>(), 1_usize..9), 0..400)) {
        let limit = Limit { all: 256, of_one: 200 };
        let mut shares = Shares::default();
        let mut held = HashMap::<Holder, usize>::new();
        for (who, takes, amount) in calls {
            let is_far = who % 2 == 0;
            let holder = if is_far { far(who) } else { near(who.into()) };
            let of_one = held.entry(holder).or_default();
            if !takes {
                let amount = amount.min(*of_one);
                shares.give_back(holder, amount);
                *of_one -= amount;
            } else if shares.take(holder, amount, limit).is_ok() {
                *of_one += amount;
                let (mine, all) = (*of_one, held.values().sum::<usize>());
                let of_rank: usize = held.iter().filter(|(it, _)| it.rank() == holder.rank()).map(|(_, it)| it).sum();
                prop_assert!(all <= 224 && of_rank <= 192);
                prop_assert!(mine <= 4 || of_rank <= 144, "{mine} of {all}, {of_rank}");
            }
            prop_assert_eq!(shares.of(holder), held[&holder]);
            prop_assert_eq!(shares.all(), held.values().sum::<usize>());
        }
    }
}
