//! The registry services as our listeners serve them: a name of our own domain goes to our
//! domain's registry, a name of another to that domain's.
//!
//! What goes out loses its `@domain`, what comes back gets it again. An endpoint that is found by a
//! name with a domain, or registered in another one, is told with our own URL: the Request for it
//! then comes to our proxy, which knows the true one (see [`crate::route::bypass`]).

mod services;

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt as _, TryFutureExt as _};
use nsm_core::nsm::name::{Domain, InterdomainName};
use nsm_proto::registry::{
    NetworkServiceEndpoint, NetworkServiceEndpointQuery,
    network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
};
use tokio::{sync::watch, time::Instant};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Response, Status, Streaming, transport::Channel};

use crate::{
    call::Call,
    convert,
    error::RequestError,
    peer::peers::{Peer, call, is_passed, refused},
    registry::{Registry, grpc::EndpointStream, path_header::PathHeader},
    route::{
        bypass::Way,
        directory::Directory,
        local::LocalEndpoint,
        router::{Arrival, Lookup},
    },
    transport::{
        dial::DialUrl,
        unix::{FileId, Kind, PATIENCE},
    },
};

/// How long after its end a registration is looked for: timers and the system's clock differ by less.
const LAPSE_MARGIN: Duration = Duration::from_secs(1);

/// The registry that a message belongs to.
enum Target<'a> {
    Here(&'a Registry),
    At { url: String, channel: Channel },
}

/// The domain that the names of one message share, and where it is served.
struct Addressed<'a> {
    target: Target<'a>,
    /// As the message names it; put back on what is answered.
    domain: Option<Domain>,
    is_ours: bool,
    /// Somebody else is the proxy: names are not touched, and what it answers is told as it is.
    by_proxy: bool,
}

/// The registry services of this agent.
pub(crate) struct Registrar {
    /// The domain of this agent.
    domain: Domain,
    /// The registry proxy that is asked for names of other domains; without one this agent is its own.
    proxy_url: Option<String>,
    lookup: Arc<Lookup>,
    /// True once the drain has closed all connections: watches on other registries end then.
    drained: watch::Receiver<bool>,
}

impl Registrar {
    pub(crate) fn new(
        domain: Domain,
        proxy_url: Option<String>,
        lookup: Arc<Lookup>,
        drained: watch::Receiver<bool>,
    ) -> Self {
        Self {
            domain,
            proxy_url,
            lookup,
            drained,
        }
    }

    async fn address<'a>(
        &'a self,
        names: impl IntoIterator<Item = &str>,
        deadline: Instant,
    ) -> Result<Addressed<'a>, RequestError> {
        let domain = common_domain(names)?;
        let own = &self.domain;
        let is_ours = domain.as_ref().is_none_or(|domain| domain == own);
        if let (false, Some(url)) = (is_ours, &self.proxy_url) {
            let channel = self.lookup.peers.channel(url, deadline).await?;
            let url = url.clone();
            return Ok(Addressed {
                target: Target::At { url, channel },
                domain: None,
                is_ours: true,
                by_proxy: true,
            });
        }
        let target = match (&domain, &self.lookup.directory) {
            (Some(domain), _) if !is_ours => self.registry_of(domain, deadline).await?,
            (_, Directory::Here(registry)) => Target::Here(registry),
            (_, Directory::At(url)) => Target::At {
                url: url.clone(),
                channel: self.lookup.peers.channel(url, deadline).await?,
            },
        };
        Ok(Addressed {
            target,
            domain,
            is_ours,
            by_proxy: false,
        })
    }

    async fn registry_of(
        &self,
        domain: &Domain,
        deadline: Instant,
    ) -> Result<Target<'static>, RequestError> {
        let resolved = self.lookup.resolver.resolve(domain).await?;
        let mut last = RequestError::Missing("registry address");
        for address in &resolved.registry {
            let url = format!("tcp://{address}");
            match self.lookup.peers.channel(&url, deadline).await {
                Ok(channel) => return Ok(Target::At { url, channel }),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Registers an endpoint. One that comes by the local socket is reached through us.
    pub(crate) async fn register_endpoint(
        &self,
        call_: Call<NetworkServiceEndpoint>,
        path: Option<PathHeader>,
    ) -> Result<NetworkServiceEndpoint, Status> {
        let mut endpoint = call_.message.clone();
        let place = self.address(names(&endpoint), call_.deadline).await?;
        place.translate(&mut endpoint, strip)?;
        let mut full_name = endpoint.name.clone();
        place.join(&mut full_name);
        self.check_owner(&call_, &full_name, &endpoint.name)?;
        let through_us = matches!(call_.arrival, Arrival::Local { .. }) || !place.is_ours;
        let own_url = endpoint.url.clone();
        let socket = self.passed_socket(&endpoint, &call_).await?;
        if socket.is_none() {
            check_url(&own_url, call_.arrival)?;
        }
        if through_us {
            endpoint.url = self.url_in(&place);
        }
        let bounds: Vec<SystemTime> = call_.token.iter().map(|(_, expires)| *expires).collect();
        let mut registered = match &place.target {
            Target::Here(registry) => {
                registry.register_endpoint(endpoint, SystemTime::now(), &bounds)?
            }
            Target::At { url, channel } => {
                let request = self.outgoing(endpoint, call_.deadline, path);
                let mut client = NetworkServiceEndpointRegistryClient::new(channel.clone());
                let answer = client.register(request);
                call(url, "Register", call_.deadline, answer)
                    .await?
                    .into_inner()
            }
        };
        let bare_name = registered.name.clone();
        place.translate(&mut registered, join_text)?;
        if through_us {
            // The registry may have named it, and another may have come first meanwhile.
            self.check_owner(&call_, &registered.name, &bare_name)?;
            registered.url.clone_from(&own_url);
            let trusted = matches!(call_.arrival, Arrival::Local { trusted: true });
            let expires = registered.expiration_time.as_ref();
            let expires = expires.and_then(convert::time);
            if place.is_ours && !place.by_proxy {
                let endpoint = LocalEndpoint {
                    url: own_url,
                    trusted,
                    uid: call_.uid,
                    expires: expires.unwrap_or_else(SystemTime::now),
                    _socket: socket,
                };
                self.keep_local(bare_name, endpoint);
            } else {
                let way = Way {
                    url: own_url,
                    registered_here: true,
                    trusted,
                    uid: call_.uid,
                    _socket: socket,
                };
                self.keep_way(&registered.name, way, expires);
            }
        }
        Ok(registered)
    }

    /// Refuses a call for a name that another user's endpoint of this node has: it would get the traffic of
    /// its clients, or take its service away.
    fn check_owner<T>(
        &self,
        call_: &Call<T>,
        full_name: &str,
        bare_name: &str,
    ) -> Result<(), RequestError> {
        // Others are not of this node, and root may do anyway what it likes.
        let Arrival::Local { trusted: false } = call_.arrival else {
            return Ok(());
        };
        let now = SystemTime::now();
        let here = self.lookup.local_endpoints.owner(bare_name, now);
        let now = std::time::Instant::now();
        let elsewhere = self.lookup.bypass.owner(full_name, now);
        for owner in [here, elsewhere].into_iter().flatten() {
            if call_.uid != Some(owner) {
                let caller = call_
                    .uid
                    .map_or("unknown".to_owned(), |uid| uid.to_string());
                return Err(RequestError::Forbidden(format!(
                    "endpoint `{full_name}` is registered by user {owner} of this node, and you are user {caller}: \
                     choose another name, or wait until it is unregistered or its registration has lapsed"
                )));
            }
        }
        Ok(())
    }

    fn keep_local(&self, name: String, endpoint: LocalEndpoint) {
        let now = SystemTime::now();
        if endpoint._socket.is_some() {
            let lookup = Arc::clone(&self.lookup);
            // Its descriptor is not to be held until the next one happens to register.
            after(endpoint.expires, move || {
                lookup.local_endpoints.forget_lapsed(SystemTime::now());
            });
        }
        self.lookup.local_endpoints.forget_lapsed(now);
        self.lookup.local_endpoints.insert(name, endpoint);
    }

    /// As [`Self::keep_local`], for an endpoint that is registered elsewhere than in our own registry.
    fn keep_way(&self, name: &str, way: Way, expires: Option<SystemTime>) {
        let now = std::time::Instant::now();
        let life = expires.map(|expires| {
            expires
                .duration_since(SystemTime::now())
                .unwrap_or_default()
        });
        if let (Some(expires), true) = (expires, way._socket.is_some()) {
            let lookup = Arc::clone(&self.lookup);
            after(expires, move || {
                lookup.bypass.forget_lapsed(std::time::Instant::now());
            });
        }
        // A life beyond what the clock can count has no end.
        let ends = life.and_then(|life| now.checked_add(life));
        self.lookup.bypass.learn(name, way, ends, now);
    }

    /// The peer of an endpoint that names its socket by inode and passes the descriptor: its path
    /// would mean nothing here, as in a container with a file system of its own.
    async fn passed_socket(
        &self,
        endpoint: &NetworkServiceEndpoint,
        call_: &Call<NetworkServiceEndpoint>,
    ) -> Result<Option<Arc<Peer>>, RequestError> {
        let (url, peers) = (&endpoint.url, &self.lookup.peers);
        let (true, Some(descriptors)) = (is_passed(url), &call_.descriptors) else {
            return Ok(None);
        };
        // One that is registered already: as long as we hold it nothing else has its inode.
        if let Some(known) = peers.known_passed(url) {
            return Ok(Some(known));
        }
        let bad = |reason: String| RequestError::Field {
            field: "url of the endpoint",
            value: url.clone(),
            reason,
        };
        let Some(id) = FileId::parse(url) else {
            return Err(bad(
                "write inode://<device>/<inode>, both decimal, as stat shows them".to_owned(),
            ));
        };
        let socket = descriptors.take(id, Kind::Socket, PATIENCE).await;
        let socket = socket.map_err(|missing| bad(missing.to_string()))?;
        Ok(Some(peers.get_passed(url, socket)))
    }

    /// Takes an endpoint out.
    pub(crate) async fn unregister_endpoint(
        &self,
        call_: Call<NetworkServiceEndpoint>,
        path: Option<PathHeader>,
    ) -> Result<(), Status> {
        let mut endpoint = call_.message.clone();
        let place = self.address(names(&endpoint), call_.deadline).await?;
        place.translate(&mut endpoint, strip)?;
        let mut full_name = endpoint.name.clone();
        place.join(&mut full_name);
        self.check_owner(&call_, &full_name, &endpoint.name)?;
        self.lookup.bypass.forget(&full_name);
        if place.is_ours {
            self.lookup.local_endpoints.remove(&endpoint.name);
        }
        match &place.target {
            Target::Here(registry) => {
                registry.unregister_endpoint(&endpoint.name);
            }
            Target::At { url, channel } => {
                endpoint.url = self.url_in(&place);
                let request = self.outgoing(endpoint, call_.deadline, path);
                let mut client = NetworkServiceEndpointRegistryClient::new(channel.clone());
                call(
                    url,
                    "Unregister",
                    call_.deadline,
                    client.unregister(request),
                )
                .await?;
            }
        }
        Ok(())
    }

    /// Finds endpoints, or watches them. Those that are asked for with a domain are told with our
    /// own URL.
    pub(crate) async fn find_endpoints(
        &self,
        call_: Call<NetworkServiceEndpointQuery>,
    ) -> Result<EndpointStream, Status> {
        let mut query = call_.message;
        let wanted = query.network_service_endpoint.get_or_insert_default();
        let place = self.address(names(wanted), call_.deadline).await?;
        place.translate(wanted, strip)?;
        let found: EndpointStream = match &place.target {
            Target::Here(registry) => registry.endpoint_stream(query)?,
            Target::At { url, channel } => {
                let watch = query.watch;
                let bound = Some(call_.deadline).filter(|_| !watch);
                let request = self.lookup.peers.outgoing(query, bound);
                let mut client = NetworkServiceEndpointRegistryClient::new(channel.clone());
                let answer = async move { client.find(request).await };
                let end = self.drained();
                find(url, watch, call_.deadline, answer, end).await?
            }
        };
        let proxy = match &place.domain {
            Some(domain) if !place.is_ours => {
                let resolved = self.lookup.resolver.resolve(domain).await;
                let resolved = resolved.map_err(RequestError::from)?;
                resolved.proxy.first().map(|proxy| format!("tcp://{proxy}"))
            }
            _ => None,
        };
        let lookup = Arc::clone(&self.lookup);
        let (domain, is_ours) = (place.domain, place.is_ours);
        Ok(Box::pin(found.map(move |answer| {
            let mut answer = answer?;
            if let Some(endpoint) = &mut answer.network_service_endpoint {
                translate(endpoint, domain.as_ref(), join_text)?;
                if !is_ours {
                    // A floating domain has no proxy: the endpoint's URL is then that of the
                    // proxy which registered it there.
                    let url = proxy.as_deref().unwrap_or(&endpoint.url);
                    // One that registered through us there is known better already.
                    if url.starts_with("tcp://") && !lookup.addresses.is_own_url(url) {
                        let way = Way {
                            url: url.to_owned(),
                            registered_here: false,
                            trusted: false,
                            uid: None,
                            _socket: None,
                        };
                        let now = std::time::Instant::now();
                        lookup.bypass.learn(&endpoint.name, way, None, now);
                    }
                }
                // Whoever was told a name with a domain asks for it so, also for one of our own:
                // it is for us to take the domain off.
                if domain.is_some() {
                    endpoint.url = lookup.addresses.internal_url().to_owned();
                }
            }
            Ok(answer)
        })))
    }

    /// Where we are reached, as it is registered there: another domain dials our public address.
    fn url_in(&self, place: &Addressed<'_>) -> String {
        if place.is_ours {
            self.lookup.addresses.internal_url().to_owned()
        } else {
            self.lookup.addresses.public_url()
        }
    }

    /// Returns when the drain has closed all connections.
    fn drained(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut drained = self.drained.clone();
        async move {
            let _ = drained.wait_for(|is_drained| *is_drained).await;
        }
    }

    fn outgoing<T>(
        &self,
        message: T,
        deadline: Instant,
        path: Option<PathHeader>,
    ) -> tonic::Request<T> {
        let mut request = self.lookup.peers.outgoing(message, Some(deadline));
        if let Some(path) = path {
            path.apply(request.metadata_mut());
        }
        request
    }
}

/// Runs `then` when a registration has ended.
fn after(expires: SystemTime, then: impl FnOnce() + Send + 'static) {
    let life = expires
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    tokio::spawn(async move {
        tokio::time::sleep(life + LAPSE_MARGIN).await;
        then();
    });
}

/// What another registry finds. One that watches may say nothing at all until there is something
/// to tell (gRPC for Go sends its headers with the first message): our caller hears at once that
/// it is watched, and a refusal in the stream. A watch ends with `end`.
async fn find<T: Send + 'static>(
    url: &str,
    watch: bool,
    deadline: Instant,
    answer: impl Future<Output = Result<Response<Streaming<T>>, Status>> + Send + 'static,
    end: impl Future<Output = ()> + Send + 'static,
) -> Result<Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>, RequestError> {
    if !watch {
        return Ok(Box::pin(
            call(url, "Find", deadline, answer).await?.into_inner(),
        ));
    }
    let url = url.to_owned();
    let stream = answer
        .map(move |answer| match answer {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(Status::from(refused(&url, "Find", &status))),
        })
        .try_flatten_stream();
    Ok(Box::pin(futures_util::StreamExt::take_until(
        stream,
        Box::pin(end),
    )))
}

impl Addressed<'_> {
    fn strip(&self, name: &mut String) -> Result<(), RequestError> {
        if !self.by_proxy {
            *name = strip(name, None)?;
        }
        Ok(())
    }

    fn join(&self, name: &mut String) {
        join(self.domain.as_ref(), name);
    }

    fn translate(
        &self,
        endpoint: &mut NetworkServiceEndpoint,
        change: fn(&str, Option<&Domain>) -> Result<String, RequestError>,
    ) -> Result<(), RequestError> {
        if self.by_proxy {
            return Ok(());
        }
        translate(endpoint, self.domain.as_ref(), change)
    }
}

/// Every name of an endpoint: its own and its services', labels included.
fn translate(
    endpoint: &mut NetworkServiceEndpoint,
    domain: Option<&Domain>,
    change: fn(&str, Option<&Domain>) -> Result<String, RequestError>,
) -> Result<(), RequestError> {
    endpoint.name = change(&endpoint.name, domain)?;
    for service in &mut endpoint.network_service_names {
        *service = change(service, domain)?;
    }
    let labels = std::mem::take(&mut endpoint.network_service_labels);
    endpoint.network_service_labels = labels
        .into_iter()
        .map(|(service, labels)| Ok((change(&service, domain)?, labels)))
        .collect::<Result<BTreeMap<_, _>, RequestError>>()?;
    Ok(())
}

fn names(endpoint: &NetworkServiceEndpoint) -> impl Iterator<Item = &str> {
    std::iter::once(&endpoint.name)
        .chain(&endpoint.network_service_names)
        .chain(endpoint.network_service_labels.keys())
        .map(String::as_str)
}

/// A URL that we or others can dial: a socket is only there for those of its node.
fn check_url(url: &str, arrival: Arrival) -> Result<(), RequestError> {
    let bad = |reason: String| RequestError::Field {
        field: "url of the endpoint",
        value: url.to_owned(),
        reason,
    };
    match url.parse::<DialUrl>() {
        Err(error) => Err(bad(error.to_string())),
        Ok(DialUrl::Unix(_)) if arrival == Arrival::Network => Err(bad(
            "a unix:// URL is known on its node only, register it there or write tcp://address:port"
                .to_owned(),
        )),
        Ok(_) => Ok(()),
    }
}

/// The one domain that the names carry, if any.
fn common_domain<'a>(
    names: impl IntoIterator<Item = &'a str>,
) -> Result<Option<Domain>, RequestError> {
    let mut common: Option<Domain> = None;
    for name in names.into_iter().filter(|name| name.contains('@')) {
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

fn strip(name: &str, _: Option<&Domain>) -> Result<String, RequestError> {
    if !name.contains('@') {
        return Ok(name.to_owned());
    }
    Ok(name.parse::<InterdomainName>()?.target().to_owned())
}

fn join_text(name: &str, domain: Option<&Domain>) -> Result<String, RequestError> {
    let mut name = name.to_owned();
    join(domain, &mut name);
    Ok(name)
}

/// Puts the domain back. A name that is none stays none.
fn join(domain: Option<&Domain>, name: &mut String) {
    if let Some(domain) = domain.filter(|_| !name.is_empty()) {
        name.push('@');
        name.push_str(domain.as_str());
    }
}

#[cfg(test)]
mod tests;
