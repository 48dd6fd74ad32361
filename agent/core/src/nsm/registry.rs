//! Whether what is registered answers a Find: names match exactly, URLs by substring, service names and labels by subset; what a query
//! leaves empty matches all (as NSM's registry).
//!
//! Both sides are plain borrowed views, so that the registry's own types and the wire's can be matched without a copy.

use std::collections::BTreeMap;

use crate::nsm::select::Match;

/// What of an endpoint is matched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointView<'a> {
    /// Its name.
    pub name: &'a str,
    /// The services it serves.
    pub services: &'a [String],
    /// Its labels for each service.
    pub labels: BTreeMap<&'a str, &'a BTreeMap<String, String>>,
    /// Where it listens.
    pub url: &'a str,
}

/// What of a network service is matched. Its rules are compared and not read, so they may be of any type, the wire's too.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceView<'a, M = Match> {
    /// Its name.
    pub name: &'a str,
    /// Its payload, `IP` or `ETHERNET`.
    pub payload: &'a str,
    /// Its rules for the choice of an endpoint.
    pub matches: &'a [M],
}

/// Whether an endpoint answers a query.
#[must_use]
pub fn endpoint_matches(query: &EndpointView<'_>, candidate: &EndpointView<'_>) -> bool {
    name_matches(query.name, candidate.name)
        && candidate.url.contains(query.url)
        && query
            .services
            .iter()
            .all(|service| candidate.services.contains(service))
        && query.labels.iter().all(|(service, wanted)| {
            candidate
                .labels
                .get(service)
                .is_some_and(|found| is_subset(wanted, found))
        })
}

/// Whether a network service answers a query. Its rules are matched as a whole: all of them, in their order.
#[must_use]
pub fn service_matches<M: PartialEq>(
    query: &ServiceView<'_, M>,
    candidate: &ServiceView<'_, M>,
) -> bool {
    name_matches(query.name, candidate.name)
        && name_matches(query.payload, candidate.payload)
        && (query.matches.is_empty() || query.matches == candidate.matches)
}

fn name_matches(wanted: &str, found: &str) -> bool {
    wanted.is_empty() || wanted == found
}

fn is_subset(wanted: &BTreeMap<String, String>, found: &BTreeMap<String, String>) -> bool {
    wanted
        .iter()
        .all(|(key, value)| found.get(key) == Some(value))
}
