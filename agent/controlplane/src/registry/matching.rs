//! What a query compares: `nsm_core::nsm::registry` decides, on views of the messages.
//!
//! NSM's registry compares the expiry too, by the second, where a query carries one.

use std::collections::BTreeMap;

use nsm_core::nsm::registry::{EndpointView, ServiceView, endpoint_matches, service_matches};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};

use super::table::Entry;

impl Entry for NetworkService {
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
