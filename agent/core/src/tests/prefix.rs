use std::{collections::HashSet, net::IpAddr};

use ipnet::IpNet;
use proptest::prelude::*;

use crate::address::prefix::{Pair, PrefixError, PrefixPool};

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn pool(texts: &[&str]) -> PrefixPool {
    PrefixPool::new(nets(texts)).unwrap()
}

fn pair(src: &str, dst: &str) -> Pair {
    Pair {
        src: src.parse().unwrap(),
        dst: dst.parse().unwrap(),
    }
}

#[test]
fn the_lowest_hosts_come_first() {
    let mut pool = pool(&["172.16.1.0/24"]);
    assert_eq!(
        pool.allocate(&[]),
        Ok(pair("172.16.1.2/32", "172.16.1.1/32"))
    );
    assert_eq!(
        pool.allocate(&[]),
        Ok(pair("172.16.1.4/32", "172.16.1.3/32"))
    );
    assert_eq!(pool.in_use(), 2);
    let mut pool = self::pool(&["fd00:1::/64"]);
    assert_eq!(
        pool.allocate(&[]),
        Ok(pair("fd00:1::2/128", "fd00:1::1/128"))
    );
}

#[test]
fn network_and_broadcast_are_left_out_where_there_are_any() {
    let count = |prefix: &str| {
        let mut pool = pool(&[prefix]);
        (0..).take_while(|_| pool.allocate(&[]).is_ok()).count()
    };
    assert_eq!(count("192.0.2.0/31"), 1);
    assert_eq!(count("192.0.2.0/30"), 1);
    assert_eq!(count("192.0.2.0/29"), 3);
    assert_eq!(count("fd00::/127"), 1);
    assert_eq!(count("fd00::/126"), 1);
    assert_eq!(count("fd00::/125"), 3);
    // The very ends of the address space.
    assert_eq!(count("255.255.255.252/30"), 1);
    assert_eq!(count("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127"), 1);
}

#[test]
fn a_bad_prefix_is_refused_at_the_start() {
    let error = |texts: &[&str]| PrefixPool::new(nets(texts)).unwrap_err();
    assert_eq!(error(&[]), PrefixError::Empty);
    assert!(matches!(error(&["192.0.2.1/32"]), PrefixError::TooSmall(_)));
    assert!(matches!(error(&["fd00::1/128"]), PrefixError::TooSmall(_)));
    assert!(matches!(
        error(&["10.0.0.0/8", "10.1.0.0/16"]),
        PrefixError::Overlap { .. }
    ));
    assert!(matches!(
        error(&["10.1.0.0/16", "fd00::/64", "10.0.0.0/8"]),
        PrefixError::Overlap { .. }
    ));
    assert!(PrefixPool::new(nets(&["0.0.0.0/0", "::/0"])).is_ok());
}

#[test]
fn host_bits_of_a_prefix_do_not_count() {
    assert_eq!(
        pool(&["172.16.1.77/24"]).allocate(&[]),
        Ok(pair("172.16.1.2/32", "172.16.1.1/32"))
    );
}

#[test]
fn excluded_prefixes_are_jumped_over() {
    let mut pool = pool(&["172.16.1.0/24"]);
    let excluded = nets(&[
        "172.16.1.2/32",
        "172.16.1.4/30",
        "172.16.1.4/31",
        "10.0.0.0/8",
        "fd00::/8",
    ]);
    assert_eq!(
        pool.allocate(&excluded),
        Ok(pair("172.16.1.3/32", "172.16.1.1/32"))
    );
    assert_eq!(
        pool.allocate(&excluded),
        Ok(pair("172.16.1.9/32", "172.16.1.8/32"))
    );
    assert_eq!(
        pool.allocate(&[]),
        Ok(pair("172.16.1.4/32", "172.16.1.2/32")),
        "another client excludes nothing"
    );
}

#[test]
fn the_next_prefix_is_used_when_the_first_is_full() {
    let mut pool = pool(&["192.0.2.0/30", "198.51.100.0/30"]);
    assert_eq!(
        pool.allocate(&nets(&["192.0.2.2/32"])),
        Ok(pair("198.51.100.2/32", "198.51.100.1/32")),
        "a pair is of one prefix"
    );
    assert_eq!(pool.allocate(&[]), Ok(pair("192.0.2.2/32", "192.0.2.1/32")));
    let error = pool.allocate(&nets(&["10.0.0.0/8"])).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains(
            "192.0.2.0/30, 198.51.100.0/30: 2 connections use it and 1 prefixes are excluded"
        ),
        "{message}"
    );
}

#[test]
fn a_huge_prefix_with_huge_exclusions_is_no_work() {
    let mut pool = pool(&["fd00::/16"]);
    let found = pool
        .allocate(&nets(&["fd00::/17", "fd00:8000::/18", "fd00:c000::/126"]))
        .unwrap();
    assert_eq!(found.dst, "fd00:c000::4/128".parse::<IpNet>().unwrap());
    assert!(matches!(
        pool.allocate(&nets(&["::/0"])),
        Err(PrefixError::Exhausted { excluded: 1, .. })
    ));
}

#[test]
fn a_pair_is_taken_up_again_after_a_restart() {
    let mut pool = pool(&["172.16.1.0/24", "172.16.2.0/24"]);
    let kept = pair("172.16.1.2/32", "172.16.1.1/32");
    assert_eq!(pool.reserve(kept), Ok(()));
    assert_eq!(pool.reserve(kept), Err(PrefixError::Taken(kept)));
    assert_eq!(
        pool.allocate(&[]),
        Ok(pair("172.16.1.4/32", "172.16.1.3/32"))
    );
    let half = pair("172.16.1.9/32", "172.16.1.1/32");
    assert_eq!(pool.reserve(half), Err(PrefixError::Taken(half)));
    for (src, dst) in [
        ("10.0.0.1/32", "172.16.1.9/32"),
        ("172.16.1.9/32", "172.16.2.9/32"),
        ("172.16.1.9/32", "172.16.1.9/32"),
        ("172.16.1.9/24", "172.16.1.8/32"),
        ("172.16.1.0/32", "172.16.1.9/32"),
        ("172.16.1.9/32", "172.16.1.255/32"),
        ("fd00::1/128", "172.16.1.9/32"),
    ] {
        assert!(
            matches!(
                pool.reserve(pair(src, dst)),
                Err(PrefixError::NotOurs { .. })
            ),
            "{src} {dst}"
        );
    }
    assert_eq!(pool.in_use(), 2);
}

#[test]
fn only_a_pair_in_use_is_given_back() {
    let mut pool = pool(&["172.16.1.0/24"]);
    let first = pool.allocate(&[]).unwrap();
    let second = pool.allocate(&[]).unwrap();
    pool.release(&Pair {
        src: first.src,
        dst: second.dst,
    });
    pool.release(&pair("172.16.1.100/32", "172.16.1.101/32"));
    assert_eq!(pool.in_use(), 2);
    pool.release(&first);
    pool.release(&first);
    assert_eq!(pool.in_use(), 1);
    assert_eq!(pool.allocate(&[]), Ok(first));
}

#[test]
fn a_refresh_sees_that_its_addresses_became_excluded() {
    let pair = pair("172.16.1.2/32", "172.16.1.1/32");
    assert!(pair.is_excluded(&nets(&["10.0.0.0/8", "172.16.1.2/31"])));
    assert!(pair.is_excluded(&nets(&["172.16.1.1/32"])));
    assert!(!pair.is_excluded(&nets(&["172.16.1.4/30", "fd00::/8"])));
}

#[derive(Debug, Clone)]
enum Step {
    Allocate(Vec<IpNet>),
    Release(usize),
    Reserve(u8, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let excluded = (0u8..64, 26u8..=32)
        .prop_map(|(host, len)| IpNet::new(IpAddr::from([10, 0, 0, host]), len).unwrap());
    let step = prop_oneof![
        4 => prop::collection::vec(excluded, 0..4).prop_map(Step::Allocate),
        3 => (0usize..10).prop_map(Step::Release),
        2 => (0u8..64, 0u8..64).prop_map(|(src, dst)| Step::Reserve(src, dst)),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Against a plain set of the addresses in use: none is handed out twice, excluded, or of no host; a refusal is true; and when all
    /// is given back, the pool is as new.
    #[test]
    fn what_is_handed_out_was_free(steps in steps()) {
        let prefixes = ["10.0.0.0/28", "10.0.0.32/29"];
        let mut pool = pool(&prefixes);
        let mut held: Vec<Pair> = Vec::new();
        for step in steps {
            let used: HashSet<IpAddr> = held.iter().flat_map(|pair| [pair.src.addr(), pair.dst.addr()]).collect();
            let is_free = |host: &IpAddr, excluded: &[IpNet]| !used.contains(host) && !excluded.iter().any(|net| net.contains(host));
            match step {
                Step::Allocate(excluded) => match pool.allocate(&excluded) {
                    Ok(pair) => {
                        prop_assert_ne!(pair.src, pair.dst);
                        prop_assert!(!pair.is_excluded(&excluded));
                        for host in [pair.src.addr(), pair.dst.addr()] {
                            prop_assert!(is_free(&host, &excluded));
                        }
                        let of_one = |net: &IpNet| net.hosts().any(|h| h == pair.src.addr()) && net.hosts().any(|h| h == pair.dst.addr());
                        prop_assert!(nets(&prefixes).iter().any(of_one));
                        held.push(pair);
                    }
                    Err(_) => for net in nets(&prefixes) {
                        prop_assert!(net.hosts().filter(|host| is_free(host, &excluded)).count() < 2);
                    },
                },
                Step::Release(index) if index < held.len() => {
                    let pair = held.swap_remove(index);
                    pool.release(&pair);
                    pool.release(&pair);
                }
                Step::Release(_) => {}
                Step::Reserve(src, dst) => {
                    let host = |last: u8| IpNet::from(IpAddr::from([10, 0, 0, last]));
                    let pair = Pair { src: host(src), dst: host(dst) };
                    if pool.reserve(pair).is_ok() {
                        prop_assert!(is_free(&pair.src.addr(), &[]) && is_free(&pair.dst.addr(), &[]));
                        held.push(pair);
                    }
                }
            }
            prop_assert_eq!(pool.in_use(), held.len());
        }
        held.iter().for_each(|pair| pool.release(pair));
        let mut fresh = self::pool(&prefixes);
        loop {
            let (ours, theirs) = (pool.allocate(&[]), fresh.allocate(&[]));
            prop_assert_eq!(&ours, &theirs);
            if ours.is_err() { break }
        }
    }
}
