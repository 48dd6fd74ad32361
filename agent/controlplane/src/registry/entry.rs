//! The two kinds of entries of a registry, and what a query compares: `nsm_core::nsm::registry` decides, on views of the messages.
//!
//! NSM's registry compares the expiry too, by the second, where a query carries one.

use std::{collections::BTreeMap, sync::Arc};

use nsm_core::nsm::registry::{EndpointView, ServiceView, endpoint_matches, service_matches};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};

/// Something registered under a name.
pub trait Entry: Clone + Send + Sync + 'static {
    /// How messages name the kind: `network service` or `network service endpoint`.
    const KIND: &'static str;

    /// The key.
    fn name(&self) -> &str;

    /// The services whose queries can find this entry; none where the name is the only index.
    fn services(&self) -> &[String];

    /// Whether this entry, taken as a query, matches `candidate`. What a query leaves empty matches all.
    fn matches(&self, candidate: &Self) -> bool;
}

/// A change of one entry, as a watch gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event<E> {
    /// The entry as it is now, or as it was when it went.
    pub entry: Arc<E>,
    /// The entry is gone or has stopped matching.
    pub deleted: bool,
}

impl<E> Event<E> {
    /// The entry is there.
    pub(super) fn present(entry: Arc<E>) -> Self {
        Self {
            entry,
            deleted: false,
        }
    }
}

impl Entry for NetworkService {
    const KIND: &'static str = "network service";

    fn name(&self) -> &str {
        &self.name
    }

    fn services(&self) -> &[String] {
        &[]
    }

    fn matches(&self, candidate: &Self) -> bool {
        // The rules are compared as they came, so that no candidate has to be parsed for it.
        service_matches(&service_view(self), &service_view(candidate))
            && (self.matches.is_empty() || self.matches == candidate.matches)
    }
}

impl Entry for NetworkServiceEndpoint {
    const KIND: &'static str = "network service endpoint";

    fn name(&self) -> &str {
        &self.name
    }

    fn services(&self) -> &[String] {
        &self.network_service_names
    }

    fn matches(&self, candidate: &Self) -> bool {
        let with_labels = !self.network_service_labels.is_empty();
        endpoint_matches(
            &endpoint_view(self, with_labels),
            &endpoint_view(candidate, with_labels),
        ) && self.expiration_time.is_none_or(|asked| {
            candidate
                .expiration_time
                .is_some_and(|expiry| expiry.seconds == asked.seconds)
        })
    }
}

fn service_view(service: &NetworkService) -> ServiceView<'_> {
    ServiceView {
        name: &service.name,
        payload: &service.payload,
        matches: &[],
    }
}

/// Labels cost an allocation, so they are left out where the query has none.
fn endpoint_view(endpoint: &NetworkServiceEndpoint, with_labels: bool) -> EndpointView<'_> {
    let labels = if with_labels {
        endpoint
            .network_service_labels
            .iter()
            .map(|(service, labels)| (service.as_str(), &labels.labels))
            .collect()
    } else {
        BTreeMap::new()
    };
    EndpointView {
        name: &endpoint.name,
        services: &endpoint.network_service_names,
        labels,
        url: &endpoint.url,
    }
}
