//! What names are looked up in: the registries, DNS, and what was learnt of both. Callers that may not use it find out here.

use std::{
    hash::{DefaultHasher, Hash, Hasher as _},
    sync::{Arc, LazyLock},
};

use nsm_core::{
    identity::{
        relay::{NotServed, Relays, Source},
        share::Holder,
    },
    net::PeerUrl,
    nsm::name::Domain,
};
use nsm_discovery::dns::{Resolved, Resolver};
use nsm_proto::registry::NetworkService;
use prost::Message as _;

use crate::{
    error::RequestError,
    identity::gate::Gate,
    occasional::Occasional,
    peer::peers::Peers,
    places::Places,
    registry::{DomainRegistry, remote::Remote},
    route::{addresses::Addresses, bypass::Bypass, local::LocalEndpoints},
};

/// What names are looked up in: shared by the router and the registry services.
pub(crate) struct Lookup {
    /// The registry of our own domain.
    pub(crate) registry: Arc<dyn DomainRegistry>,
    pub(crate) resolver: Resolver,
    /// Questions to DNS that callers wait for.
    pub(crate) questions: Places,
    pub(crate) peers: Arc<Peers>,
    pub(crate) addresses: Addresses,
    /// Proofs and permissions of those that show certificates.
    pub(crate) gate: Arc<Gate>,
    /// Which callers of the network may use us to reach others.
    pub(crate) relays: Relays,
    pub(crate) bypass: Bypass,
    pub(crate) local_endpoints: LocalEndpoints,
}

/// A registry, as a service of it is found again.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum RegistryAt {
    /// That of our own domain.
    Own,
    /// That of another domain, wherever DNS has it.
    Domain(Domain),
    /// Another agent or manager, which is asked for names as they are.
    Url(PeerUrl),
}

/// A network service, as its registry has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct ServiceAt {
    pub(crate) registry: RegistryAt,
    pub(crate) name: String,
}

/// The service whose matches allow a client its endpoint.
#[derive(Debug, Clone)]
pub(crate) struct Matched {
    pub(crate) service: Arc<ServiceAt>,
    /// Which matches it had then.
    pub(crate) rules: Rules,
}

/// Distinguishes the matches that a service has from those that it had before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rules(u64);

impl Rules {
    pub(crate) fn of(service: &NetworkService) -> Self {
        let mut hasher = DefaultHasher::new();
        for rule in &service.matches {
            rule.encode_to_vec().hash(&mut hasher);
        }
        Self(hasher.finish())
    }
}

impl Lookup {
    /// Opens a registry that was found before.
    pub(crate) async fn open(
        &self,
        registry: &RegistryAt,
    ) -> Result<Arc<dyn DomainRegistry>, RequestError> {
        Ok(match registry {
            RegistryAt::Own => Arc::clone(&self.registry),
            RegistryAt::Domain(domain) => {
                let resolved = self.resolve(domain, Holder::our_own()).await?;
                Arc::new(self.registry_of(domain, &resolved))
            }
            RegistryAt::Url(url) => Arc::new(Remote::at(&self.peers, [url.clone()])),
        })
    }

    /// Where another domain's services are. What the operator has configured of it may be dialled, wherever it leads.
    pub(crate) async fn resolve(
        &self,
        domain: &Domain,
        holder: Holder,
    ) -> Result<Arc<Resolved>, RequestError> {
        let place = self.questions.take(holder, 1)?;
        let resolved = self.resolver.resolve_holding(domain, place).await?;
        let resolved = if self.is_unreached(&resolved) {
            let place = self.questions.take(holder, 1)?;
            let again = self.resolver.again(domain, &resolved, place).await;
            again.unwrap_or(resolved)
        } else {
            resolved
        };
        if self.resolver.is_configured(domain) {
            let places = resolved.registry.iter().chain(&resolved.proxy);
            self.peers.guard().permit(places.copied());
        }
        Ok(resolved)
    }

    /// Whether the last tries to connect to a domain's registry, or to its proxy, failed at each address.
    fn is_unreached(&self, resolved: &Resolved) -> bool {
        let mut services = [&resolved.registry, &resolved.proxy].into_iter();
        services.any(|addresses| {
            let urls = addresses.iter().copied().map(PeerUrl::from);
            self.peers.are_unreached(urls)
        })
    }

    /// Whether a caller may ask for names of other domains. Only the log has the reason.
    pub(crate) fn check_relay(&self, source: Source) -> Result<(), RequestError> {
        logged(source, self.relays.check_relay(source))
    }

    /// Whether a caller may register. Only the log has the reason.
    pub(crate) fn check_registrant(&self, source: Source) -> Result<(), RequestError> {
        logged(source, self.relays.check_registrant(source))
    }

    /// The registry of another domain.
    pub(crate) fn registry_of(&self, domain: &Domain, resolved: &Resolved) -> Remote {
        let urls = resolved.registry.iter().copied().map(PeerUrl::from);
        Remote::at(&self.peers, urls).of_domain(domain.clone())
    }
}

fn logged(source: Source, outcome: Result<(), NotServed>) -> Result<(), RequestError> {
    // A flood of refused calls must not flood the log.
    static REFUSALS: LazyLock<Occasional> = LazyLock::new(Occasional::default);
    outcome.inspect_err(|reason| {
        if REFUSALS.is_due() {
            tracing::info!(%reason, ?source, "refused a caller of the network; others within a minute are not logged");
        }
    })?;
    Ok(())
}
