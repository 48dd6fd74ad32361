use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::map;
use crate::nsm::select::{Candidate, Destination, Match, select};

type Labels = BTreeMap<String, String>;

fn route(selector: &[(&str, &str)], weight: u32) -> Destination {
    Destination {
        selector: map(selector),
        weight,
    }
}

fn rule(source: &[(&str, &str)], routes: Vec<Destination>) -> Match {
    Match {
        source: map(source),
        routes,
        fallthrough: false,
    }
}

fn candidates(labels: &[Labels]) -> Vec<Candidate<'_>> {
    labels
        .iter()
        .map(|labels| Candidate {
            name: "nse",
            labels,
        })
        .collect()
}

/// The choice by a client with these labels, among endpoints with those, on turn 0.
fn choice(rules: &[Match], source: &[(&str, &str)], endpoints: &[&[(&str, &str)]]) -> Vec<usize> {
    let labels: Vec<_> = endpoints.iter().map(|labels| map(labels)).collect();
    select(rules, &map(source), &candidates(&labels), 0)
}

#[test]
fn without_rules_all_take_turns() {
    let labels = vec![Labels::new(); 3];
    let turn = |turn| select(&[], &Labels::new(), &candidates(&labels), turn);
    assert_eq!(turn(0), [0, 1, 2]);
    assert_eq!(turn(1), [1, 2, 0]);
    assert_eq!(turn(2), [2, 0, 1]);
    assert_eq!(turn(3), [0, 1, 2]);
    assert_eq!(turn(u64::MAX).len(), 3);
    assert!(select(&[], &Labels::new(), &[], 7).is_empty());
}

#[test]
fn the_first_rule_that_fits_the_client_decides() {
    let rules = [
        rule(
            &[("app", "firewall")],
            vec![route(&[("app", "gateway")], 1)],
        ),
        rule(&[], vec![route(&[("app", "firewall")], 1)]),
    ];
    let endpoints: [&[(&str, &str)]; 2] = [&[("app", "firewall")], &[("app", "gateway")]];
    assert_eq!(
        choice(&rules, &[("app", "firewall"), ("x", "y")], &endpoints),
        [1]
    );
    assert_eq!(choice(&rules, &[("app", "client")], &endpoints), [0]);
    assert_eq!(choice(&rules, &[], &endpoints), [0]);
    assert!(
        choice(&rules[..1], &[], &endpoints).is_empty(),
        "no rule for this client"
    );
}

#[test]
fn only_a_rule_with_fallthrough_gives_way() {
    let endpoints: [&[(&str, &str)]; 1] = [&[("app", "b")]];
    let mut rules = [
        rule(&[], vec![route(&[("app", "a")], 1)]),
        rule(&[], vec![route(&[("app", "b")], 1)]),
    ];
    assert!(choice(&rules, &[], &endpoints).is_empty());
    rules[0].fallthrough = true;
    assert_eq!(choice(&rules, &[], &endpoints), [0]);
    rules[1].routes.clear();
    assert!(
        choice(&rules, &[], &endpoints).is_empty(),
        "a rule without routes lets none serve"
    );
}

#[test]
fn a_rule_with_metadata_only_lets_every_endpoint_serve() {
    let endpoints: [&[(&str, &str)]; 2] = [&[], &[("a", "b")]];
    let wire = |fallthrough, metadata| {
        [Match::from_wire(
            Labels::new(),
            vec![],
            fallthrough,
            metadata,
        )]
    };
    assert_eq!(choice(&wire(false, true), &[], &endpoints), [0, 1]);
    assert!(choice(&wire(false, false), &[], &endpoints).is_empty());
    assert!(choice(&wire(true, true), &[], &endpoints).is_empty());
}

#[test]
fn a_selector_is_filled_with_the_clients_labels() {
    let node = |value| [rule(&[], vec![route(&[("node", value)], 1)])];
    let endpoints: [&[(&str, &str)]; 2] = [&[("node", "n1")], &[("node", "n2")]];
    assert_eq!(
        choice(&node("{{.node}}"), &[("node", "n2")], &endpoints),
        [1]
    );
    assert_eq!(
        choice(&node("{{ .node }}"), &[("node", "n1")], &endpoints),
        [0]
    );
    assert_eq!(
        choice(&node("{{.a}}{{.b}}"), &[("a", "n"), ("b", "2")], &endpoints),
        [1]
    );
    assert_eq!(choice(&node("n{{.b}}"), &[("b", "1")], &endpoints), [0]);
    assert!(
        choice(&node("{{.node}}"), &[], &endpoints).is_empty(),
        "the client does not say its node"
    );
    let dashed = choice(&node("{{.a-b}}"), &[("a-b", "n1")], &endpoints);
    assert!(dashed.is_empty(), "no key to Go's templates");
    for odd in [
        "{{.node",
        "{{node}}",
        "{{}}",
        "{{.}}",
        "{{.node | len}}",
        "}}{{",
    ] {
        assert!(
            choice(&node(odd), &[("node", "n1")], &endpoints).is_empty(),
            "{odd}"
        );
        assert_eq!(
            choice(&node(odd), &[], &[&[("node", odd)]]),
            [0],
            "a text that is no template is itself"
        );
    }
}

#[test]
fn an_endpoint_of_two_routes_is_listed_once() {
    let rules = [rule(
        &[],
        vec![route(&[("a", "1")], 1), route(&[("b", "1")], 1)],
    )];
    let mut found = choice(&rules, &[], &[&[("a", "1"), ("b", "1")], &[("b", "1")]]);
    found.sort_unstable();
    assert_eq!(found, [0, 1]);
}

#[test]
fn weights_are_spread_and_not_in_blocks() {
    let rules = [rule(
        &[],
        vec![route(&[("v", "old")], 90), route(&[("v", "new")], 10)],
    )];
    let labels = [map(&[("v", "old")]), map(&[("v", "new")])];
    let firsts: Vec<_> = (0..100)
        .map(|turn| select(&rules, &Labels::new(), &candidates(&labels), turn)[0])
        .collect();
    assert_eq!(firsts.iter().filter(|first| **first == 1).count(), 10);
    let (ten, five) = (&firsts[..10], &firsts[50..60]);
    assert_eq!(
        (ten.iter().sum::<usize>(), five.iter().sum::<usize>()),
        (1, 1),
        "90 to 10 holds in each ten"
    );
}

#[test]
fn a_weight_of_zero_beside_others_is_the_last_resort() {
    let rules = [rule(
        &[],
        vec![route(&[("v", "spare")], 0), route(&[("v", "main")], 5)],
    )];
    let labels = [map(&[("v", "spare")]), map(&[("v", "main")])];
    for turn in 0..20 {
        assert_eq!(
            select(&rules, &Labels::new(), &candidates(&labels), turn),
            [1, 0]
        );
    }
    assert_eq!(
        select(&rules, &Labels::new(), &candidates(&labels[..1]), 0),
        [0],
        "better than none"
    );
}

#[test]
fn weights_that_are_large_do_not_overflow() {
    let rules = [rule(
        &[],
        vec![
            route(&[("v", "a")], u32::MAX),
            route(&[("v", "b")], u32::MAX - 1),
        ],
    )];
    let labels = [map(&[("v", "a")]), map(&[("v", "b")])];
    for turn in [0, 1, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
        assert_eq!(
            select(&rules, &Labels::new(), &candidates(&labels), turn).len(),
            2
        );
    }
}

proptest! {
    /// Over one full cycle each route is first as often as its weight says; over as many cycles as a route has endpoints, each of them
    /// is first equally often. Every order holds each endpoint once.
    #[test]
    fn weights_hold_over_a_full_cycle(groups in prop::collection::vec((0u32..9, 1usize..4), 1..5), start in 0u64..1000) {
        let routes: Vec<_> = groups.iter().enumerate().map(|(n, (weight, _))| route(&[("group", &n.to_string())], *weight)).collect();
        let rules = [rule(&[], routes)];
        let group_of: Vec<usize> = groups.iter().enumerate().flat_map(|(n, (_, members))| vec![n; *members]).collect();
        let labels: Vec<_> = group_of.iter().map(|n| map(&[("group", &n.to_string())])).collect();
        let total: u64 = groups.iter().map(|(weight, _)| u64::from(*weight)).sum();
        let (cycle, even) = if total == 0 { (groups.len() as u64, true) } else { (total, false) };
        // 6 is divided by each number of members.
        let cycles = 6;
        let start = start * cycle;

        let mut firsts = vec![0u64; labels.len()];
        for turn in start..start + cycles * cycle {
            let order = select(&rules, &Labels::new(), &candidates(&labels), turn);
            prop_assert_eq!(order.iter().collect::<HashSet<_>>().len(), labels.len());
            prop_assert_eq!(order.len(), labels.len());
            firsts[order[0]] += 1;
        }
        for (n, (weight, members)) in groups.iter().enumerate() {
            let share = if even { 1 } else { u64::from(*weight) };
            let got: u64 = (0..labels.len()).filter(|e| group_of[*e] == n).map(|e| firsts[e]).sum();
            prop_assert_eq!(got, share * cycles);
            for endpoint in (0..labels.len()).filter(|e| group_of[*e] == n) {
                // Within a route the spread is exact up to one.
                prop_assert!(firsts[endpoint].abs_diff(share * cycles / *members as u64) <= 1);
            }
        }
    }

    #[test]
    fn no_template_panics(text in ".{0,10}|[{}. a]{0,12}", value in ".{0,5}") {
        let rules = [rule(&[], vec![route(&[("k", &text)], 1)])];
        choice(&rules, &[("a", &value)], &[&[("k", &value)]]);
        prop_assert_eq!(choice(&rules, &[("a", &value)], &[&[("k", &text)]]), [0]);
    }
}
