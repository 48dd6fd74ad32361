//! The choice of an endpoint, by the rules that a network service has and the labels of client and endpoints.
//!
//! The first rule whose source selector fits the client's labels decides; its routes select the endpoints that may serve. A rule with
//! `fallthrough` that finds no endpoint gives way to the next. A service without rules is served by every endpoint (NSM's
//! `matchutils` and `roundrobin`).
//!
//! The answer is an order, not one endpoint: the caller takes the next when one fails. `turn` counts the choices made for a service;
//! the same turn gives the same order, so that the spread needs no random source and can be tested.
//!
//! A route's weight is its share of the first choices; the endpoints of a route take turns. NSM itself ignores weights, so services
//! whose weights are all unset (0) spread evenly; beside other weights a weight of 0 means last resort.

use std::collections::BTreeMap;

type Labels = BTreeMap<String, String>;

/// A rule of a network service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match {
    /// The labels that a client must have for this rule.
    pub source: Labels,
    /// Which endpoints serve such clients.
    pub routes: Vec<Destination>,
    /// When no endpoint fits, the next rule is tried instead of refusing.
    pub fallthrough: bool,
}

impl Match {
    /// A rule as on the wire. One that has metadata and neither routes nor `fallthrough` lets every endpoint serve (NSM's
    /// `matchutils`); without metadata it lets none.
    #[must_use]
    pub fn from_wire(
        source: Labels,
        mut routes: Vec<Destination>,
        fallthrough: bool,
        has_metadata: bool,
    ) -> Self {
        if routes.is_empty() && has_metadata && !fallthrough {
            routes.push(Destination::default());
        }
        Self {
            source,
            routes,
            fallthrough,
        }
    }
}

/// A route of a rule: the endpoints with these labels, and their share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Destination {
    /// The labels that an endpoint must have. `{{.key}}` in a value is replaced by the client's label of that key.
    pub selector: Labels,
    /// The share of first choices among the rule's routes.
    pub weight: u32,
}

/// An endpoint that could serve.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The endpoint's name.
    pub name: &'a str,
    /// Its labels for the service that is asked for.
    pub labels: &'a BTreeMap<String, String>,
}

/// The indices of the candidates that may serve, the preferred one first. Empty: no endpoint matches.
#[must_use]
pub fn select(
    matches: &[Match],
    source_labels: &BTreeMap<String, String>,
    candidates: &[Candidate<'_>],
    turn: u64,
) -> Vec<usize> {
    if candidates.is_empty() {
        return Vec::new();
    }
    let routes = if matches.is_empty() {
        vec![Route {
            weight: 1,
            members: (0..candidates.len()).collect(),
        }]
    } else {
        decide(matches, source_labels, candidates)
    };
    order(&routes, candidates.len(), turn)
}

/// A route with the candidates that fit it: one at least.
struct Route {
    weight: u64,
    members: Vec<usize>,
}

/// The routes with candidates of the rule that decides.
fn decide(matches: &[Match], source_labels: &Labels, candidates: &[Candidate<'_>]) -> Vec<Route> {
    for rule in matches {
        if !fits(source_labels, &rule.source, source_labels) {
            continue;
        }
        let route = |destination: &Destination| {
            let fitting = |index: &usize| {
                fits(
                    candidates[*index].labels,
                    &destination.selector,
                    source_labels,
                )
            };
            Route {
                weight: destination.weight.into(),
                members: (0..candidates.len()).filter(fitting).collect(),
            }
        };
        let routes: Vec<_> = rule
            .routes
            .iter()
            .map(route)
            .filter(|route| !route.members.is_empty())
            .collect();
        if routes.is_empty() && rule.fallthrough {
            continue;
        }
        return routes;
    }
    Vec::new()
}

/// The routes' members: first the route whose turn it is, then the others by weight; in each the member whose turn it is first.
fn order(routes: &[Route], candidates: usize, turn: u64) -> Vec<usize> {
    let mut weights: Vec<u64> = routes.iter().map(|route| route.weight).collect();
    if weights.iter().all(|&weight| weight == 0) {
        weights.fill(1);
    }
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    weights.iter_mut().for_each(|weight| *weight /= divisor);
    let cycle: u64 = weights.iter().sum();
    if cycle == 0 {
        return Vec::new();
    }

    let (round, slot) = (turn / cycle, scatter(turn % cycle, cycle));
    let (first, within) = at(&weights, slot);
    let mut by_preference: Vec<usize> = (0..routes.len()).collect();
    // A stable sort: routes of equal weight keep the order in which the service lists them.
    by_preference.sort_by_key(|&index| (index != first, std::cmp::Reverse(weights[index])));

    let mut listed = vec![false; candidates];
    let mut order = Vec::with_capacity(candidates);
    for index in by_preference {
        let members = &routes[index].members;
        // How often this route was first before: exact for the route whose turn it is; the others need no more than a spread.
        let served = if index == first {
            round * weights[index] + within
        } else {
            turn
        };
        let start = usize::try_from(served % members.len() as u64).unwrap_or_default();
        for &member in members[start..].iter().chain(&members[..start]) {
            if !std::mem::replace(&mut listed[member], true) {
                order.push(member);
            }
        }
    }
    order
}

/// The route that owns a slot of the cycle, and which of its slots it is.
fn at(weights: &[u64], slot: u64) -> (usize, u64) {
    let mut left = slot;
    for (index, &weight) in weights.iter().enumerate() {
        if left < weight {
            return (index, left);
        }
        left -= weight;
    }
    (0, 0)
}

/// Visits every slot of a cycle once, far from the one before: 90 to 10 must not be 90 in a row and then 10. A step near the golden
/// section spreads best; it must have no common divisor with the cycle.
fn scatter(position: u64, cycle: u64) -> u64 {
    let golden = u64::try_from(u128::from(cycle) * 618_034 / 1_000_000).unwrap_or(cycle);
    let step = (golden.max(1)..=cycle)
        .find(|&step| gcd(step, cycle) == 1)
        .unwrap_or(1);
    u64::try_from(u128::from(position) * u128::from(step) % u128::from(cycle)).unwrap_or_default()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Whether `labels` have all that a selector wants. A value matches as it is written, or with the client's labels filled in.
fn fits(labels: &Labels, selector: &Labels, source_labels: &Labels) -> bool {
    selector.iter().all(|(key, wanted)| {
        labels.get(key).is_some_and(|found| {
            found == wanted || fill(wanted, source_labels).is_some_and(|filled| *found == filled)
        })
    })
}

/// Fills `{{.key}}` from the labels. None when a label is missing or the text is no such template: it can then match only as it is
/// written. Keys are what Go's templates take there: letters, digits and `_`.
fn fill(text: &str, labels: &Labels) -> Option<String> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        let (inside, after) = after.split_once("}}")?;
        let key = inside.trim().strip_prefix('.')?;
        let is_key = !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || c == '_');
        let value = labels.get(key).filter(|_| is_key)?;
        filled.push_str(before);
        filled.push_str(value);
        rest = after;
    }
    filled.push_str(rest);
    Some(filled)
}
