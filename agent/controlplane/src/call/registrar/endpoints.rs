//! Calls about endpoints: who may register a name, where the endpoint really listens, and what others are given instead.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use nsm_core::{
    identity::{
        Caller,
        policy::{Action, Name, Refusal, decide},
        share::Holder,
    },
    net::{PeerPlace, PeerUrl, PeerUrlError},
};
use nsm_proto::registry::{NetworkServiceEndpoint, NetworkServiceEndpointQuery};

use super::{
    Place, Registrar, answers,
    names::{Named as _, joined},
};
use crate::{
    call::{Call, add_missing},
    convert,
    error::RequestError,
    peer::peers::{PassedSocket, Peer},
    places::{NoPlace, Place as Held},
    registry::{path_header::PathHeader, wire::Answers},
    route::{
        bypass::Way, expected::Expected, local::LocalEndpoint, lookup::Lookup, router::Arrival,
    },
    transport::unix::{FileId, Kind, PATIENCE},
};

/// How long after its end a registration is removed: timers and the system's clock differ by less.
const LAPSE_MARGIN: Duration = Duration::from_secs(1);

/// Open files of an endpoint that has passed its socket: the descriptor, and the connection to it.
const FILES: usize = 2;

/// Where an endpoint that is reached through us really listens.
struct Behind {
    url: PeerUrl,
    registrant: Caller,
    /// Its services, with their domain.
    services: Vec<String>,
    /// Holds the descriptor of its socket, when it has passed one in the place of a path.
    socket: Option<Arc<Peer>>,
    /// Its place among those of its registrant, where that is not the registry's.
    place: Option<Arc<Held>>,
}

impl Registrar {
    /// Registers an endpoint. One that comes by the local socket is reached through us.
    pub(crate) async fn register_endpoint(
        &self,
        call: Call<NetworkServiceEndpoint>,
        path: Option<PathHeader>,
    ) -> Result<NetworkServiceEndpoint, RequestError> {
        call.message.check()?;
        let call = self.admit(call, path.as_ref())?;
        let (place, mut endpoint, terms) = self.enter(&call, path).await?;
        let full_name = joined(&endpoint.name, place.domain.as_ref());
        self.decide(&call.caller, &full_name, &endpoint.name, Action::Register)?;
        if call.arrival == Arrival::Local {
            self.label(&mut endpoint);
        }
        bound(&mut endpoint, terms.expires);
        let through_us = call.arrival == Arrival::Local || !place.is_ours;
        let url = endpoint.url.parse();
        let url = url.map_err(|error: PeerUrlError| bad_url(&endpoint.url, error.to_string()))?;
        let mut behind = Behind {
            socket: self.passed_socket(&url, &call).await?,
            url,
            registrant: call.caller.clone(),
            services: call.message.network_service_names.clone(),
            place: None,
        };
        if behind.socket.is_none() {
            check_url(&behind.url, call.arrival)?;
            if call.arrival == Arrival::Local {
                self.check_dialled(&behind.url)?;
            }
            if matches!(behind.url.place(), PeerPlace::Unix(_)) {
                decide(&call.caller, Action::SocketPath(behind.url.as_str()))?;
            }
        }
        if through_us {
            endpoint.url = self.url_in(&place)?;
            behind.place = self.place_of(&place, &endpoint.name, call.holder)?;
        }
        let endpoints = place.registry.endpoints();
        let mut registered = endpoints.register(endpoint, terms).await?;
        if through_us {
            // The registry may have named it, and another may have come first meanwhile.
            let full_name = joined(&registered.name, place.domain.as_ref());
            self.decide(&call.caller, &full_name, &registered.name, Action::Register)?;
            registered.url = behind.url.to_string();
            let expires = registered.expiration_time.as_ref();
            let expires = expires.and_then(convert::time);
            self.keep(&place, &registered.name, behind, expires);
        }
        registered.join(place.domain.as_ref())?;
        Ok(registered)
    }

    /// What the agent would not dial is no endpoint of this node. A name is checked when it leads somewhere.
    fn check_dialled(&self, url: &PeerUrl) -> Result<(), RequestError> {
        let PeerPlace::Tcp { port, .. } = url.place() else {
            return Ok(());
        };
        let Some(address) = url.address() else {
            return Ok(());
        };
        let checked = self.lookup.peers.guard().check((address, *port).into());
        checked.map_err(|refusal| bad_url(url.as_str(), refusal.to_string()))
    }

    /// Labels an endpoint of this node with the names of the node, for each of its services.
    fn label(&self, endpoint: &mut NetworkServiceEndpoint) {
        if self.client_info.is_empty() {
            return;
        }
        for service in &endpoint.network_service_names {
            let labels = endpoint.network_service_labels.entry(service.clone());
            add_missing(&mut labels.or_default().labels, &self.client_info);
        }
    }

    /// Decides a call about the endpoint `full`, which its registry has as `bare`. A name has an owner where it is registered with us, in our domain or another.
    fn decide<'n>(
        &self,
        caller: &Caller,
        full: &'n str,
        bare: &str,
        action: fn(Name<'n>) -> Action<'n>,
    ) -> Result<(), RequestError> {
        let endpoints = &self.lookup.local_endpoints;
        let here = endpoints.owner(bare, SystemTime::now());
        let elsewhere = self.lookup.bypass.owner(full, Instant::now());
        for owner in [here, elsewhere] {
            decide(caller, action(Name { full, owner }))?;
        }
        Ok(())
    }

    /// Keeps where an endpoint listens that is reached through us, as long as it is registered.
    fn keep(&self, place: &Place, bare_name: &str, behind: Behind, expires: Option<SystemTime>) {
        if place.is_ours && !place.by_proxy {
            self.keep_local(
                bare_name.to_owned(),
                LocalEndpoint {
                    url: behind.url,
                    registrant: behind.registrant,
                    expires: expires.unwrap_or_else(SystemTime::now),
                    _socket: behind.socket,
                    place: behind.place,
                },
            );
        } else {
            let way = Way {
                url: behind.url,
                expected: Expected::Own,
                registered_here: true,
                services: behind.services,
                registrant: behind.registrant,
                _socket: behind.socket,
                place: behind.place,
            };
            self.keep_way(&joined(bare_name, place.domain.as_ref()), way, expires);
        }
    }

    /// A place for an endpoint that is registered elsewhere: the registry in this process counts its own entries.
    fn place_of(
        &self,
        place: &Place,
        bare_name: &str,
        holder: Holder,
    ) -> Result<Option<Arc<Held>>, NoPlace> {
        let is_here = place.is_ours && !place.by_proxy;
        if is_here && self.lookup.registry.counts().is_some() {
            return Ok(None);
        }
        let known = if is_here {
            self.lookup
                .local_endpoints
                .get(bare_name)
                .and_then(|known| known.place)
        } else {
            let full_name = joined(bare_name, place.domain.as_ref());
            let way = self.lookup.bypass.way(&full_name, Instant::now());
            way.and_then(|known| known.place)
        };
        match known {
            Some(known) => Ok(Some(known)),
            None => Ok(Some(Arc::new(self.budget.entries.take(holder, 1)?))),
        }
    }

    fn keep_local(&self, name: String, endpoint: LocalEndpoint) {
        let now = SystemTime::now();
        if endpoint._socket.is_some() {
            let lookup = Arc::clone(&self.lookup);
            // Its descriptor must not be held until the next endpoint happens to register.
            after(endpoint.expires, move || {
                lookup.local_endpoints.forget_lapsed(SystemTime::now());
            });
        }
        self.lookup.local_endpoints.forget_lapsed(now);
        self.lookup.local_endpoints.insert(name, endpoint);
    }

    /// As [`Self::keep_local`], for an endpoint that is registered elsewhere than in our own registry.
    fn keep_way(&self, name: &str, way: Way, expires: Option<SystemTime>) {
        let now = Instant::now();
        let life = expires.map(|expires| {
            expires
                .duration_since(SystemTime::now())
                .unwrap_or_default()
        });
        if let (Some(expires), true) = (expires, way._socket.is_some()) {
            let lookup = Arc::clone(&self.lookup);
            after(expires, move || lookup.bypass.forget_lapsed(Instant::now()));
        }
        // A life beyond what the clock can count has no end.
        let ends = life.and_then(|life| now.checked_add(life));
        self.lookup.bypass.learn(name, way, ends, now);
    }

    /// The peer of an endpoint that names its socket by inode and passes the descriptor: its path
    /// would mean nothing here, as in a container with a file system of its own.
    async fn passed_socket(
        &self,
        url: &PeerUrl,
        call: &Call<NetworkServiceEndpoint>,
    ) -> Result<Option<Arc<Peer>>, RequestError> {
        let peers = &self.lookup.peers;
        let (Some(id), Some(descriptors)) = (FileId::of(url), &call.descriptors) else {
            return Ok(None);
        };
        // Administrators may connect anywhere, and what they name is not looked at.
        let is_guarded = !call.caller.is_administrator();
        let registrant = call.caller.process().filter(|_| is_guarded).copied();
        // One that is registered already: as long as we hold it nothing else has its inode.
        if let Some(known) = peers.known_passed(url) {
            if known.is_open_to(registrant.as_ref()) {
                return Ok(Some(known));
            }
            let url = url.to_string();
            return Err(Refusal::SocketOfAnother { url }.into());
        }
        let place = self.budget.clients.take(call.holder, FILES)?;
        let socket = descriptors.take(id, Kind::Socket, PATIENCE).await;
        let socket = socket.map_err(|missing| bad_url(url.as_str(), missing.to_string()))?;
        let socket = PassedSocket {
            socket,
            registrant,
            _place: Some(place),
        };
        Ok(Some(peers.get_passed(url, socket)))
    }

    /// Takes an endpoint out.
    pub(crate) async fn unregister_endpoint(
        &self,
        call: Call<NetworkServiceEndpoint>,
        path: Option<PathHeader>,
    ) -> Result<(), RequestError> {
        let call = self.admit(call, path.as_ref())?;
        let (place, mut endpoint, terms) = self.enter(&call, path).await?;
        let full_name = joined(&endpoint.name, place.domain.as_ref());
        self.decide(&call.caller, &full_name, &endpoint.name, Action::Unregister)?;
        let name = endpoint.name.clone();
        // A registry goes by the name.
        endpoint.url = self.url_in(&place).unwrap_or_default();
        place
            .registry
            .endpoints()
            .unregister(endpoint, terms)
            .await?;
        // Not before: while the registry offers the endpoint, Requests for it need its route, and its name is taken.
        self.lookup.bypass.forget(&full_name);
        if place.is_ours {
            self.lookup.local_endpoints.remove(&name);
        }
        Ok(())
    }

    /// Finds endpoints, or watches them. Those that are asked for with a domain are answered with our
    /// own URL.
    pub(crate) async fn find_endpoints(
        &self,
        call: Call<NetworkServiceEndpointQuery>,
    ) -> Result<Answers<NetworkServiceEndpoint>, RequestError> {
        let holder = call.holder;
        let sight = self.sight::<NetworkServiceEndpoint>(&call);
        let (place, found) = self.find(call).await?;
        let proxy = match &place.domain {
            Some(domain) if !place.is_ours => {
                let resolved = self.lookup.resolve(domain, holder).await?;
                resolved.proxy.first().copied().map(PeerUrl::from)
            }
            _ => None,
        };
        let lookup = Arc::clone(&self.lookup);
        let sight = sight.filter(|_| place.has_our_entries());
        Ok(answers(
            found,
            sight,
            move |endpoint: &mut NetworkServiceEndpoint| {
                endpoint.join(place.domain.as_ref())?;
                if !place.is_ours {
                    // A floating domain has no proxy: the endpoint's URL is then that of the
                    // proxy which registered it there.
                    let url = proxy.clone().or_else(|| endpoint.url.parse().ok());
                    let expected = match place.domain.clone().map(Expected::Of) {
                        Some(domain) if proxy.is_some() => domain,
                        otherwise => {
                            Expected::of_entry(endpoint, otherwise.unwrap_or(Expected::Own))
                        }
                    };
                    learn_way(&lookup, &endpoint.name, url, expected);
                }
                // A caller that was answered a name with a domain asks for it so, also for one of our own
                // domain: our proxy takes the domain off.
                if place.domain.is_some() {
                    endpoint.url = lookup.addresses.internal_url()?;
                }
                Ok(())
            },
        ))
    }

    /// Where we are reached, as it is registered there: another domain dials our public address.
    fn url_in(&self, place: &Place) -> Result<String, RequestError> {
        if place.is_ours {
            self.lookup.addresses.internal_url()
        } else {
            self.lookup.addresses.public_url()
        }
    }
}

/// Limits an endpoint's registration to the life of its token. A registry elsewhere gets our token and cannot see the endpoint's.
fn bound(endpoint: &mut NetworkServiceEndpoint, token_expires: Option<SystemTime>) {
    let Some(latest) = token_expires else {
        return;
    };
    let asked = endpoint.expiration_time.as_ref().and_then(convert::time);
    let expires = asked.map_or(latest, |asked| asked.min(latest));
    endpoint.expiration_time = Some(convert::timestamp(expires));
}

/// Learns where an endpoint of another domain was found.
fn learn_way(lookup: &Lookup, name: &str, url: Option<PeerUrl>, expected: Expected) {
    // A socket of our own node is not in another domain. An endpoint that registered through us there is known better already.
    let url = url.filter(|url| !url.is_local() && !lookup.addresses.is_own_url(url.as_str()));
    if let Some(url) = url {
        let way = Way {
            url,
            expected,
            registered_here: false,
            services: Vec::new(),
            registrant: Caller::over_network(),
            _socket: None,
            place: None,
        };
        lookup.bypass.learn(name, way, None, Instant::now());
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

/// A URL that we or others can dial: a socket is only there for those of its node.
fn check_url(url: &PeerUrl, arrival: Arrival) -> Result<(), RequestError> {
    let reason = match (url.place(), arrival) {
        (PeerPlace::Tcp { .. }, _) | (PeerPlace::Unix(_), Arrival::Local | Arrival::Forwarder) => {
            return Ok(());
        }
        (PeerPlace::Unix(_), Arrival::Network) => {
            "a unix:// URL is known on its node only, register it there or write tcp://address:port"
        }
        (PeerPlace::Passed { .. }, _) => {
            "its descriptor cannot be passed on this connection, register over the agent's socket or write \
             tcp://address:port"
        }
    };
    Err(bad_url(url.as_str(), reason.to_owned()))
}

fn bad_url(url: &str, reason: String) -> RequestError {
    RequestError::Field {
        field: "url of the endpoint",
        value: url.to_owned(),
        reason,
    }
}
