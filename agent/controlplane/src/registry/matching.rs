//! What a query compares (NSM `matchutils`): a field that the query leaves empty matches anything;
//! names exactly, the URL by substring, service names and labels by subset, the expiry by second.

use std::collections::BTreeMap;

use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint, NetworkServiceLabels};

use super::table::Entry;

impl Entry for NetworkService {
    fn name(&self) -> &str {
        &self.name
    }

    fn services(&self) -> &[String] {
        &[]
    }

    fn matches(&self, candidate: &Self) -> bool {
        (self.name.is_empty() || self.name == candidate.name)
            && (self.payload.is_empty() || self.payload == candidate.payload)
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
        (self.name.is_empty() || self.name == candidate.name)
            && (self.url.is_empty() || candidate.url.contains(&self.url))
            && self
                .network_service_names
                .iter()
                .all(|service| candidate.network_service_names.contains(service))
            && labels_within(
                &self.network_service_labels,
                &candidate.network_service_labels,
            )
            && self.expiration_time.is_none_or(|asked| {
                candidate
                    .expiration_time
                    .is_some_and(|expiry| expiry.seconds == asked.seconds)
            })
    }
}

fn labels_within(
    asked: &BTreeMap<String, NetworkServiceLabels>,
    given: &BTreeMap<String, NetworkServiceLabels>,
) -> bool {
    asked.iter().all(|(service, asked)| {
        given.get(service).is_some_and(|given| {
            asked
                .labels
                .iter()
                .all(|(key, value)| given.labels.get(key) == Some(value))
        })
    })
}
