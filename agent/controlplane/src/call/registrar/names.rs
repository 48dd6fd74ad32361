//! The names of an entry, with and without their domain.

use std::collections::BTreeMap;

use nsm_core::nsm::name::{Domain, InterdomainName};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};

use crate::{
    error::RequestError,
    registry::{DomainRegistry, Entries, wire::Wire},
};

/// An entry whose names may carry a domain.
pub(super) trait Named: Wire {
    /// The part of a registry that holds entries of this kind.
    fn part_of(registry: &dyn DomainRegistry) -> &dyn Entries<Self>;

    /// Every name that it holds.
    fn names(&self) -> impl Iterator<Item = &str>;

    /// The network services among its names, without their domain.
    fn asked_services(&self) -> impl Iterator<Item = &str>;

    /// Replaces every name.
    fn rename(
        &mut self,
        change: impl Fn(&str) -> Result<String, RequestError>,
    ) -> Result<(), RequestError>;

    /// Keeps the ids of the hops that a registration came through, as NSM's registries do.
    fn set_path_ids(&mut self, ids: Vec<String>);

    /// The ids of the hops that its registration came through.
    fn path_ids(&self) -> &[String];

    /// Whether it asks, as a query, by what is not shown to other domains.
    fn asks_inside(&self) -> bool;

    /// Leaves what names the network services that are seen; whether the entry is seen at all.
    fn leave(&mut self, is_seen: impl Fn(&str) -> bool) -> bool;

    /// Checks every name as a Request for it is checked: what is registered can be asked for. A name that is absent is none.
    fn check(&self) -> Result<(), RequestError> {
        for name in self.names().filter(|name| !name.is_empty()) {
            name.parse::<InterdomainName>()?;
        }
        Ok(())
    }

    /// The one domain that the names carry, if any.
    fn domain(&self) -> Result<Option<Domain>, RequestError> {
        let mut common: Option<Domain> = None;
        for name in self.names().filter(|name| name.contains('@')) {
            let parsed: InterdomainName = name.parse()?;
            match (&common, parsed.domain()) {
                (Some(first), Some(domain)) if first != domain => {
                    return Err(RequestError::Field {
                        field: "name",
                        value: name.to_owned(),
                        reason: format!(
                            "an endpoint belongs to one domain, and another of its names is of `{first}`"
                        ),
                    });
                }
                (_, domain) => common = domain.cloned().or(common),
            }
        }
        Ok(common)
    }

    /// Takes the domain off every name.
    fn strip(&mut self) -> Result<(), RequestError> {
        self.rename(|name| {
            if !name.contains('@') {
                return Ok(name.to_owned());
            }
            Ok(name.parse::<InterdomainName>()?.target().to_owned())
        })
    }

    /// Puts `domain` on every name.
    fn join(&mut self, domain: Option<&Domain>) -> Result<(), RequestError> {
        match domain {
            Some(_) => self.rename(|name| Ok(joined(name, domain))),
            None => Ok(()),
        }
    }
}

impl Named for NetworkService {
    fn part_of(registry: &dyn DomainRegistry) -> &dyn Entries<Self> {
        registry.services()
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.name.as_str())
    }

    fn asked_services(&self) -> impl Iterator<Item = &str> {
        // An empty one asks for all.
        let name = bare(&self.name);
        (!name.is_empty()).then_some(name).into_iter()
    }

    fn rename(
        &mut self,
        change: impl Fn(&str) -> Result<String, RequestError>,
    ) -> Result<(), RequestError> {
        self.name = change(&self.name)?;
        Ok(())
    }

    fn set_path_ids(&mut self, ids: Vec<String>) {
        self.path_ids = ids;
    }

    fn path_ids(&self) -> &[String] {
        &self.path_ids
    }

    fn asks_inside(&self) -> bool {
        false
    }

    fn leave(&mut self, is_seen: impl Fn(&str) -> bool) -> bool {
        is_seen(&self.name)
    }
}

/// Its own name and its services', labels included.
impl Named for NetworkServiceEndpoint {
    fn part_of(registry: &dyn DomainRegistry) -> &dyn Entries<Self> {
        registry.endpoints()
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.name)
            .chain(&self.network_service_names)
            .chain(self.network_service_labels.keys())
            .map(String::as_str)
    }

    fn asked_services(&self) -> impl Iterator<Item = &str> {
        self.names().skip(1).map(bare)
    }

    fn rename(
        &mut self,
        change: impl Fn(&str) -> Result<String, RequestError>,
    ) -> Result<(), RequestError> {
        self.name = change(&self.name)?;
        for service in &mut self.network_service_names {
            *service = change(service)?;
        }
        let labels = std::mem::take(&mut self.network_service_labels);
        self.network_service_labels = labels
            .into_iter()
            .map(|(service, labels)| Ok((change(&service)?, labels)))
            .collect::<Result<BTreeMap<_, _>, RequestError>>()?;
        Ok(())
    }

    fn set_path_ids(&mut self, ids: Vec<String>) {
        self.path_ids = ids;
    }

    fn path_ids(&self) -> &[String] {
        &self.path_ids
    }

    /// A URL is matched by its parts, so that one could be found out.
    fn asks_inside(&self) -> bool {
        !self.url.is_empty()
    }

    /// An endpoint of several services is one of those that are seen. What it is labelled for the others is not shown either.
    fn leave(&mut self, is_seen: impl Fn(&str) -> bool) -> bool {
        self.network_service_names.retain(|name| is_seen(name));
        self.network_service_labels.retain(|name, _| is_seen(name));
        !self.network_service_names.is_empty()
    }
}

/// The name without its domain.
pub(super) fn bare(name: &str) -> &str {
    name.split_once('@').map_or(name, |(target, _)| target)
}

/// The name with its domain. A name that is none stays none.
pub(super) fn joined(name: &str, domain: Option<&Domain>) -> String {
    match domain {
        Some(domain) if !name.is_empty() => format!("{name}@{domain}"),
        _ => name.to_owned(),
    }
}
