//! Where a Request goes next: the NSMgr's and the proxy's part of the decision.
//!
//! - From a local client, a name of another domain goes to that domain's proxy, found by DNS and
//!   its registry; anything else is looked up in our own domain.
//! - From the NSMgr that our forwarder works for, names are that NSMgr's business: its registry is
//!   asked, and has endpoints of this node by their sockets and others by the next NSMgr or proxy.
//! - From the network, a name that a Find through this proxy has taught us goes where it was
//!   found; any other `@domain` means us, under whatever name the caller has for our domain, and is
//!   stripped (NSM `interdomainbypass`).

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nsm_core::{
    identity::{relay::Source, share::Holder},
    net::{PeerUrl, PeerUrlError},
    nsm::{
        name::{Domain, InterdomainName},
        select::{Candidate, select},
    },
};
use nsm_discovery::dns::Resolved;
use nsm_proto::{
    connection::Connection,
    registry::{NetworkService, NetworkServiceEndpoint},
};
use tokio::time::Instant;

use crate::{
    convert,
    error::RequestError,
    identity::gate::Guest,
    peer::peers::{PassedSocket, Peer},
    registry::remote::Remote,
    route::{
        addresses::Crossing,
        bypass::Way,
        directory::{Found, Wanted},
        expected::Expected,
        lookup::{Lookup, Matched, RegistryAt, Rules, ServiceAt},
        next::{Resolution, Route},
    },
    transport::{
        dial::DialError,
        unix::{FileId, Kind, PATIENCE},
    },
};

/// Which listener a call came in by. Who calls there is the call's [`nsm_core::identity::Caller`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// The NSMgr's socket: a client or endpoint on this node.
    Local,
    /// The forwarder's socket: the node's own NSMgr, for one of its clients or for another node.
    Forwarder,
    /// The proxy's port: another agent, NSMgr or proxy.
    Network,
}

/// What is fixed for the life of the agent.
#[derive(Debug)]
pub(crate) struct RouterConfig {
    /// The domain of this agent.
    pub(crate) domain: Domain,
    /// The NSMgr that this agent's forwarder works for, where that is not this agent itself.
    pub(crate) upstream_nsmgr_url: Option<PeerUrl>,
    /// The registry proxy that is asked for names of other domains; without one this agent is its own.
    pub(crate) registry_proxy_url: Option<PeerUrl>,
}

/// A Request as the router needs it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) arrival: Arrival,
    pub(crate) source: Source,
    pub(crate) holder: Holder,
    /// Who asks, where it has shown a certificate.
    pub(crate) guest: Option<&'a Guest>,
    pub(crate) connection: &'a Connection,
}

/// Decides where Requests go.
pub(crate) struct Router {
    pub(super) config: RouterConfig,
    pub(super) lookup: Arc<Lookup>,
    /// Grows with every choice, to spread load.
    choices: AtomicU64,
}

impl Router {
    pub(crate) fn new(config: RouterConfig, lookup: Arc<Lookup>) -> Self {
        Self {
            config,
            lookup,
            choices: AtomicU64::new(0),
        }
    }

    /// The ways to a service or endpoint, best first; never empty.
    pub(crate) async fn routes(
        &self,
        asked: Asked<'_>,
        deadline: Instant,
    ) -> Result<Vec<Route>, RequestError> {
        let Asked {
            arrival,
            source,
            holder,
            connection,
            ..
        } = asked;
        if let Arrival::Forwarder = arrival {
            self.admit_nsmgr(asked.guest)?;
            let nsmgr = self.config.upstream_nsmgr_url.as_ref();
            let nsmgr = nsmgr.ok_or(RequestError::Missing("NSMgr that the forwarder works for"))?;
            return self.routes_as_named(nsmgr, connection, deadline).await;
        }
        let service = parse(&connection.network_service)?;
        let endpoint = parse(&connection.network_service_endpoint_name)?;
        if service.is_none() && endpoint.is_none() {
            return Err(RequestError::Missing("network_service"));
        }
        let domain = common_domain(service.as_ref(), endpoint.as_ref())?;
        let wanted = Wanted {
            service: service.as_ref().map_or("", InterdomainName::target),
            endpoint: endpoint.as_ref().map_or("", InterdomainName::target),
        };
        // Looked up once: what was admitted is what is gone.
        let way = domain
            .as_ref()
            .and_then(|_| self.way(&connection.network_service_endpoint_name))
            .filter(|_| arrival == Arrival::Network);
        self.admit(asked, domain.as_ref(), wanted.service, way.as_ref())?;
        match (arrival, domain) {
            (Arrival::Network, Some(_)) if let Some(way) = way => {
                if !way.registered_here {
                    self.lookup.check_relay(source)?;
                }
                Ok(vec![known_route(way, connection)])
            }
            (Arrival::Local, Some(domain))
                if domain != self.config.domain
                    && let Some(proxy) = &self.config.registry_proxy_url =>
            {
                self.routes_as_named(proxy, connection, deadline).await
            }
            (Arrival::Local, Some(domain)) if domain != self.config.domain => {
                let resolved = self.lookup.resolve(&domain, holder).await?;
                // Our own domain by another name, such as our address.
                let is_own =
                    |at: &SocketAddr| self.lookup.addresses.is_own_url(&format!("tcp://{at}"));
                if resolved.proxy.iter().any(is_own) {
                    return self
                        .routes_here(arrival, Some(domain), wanted, connection, deadline)
                        .await;
                }
                let routes = self.routes_out(&domain, &resolved, wanted, connection, deadline);
                let error = match routes.await {
                    Err(error @ RequestError::Dial(_)) => error,
                    outcome => return outcome,
                };
                let fresh = self.moved(&domain, &resolved, holder).await?;
                let fresh = fresh.ok_or(error)?;
                self.routes_out(&domain, &fresh, wanted, connection, deadline)
                    .await
            }
            (_, domain) => {
                self.routes_here(arrival, domain, wanted, connection, deadline)
                    .await
            }
        }
    }

    /// Where a domain is that cannot be reached where it was; `None` where DNS has no other answer.
    async fn moved(
        &self,
        domain: &Domain,
        before: &Resolved,
        holder: Holder,
    ) -> Result<Option<Arc<Resolved>>, RequestError> {
        let fresh = self.lookup.resolve(domain, holder).await?;
        let is_other = fresh.registry != before.registry || fresh.proxy != before.proxy;
        Ok(is_other.then_some(fresh))
    }

    async fn routes_out(
        &self,
        domain: &Domain,
        resolved: &Resolved,
        wanted: Wanted<'_>,
        connection: &Connection,
        deadline: Instant,
    ) -> Result<Vec<Route>, RequestError> {
        let registry = self.lookup.registry_of(domain, resolved);
        let found = wanted.find_in(&registry, deadline).await?;
        let chosen = self.choose(&found, wanted, domain, connection)?;
        let proxies = self.reached_first(&resolved.proxy, deadline).await?;
        let payload = payload(&found);
        let resolution = resolution(domain, resolved);
        let service = match wanted.service {
            "" => String::new(),
            service => format!("{service}@{domain}"),
        };
        let mut routes = Vec::new();
        let mut bad = BadUrl::default();
        let matched = matched(&RegistryAt::Domain(domain.clone()), &found);
        for endpoint in chosen {
            let name = format!("{}@{domain}", endpoint.name);
            let out = |expected: &Expected, url| (url, Crossing::Out, expected.clone());
            let of_domain = Expected::Of(domain.clone());
            // A floating domain has no proxy: its endpoints are registered with the URL of theirs,
            // which may be us.
            let ways = match proxies.as_slice() {
                [] if self.lookup.addresses.is_own_url(&endpoint.url) => self
                    .way(&name)
                    .map(|way| (way.url, Crossing::Inside, way.expected))
                    .into_iter()
                    .collect(),
                // A socket of our own node is not in another domain, whatever its registry answers.
                [] if !endpoint.url.starts_with("tcp://") => Vec::new(),
                [] => {
                    let expected = Expected::of_entry(endpoint, of_domain);
                    let url = bad.good(&endpoint.url);
                    url.map(|url| out(&expected, url)).into_iter().collect()
                }
                proxies => {
                    let proxies = proxies.iter().cloned();
                    proxies.map(|url| out(&of_domain, url)).collect()
                }
            };
            for (url, crossing, expected) in ways {
                routes.push(Route {
                    url,
                    crossing,
                    expected,
                    service: service.clone(),
                    endpoint: name.clone(),
                    endpoint_answered: answered_name(connection, &endpoint.name),
                    payload: payload.clone(),
                    resolution: Some(Arc::clone(&resolution)),
                    matched: matched.clone(),
                    _socket: None,
                });
            }
        }
        if routes.is_empty() {
            return Err(bad.or_no_endpoint(wanted, domain));
        }
        Ok(routes)
    }

    /// The addresses of a domain's proxy, the one that is reached first.
    async fn reached_first(
        &self,
        proxy: &[SocketAddr],
        deadline: Instant,
    ) -> Result<Vec<PeerUrl>, RequestError> {
        let mut urls: Vec<PeerUrl> = proxy.iter().copied().map(PeerUrl::from).collect();
        if urls.len() > 1 {
            let (reached, _) = self.lookup.peers.first_reached(&urls, deadline).await?;
            urls.sort_by_key(|url| *url != reached.url);
        }
        Ok(urls)
    }

    async fn routes_here(
        &self,
        arrival: Arrival,
        domain: Option<Domain>,
        wanted: Wanted<'_>,
        connection: &Connection,
        deadline: Instant,
    ) -> Result<Vec<Route>, RequestError> {
        let found = wanted.find_in(&*self.lookup.registry, deadline).await?;
        let own = &self.config.domain;
        let chosen = self.choose(&found, wanted, own, connection)?;
        let payload = payload(&found);
        let crossing = match (&domain, arrival) {
            (Some(_), Arrival::Network) => Crossing::In,
            _ => Crossing::Inside,
        };
        let matched = matched(&RegistryAt::Own, &found);
        let mut bad = BadUrl::default();
        let routes: Vec<Route> = chosen
            .into_iter()
            .filter_map(|endpoint| {
                let (url, expected) = if self.lookup.addresses.is_own_url(&endpoint.url) {
                    // Else registered through an earlier life of this agent, and not again since.
                    let local = self.lookup.local_endpoints.get(&endpoint.name)?;
                    (local.url, Expected::Own)
                } else if endpoint.url.starts_with("tcp://") {
                    let expected = Expected::of_entry(endpoint, Expected::Own);
                    (bad.good(&endpoint.url)?, expected)
                } else {
                    // A socket of this node that no process of this node has registered with us.
                    return None;
                };
                Some(Route {
                    url,
                    crossing,
                    expected,
                    service: wanted.service.to_owned(),
                    endpoint: endpoint.name.clone(),
                    endpoint_answered: answered_name(connection, &endpoint.name),
                    payload: payload.clone(),
                    resolution: None,
                    matched: matched.clone(),
                    _socket: None,
                })
            })
            .collect();
        if routes.is_empty() {
            return Err(bad.or_no_endpoint(wanted, own));
        }
        Ok(routes)
    }

    /// The ways of another agent's registry, which is asked for names as they are: that of
    /// the NSMgr that our forwarder works for, or a registry proxy.
    async fn routes_as_named(
        &self,
        registry: &PeerUrl,
        connection: &Connection,
        deadline: Instant,
    ) -> Result<Vec<Route>, RequestError> {
        let wanted = Wanted {
            service: &connection.network_service,
            endpoint: &connection.network_service_endpoint_name,
        };
        let remote = Remote::at(&self.lookup.peers, [registry.clone()]);
        let found = wanted.find_in(&remote, deadline).await?;
        let own = &self.config.domain;
        let payload = payload(&found);
        let mut routes = Vec::new();
        let mut bad = BadUrl::default();
        let matched = matched(&RegistryAt::Url(registry.clone()), &found);
        for endpoint in self.choose(&found, wanted, own, connection)? {
            let (url, crossing, expected, socket) =
                if self.lookup.addresses.is_own_url(&endpoint.url) {
                    // Found through us in the proxy's place: the way is known.
                    let Some(way) = self.way(&endpoint.name) else {
                        continue;
                    };
                    (way.url, Crossing::Out, way.expected, None)
                } else {
                    let Some(url) = bad.good(&endpoint.url) else {
                        continue;
                    };
                    let socket = self.found_socket(registry, &url).await?;
                    (url, Crossing::Inside, Expected::Own, socket)
                };
            routes.push(Route {
                url,
                crossing,
                expected,
                service: connection.network_service.clone(),
                endpoint: endpoint.name.clone(),
                endpoint_answered: endpoint.name.clone(),
                payload: payload.clone(),
                resolution: None,
                matched: matched.clone(),
                _socket: socket,
            });
        }
        if routes.is_empty() {
            return Err(bad.or_no_endpoint(wanted, own));
        }
        Ok(routes)
    }

    /// Where an endpoint of another domain is served, as it was learnt.
    pub(super) fn way(&self, name: &str) -> Option<Way> {
        self.lookup.bypass.way(name, std::time::Instant::now())
    }

    /// The peer behind a URL that the registry passed a socket for.
    async fn found_socket(
        &self,
        registry: &PeerUrl,
        url: &PeerUrl,
    ) -> Result<Option<Arc<Peer>>, RequestError> {
        let peers = &self.lookup.peers;
        let Some(id) = FileId::of(url) else {
            return Ok(None);
        };
        if let Some(known) = peers.known_passed(url) {
            return Ok(Some(known));
        }
        let passing = peers.get(registry);
        let socket = passing.descriptors.take(id, Kind::Socket, PATIENCE).await;
        let socket = socket.map_err(|missing| RequestError::BadAnswer {
            url: registry.to_string(),
            method: "Find",
            fault: format!("an endpoint has the url {url}, and {missing}"),
        })?;
        let socket = PassedSocket {
            socket,
            registrant: None,
            _place: None,
        };
        Ok(Some(peers.get_passed(url, socket)))
    }

    /// The endpoints that serve the connection, best first; never empty. One that is named must meet the service's matches like any
    /// other, or a client that they exclude would be served by its name.
    fn choose<'a>(
        &self,
        found: &'a Found,
        wanted: Wanted<'_>,
        domain: &Domain,
        connection: &Connection,
    ) -> Result<Vec<&'a NetworkServiceEndpoint>, RequestError> {
        let domain = domain.to_string();
        let service = wanted.service.to_owned();
        if found.endpoints.is_empty() {
            return Err(if !wanted.endpoint.is_empty() {
                RequestError::NoSuchEndpoint {
                    endpoint: wanted.endpoint.to_owned(),
                    domain,
                }
            } else if found.service.is_some() {
                RequestError::NoEndpoint { service, domain }
            } else {
                RequestError::NoService { service, domain }
            });
        }
        let Some(registered) = &found.service else {
            return Err(RequestError::Unregistered { service, domain });
        };
        let candidates: Vec<Candidate<'_>> = found
            .endpoints
            .iter()
            .map(|endpoint| candidate(endpoint, &registered.name))
            .collect();
        let chosen = select(
            &convert::matches(registered),
            &connection.labels,
            &candidates,
            self.choices.fetch_add(1, Ordering::Relaxed),
        );
        if chosen.is_empty() {
            return Err(RequestError::NoMatch {
                service,
                domain,
                count: candidates.len(),
                labels: connection
                    .labels
                    .iter()
                    .map(|(key, value)| format!("{key}={value}"))
                    .collect(),
            });
        }
        Ok(chosen.into_iter().map(|at| &*found.endpoints[at]).collect())
    }
}

/// The first URL of a registry's answer that is none. The endpoint is left out; where none is left, it is the error.
#[derive(Default)]
struct BadUrl(Option<PeerUrlError>);

impl BadUrl {
    fn good(&mut self, url: &str) -> Option<PeerUrl> {
        url.parse()
            .map_err(|error| self.0.get_or_insert(error))
            .ok()
    }

    fn or_no_endpoint(self, wanted: Wanted<'_>, domain: &Domain) -> RequestError {
        match self.0 {
            Some(error) => DialError::Url(error).into(),
            None => RequestError::NoEndpoint {
                service: wanted.service.to_owned(),
                domain: domain.to_string(),
            },
        }
    }
}

/// The endpoint as one that a service's matches can choose.
fn candidate<'a>(endpoint: &'a NetworkServiceEndpoint, service: &str) -> Candidate<'a> {
    static NO_LABELS: BTreeMap<String, String> = BTreeMap::new();
    let labels = endpoint.network_service_labels.get(service);
    Candidate {
        name: &endpoint.name,
        labels: labels.map_or(&NO_LABELS, |labels| &labels.labels),
    }
}

/// Whether the matches of `service` allow a client with these labels to use the endpoint.
pub(crate) fn is_match(
    service: &NetworkService,
    labels: &BTreeMap<String, String>,
    endpoint: &NetworkServiceEndpoint,
) -> bool {
    let candidates = [candidate(endpoint, &service.name)];
    !select(&convert::matches(service), labels, &candidates, 0).is_empty()
}

/// The service that was chosen by.
fn matched(at: &RegistryAt, found: &Found) -> Option<Matched> {
    let service = found.service.as_deref()?;
    Some(Matched {
        service: Arc::new(ServiceAt {
            registry: at.clone(),
            name: service.name.clone(),
        }),
        rules: Rules::of(service),
    })
}

/// The endpoint `target` as the previous hop is answered it: with the domain in the spelling in which it
/// asked, because it compares them.
fn answered_name(asked: &Connection, target: &str) -> String {
    let endpoint = &asked.network_service_endpoint_name;
    if endpoint.contains('@') {
        return endpoint.clone();
    }
    match asked.network_service.split_once('@') {
        Some((_, domain)) => format!("{target}@{domain}"),
        None => target.to_owned(),
    }
}

fn payload(found: &Found) -> String {
    found
        .service
        .as_ref()
        .map(|service| service.payload.clone())
        .unwrap_or_default()
}

fn resolution(domain: &Domain, resolved: &Resolved) -> Arc<Resolution> {
    Arc::new(Resolution {
        domain: domain.to_string(),
        question: resolved.question.clone(),
        answer: resolved.answer.clone(),
    })
}

/// The way to an endpoint of another domain that was learnt, or registered there through us.
fn known_route(way: Way, connection: &Connection) -> Route {
    let endpoint = &connection.network_service_endpoint_name;
    Route {
        url: way.url,
        expected: way.expected,
        crossing: if way.registered_here {
            Crossing::In
        } else {
            Crossing::Out
        },
        service: connection.network_service.clone(),
        endpoint: endpoint.clone(),
        endpoint_answered: endpoint.clone(),
        payload: connection.payload.clone(),
        resolution: None,
        matched: None,
        _socket: None,
    }
}

/// The domain that service and endpoint are of.
pub(super) fn common_domain(
    service: Option<&InterdomainName>,
    endpoint: Option<&InterdomainName>,
) -> Result<Option<Domain>, RequestError> {
    let of_service = service.and_then(InterdomainName::domain);
    let of_endpoint = endpoint.and_then(InterdomainName::domain);
    match (of_service, of_endpoint) {
        (Some(one), Some(other)) if one != other => Err(RequestError::Field {
            field: "network_service_endpoint_name",
            value: endpoint.map(ToString::to_string).unwrap_or_default(),
            reason: format!(
                "the network service is of domain `{one}`, and so must its endpoint be"
            ),
        }),
        (one, other) => Ok(one.or(other).cloned()),
    }
}

/// A name that may be absent.
pub(super) fn parse(name: &str) -> Result<Option<InterdomainName>, RequestError> {
    if name.is_empty() {
        return Ok(None);
    }
    Ok(Some(name.parse()?))
}
