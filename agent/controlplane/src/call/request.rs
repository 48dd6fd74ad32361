//! A Request, from the message to the connection that stands: every role's part, top to bottom.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use nsm_core::{
    link::LinkAlias,
    mechanism::{Parameters, VNI, Vxlan, lower_mtu, vxlan_mtu},
    net::Vni,
    nsm::path::{Hop, Path},
};
use nsm_proto::{
    connection::{Connection, ConnectionEventType, Mechanism, State},
    networkservice::NetworkServiceRequest,
};
use tokio::time::Instant;
use tonic::Code;

use self::messages::{
    End, all_failed, check, named, own_id, reflector, resume, serves, set_mac, source,
    undo_connection,
};
use crate::{
    call::{
        Answer, Call, Calls,
        case::{Case, Ends, Tunnel, interface, mac, tunnel_mtu},
        close::Cause,
        pod::PassedNetns,
    },
    connection::{model::Established, store::Turn},
    convert,
    error::RequestError,
    liveness::{Reachability, Remote},
    peer::{peers::Peer, stream},
    ports::{ForwarderError, Plan},
    route::{
        addresses::Crossing,
        router::{Arrival, Route},
    },
};

pub(crate) use self::messages::{bad_answer, without_inode};

mod dataplane;
mod messages;
mod offer;

/// Endpoints tried for one Request. Each may cost a dial timeout; the deadline bounds them all.
const MAX_ENDPOINTS: usize = 4;

/// VNIs asked for in one Request. A server chooses among eight million at random: a second
/// collision in a row means that something else is wrong.
const MAX_VNIS: u32 = 4;

/// How long a Close may take that undoes a Request which failed.
const UNDO_TIMEOUT: Duration = Duration::from_secs(5);

/// A Request in the terms of its next hop's side.
struct Ask {
    arrival: Arrival,
    /// The namespaces that the caller's mechanisms name, with the descriptors that came with them.
    passed: PassedNetns,
    /// As it came, but for `id` and `path`, which are those of our segment.
    connection: Connection,
    path: Path,
    preferences: Vec<Mechanism>,
    expires: SystemTime,
    deadline: Instant,
    /// The path or its control plane was lost and another way is wanted: this one comes last.
    avoid: Option<Route>,
    /// The hop at which the connection stands has it no more: it granted another endpoint under the same
    /// id, and that was taken back.
    is_moved: AtomicBool,
    /// Kept by whatever is still to be undone at a next hop: no later Request of the connection
    /// may reach that hop before.
    turn: Arc<Turn>,
}

impl Calls {
    /// Makes or refreshes a connection. The work goes on when the caller goes away, so that it
    /// either stands, to be closed by its token's expiry, or leaves nothing behind.
    ///
    /// # Errors
    /// See [`RequestError`]: nothing of a Request that fails is left on either side.
    pub(crate) async fn request(
        self: &Arc<Self>,
        call: Call<NetworkServiceRequest>,
    ) -> Result<Answer, RequestError> {
        let calls = Arc::clone(self);
        // Boxed, so that what is moved into the task is a pointer and not some ten kilobytes.
        tokio::spawn(Box::pin(calls.serve_request(call)))
            .await
            .unwrap_or(Err(RequestError::Internal))
    }

    async fn serve_request(
        self: Arc<Self>,
        call: Call<NetworkServiceRequest>,
    ) -> Result<Answer, RequestError> {
        let mut connection = call
            .message
            .connection
            .ok_or(RequestError::Missing("connection"))?;
        let asked_id = connection.id.clone();
        let (path, hop, expires) = self.enter(&mut connection, call.token)?;
        let turn = self.held.connections.admit(&hop.id, call.deadline).await?;
        let mut avoid = None;
        if connection.state() == State::ReselectRequested
            && let Some(current) = turn.current()
        {
            if current.is_left_standing() {
                // The old tunnel stands until the new one does; its next hop may not even hear a Close.
                avoid = Some(current.route.clone());
            } else {
                self.tear_down(&turn, call.deadline, Cause::Asked).await;
            }
        }
        connection.set_state(State::Up);
        let passed = match &call.descriptors {
            Some(descriptors) if self.forwarder.is_some() => {
                let mechanisms = connection.mechanism.iter();
                let mechanisms = mechanisms.chain(&call.message.mechanism_preferences);
                PassedNetns::collect(descriptors, mechanisms, call.caller).await
            }
            _ => PassedNetns::none_of(call.caller),
        };
        let mut ask = Ask {
            arrival: call.arrival,
            passed,
            connection,
            path,
            preferences: call.message.mechanism_preferences,
            expires,
            deadline: call.deadline,
            avoid,
            is_moved: AtomicBool::new(false),
            turn: Arc::new(turn),
        };
        let prior = ask.turn.current();
        if let Some(prior) = &prior {
            resume(&mut ask.path, &prior.view);
        }
        let established = self.establish(&ask, prior.as_deref()).await;
        let established = established.inspect_err(|_| {
            if ask.is_moved.load(Ordering::Relaxed) {
                self.publish_gone(&ask.turn);
            } else {
                self.outlive(&ask.turn, ask.expires);
            }
        })?;
        Ok(self.commit(&ask.turn, prior, established, &hop, asked_id))
    }

    /// The server's part of the path rules: the previous hop's token into its segment, our own
    /// segment added or found again, our token into it.
    pub(crate) fn enter(
        &self,
        connection: &mut Connection,
        token: Option<(String, SystemTime)>,
    ) -> Result<(Path, Hop, SystemTime), RequestError> {
        let mut path = convert::path(connection.path.take().unwrap_or_default());
        let now = SystemTime::now();
        if let Some((token, expires)) = token
            && let Some(previous) = path.segments.get_mut(path.index as usize)
        {
            previous.token = token;
            previous.expires = Some(expires);
        }
        let name = &self.config.name;
        let fresh_id = (!path.knows(name)).then(|| own_id(&path, name));
        let hop = path.descend(&connection.id, name, || fresh_id.unwrap_or_default())?;
        let previous = hop
            .previous
            .and_then(|at| path.segments.get(at as usize))
            .ok_or(RequestError::Missing("previous path segment"))?;
        let expires = previous
            .expires
            .ok_or(RequestError::Missing("expiry of the previous path segment"))?;
        if let Ok(ago) = now.duration_since(expires) {
            return Err(RequestError::Expired {
                segment: previous.name.clone(),
                ago,
            });
        }
        let (own_token, own_expires) = self.tokens.token(now);
        if let Some(own) = path.segments.get_mut(hop.index as usize) {
            own.token = own_token;
            own.expires = Some(own_expires);
        }
        connection.id.clone_from(&hop.id);
        // A caller's clock or claim keeps nothing here beyond our own token, which is on the path
        // too: whoever refreshes in time for the smallest expiry is in time for this one.
        Ok((path, hop, expires.min(own_expires)))
    }

    /// Tries the way it went before, then every endpoint that serves the name: those whose path is known to be lost last.
    async fn establish(
        self: &Arc<Self>,
        ask: &Ask,
        prior: Option<&Established>,
    ) -> Result<Established, RequestError> {
        let policy = self.liveness.policy();
        let mut failures = Vec::new();
        let stood = prior.filter(|prior| ask.avoid.is_none() && serves(prior, &ask.connection));
        if let Some(prior) = stood {
            let strict = policy == Reachability::Require;
            match self.try_route(ask, &prior.route, Some(prior), strict).await {
                Err(error) if error.is_about_the_endpoint() => failures.push(error),
                outcome => return outcome,
            }
        }
        let routes = self
            .router
            .routes(ask.arrival, &ask.connection, ask.deadline);
        let mut routes = match routes.await {
            Ok(routes) => routes,
            // A registry forgets the endpoints of an agent that is away: it is away all the same, and what stands there stands.
            Err(error) if error.code() == Code::NotFound => {
                let away = failures.pop();
                return Err(away
                    .filter(|failure| failure.code() == Code::Unavailable)
                    .unwrap_or(error));
            }
            Err(error) => return Err(error),
        };
        routes.sort_by_key(|route| self.doubts(ask, route));
        let has_failed = |route: &Route| {
            prior.is_some_and(|prior| !failures.is_empty() && prior.route.is_to_same(route))
        };
        let untried: Vec<&Route> = routes
            .iter()
            .filter(|route| !has_failed(route))
            .take(MAX_ENDPOINTS)
            .collect();
        let mut unproven = None;
        for (at, route) in untried.iter().enumerate() {
            // As long as there are others, none is taken whose path fails its proof; whoever offers none is taken like any other.
            let strict = policy == Reachability::Require
                || policy == Reachability::Prefer && at + 1 < untried.len();
            match self.try_route(ask, route, prior, strict).await {
                Err(error) if error.is_about_the_endpoint() => {
                    tracing::debug!(endpoint = %route.endpoint, %error, "an endpoint failed");
                    if matches!(error, RequestError::Unproven { .. }) {
                        unproven.get_or_insert(*route);
                    }
                    failures.push(error);
                }
                outcome => return outcome,
            }
        }
        if let Some(route) = unproven.filter(|_| policy == Reachability::Prefer) {
            return self.try_route(ask, route, prior, false).await;
        }
        Err(all_failed(&ask.connection.network_service, failures))
    }

    /// How little is hoped of a route: the one whose loss made somebody ask again comes last, one whose path is down before it.
    fn doubts(&self, ask: &Ask, route: &Route) -> u8 {
        if ask
            .avoid
            .as_ref()
            .is_some_and(|avoid| avoid.is_to_same(route))
        {
            return 2;
        }
        let tunnel = self.lookup.peers.get(&route.url).tunnel();
        let health = tunnel.and_then(|path| self.liveness.health(&path));
        u8::from(health.is_some_and(|health| health.is_down()))
    }

    /// Asks one next hop, and sets up our part of what it grants.
    async fn try_route(
        self: &Arc<Self>,
        ask: &Ask,
        route: &Route,
        prior: Option<&Established>,
        strict: bool,
    ) -> Result<Established, RequestError> {
        if route.crossing != Crossing::Inside {
            self.lookup.addresses.known(ask.deadline).await;
        }
        let case = Case::of(
            ask.arrival,
            self.forwarder.is_some(),
            &ask.connection,
            &ask.preferences,
            &ask.passed,
            route,
        )?;
        if !matches!(case, Case::Through)
            && let Some(context) = &ask.connection.context
        {
            Ends::parse(self.alias(&ask.connection.id)?, context)?.check()?;
        }
        let peer = self.lookup.peers.get(&route.url);
        let is_same_hop = prior.is_some_and(|prior| prior.route.url == route.url);
        let is_same = prior.is_some_and(|prior| prior.route.is_to_same(route));
        let standing = prior.and_then(|prior| prior.next_mechanism.clone());
        let mut next_mechanism = standing.filter(|_| is_same_hop).map(|mut standing| {
            if !is_same {
                // Its tunnel may end elsewhere: the VNI is not that server's to keep.
                standing.parameters.remove(VNI);
            }
            standing
        });
        let mut taken = 0;
        for _ in 0..MAX_VNIS {
            let request = self
                .offer(ask, route, &case, next_mechanism.take(), prior)
                .await?;
            let sent_source = source(&request);
            let stands = is_same_hop && !ask.is_moved.load(Ordering::Relaxed);
            let asked = self.lookup.peers.request(&peer, request, ask.deadline);
            let mut reply = match asked.await {
                Ok(reply) => reply,
                Err(error) => {
                    // It may have done its part all the same. One that refuses another endpoint keeps what
                    // stands there; were the refusal a broken stream, its monitor would break too.
                    let undoes = if stands {
                        !is_same && matches!(error, RequestError::Silent { .. })
                    } else {
                        error.may_have_been_granted()
                    };
                    if undoes {
                        ask.is_moved.fetch_or(is_same_hop, Ordering::Relaxed);
                        let undo = undo_connection(ask, route, Connection::default());
                        self.undo_at(&peer, undo, &ask.turn);
                    }
                    return Err(error);
                }
            };
            let accepted = self
                .accept(ask, route, &case, &mut reply, sent_source, prior, strict)
                .await;
            match accepted {
                Ok(established) => return Ok(established),
                Err(error) => {
                    let is_taken = match &error {
                        RequestError::Forwarder(ForwarderError::VniTaken(vni)) => Some(*vni),
                        _ => None,
                    };
                    if !(stands && is_same) || is_taken.is_some() {
                        ask.is_moved.fetch_or(is_same_hop, Ordering::Relaxed);
                        // The next try may be at the same hop, under the same id: undo first.
                        let undo = undo_connection(ask, route, reply);
                        let undone = self.undo_at(&peer, undo, &ask.turn);
                        let _ = tokio::time::timeout_at(ask.deadline, undone).await;
                    }
                    match is_taken {
                        Some(vni) if matches!(case, Case::PodToTunnel(..)) => taken = vni,
                        _ => return Err(error),
                    }
                }
            }
        }
        Err(RequestError::VniTaken {
            url: route.url.to_string(),
            vni: taken,
            tries: MAX_VNIS,
        })
    }

    /// Checks the next hop's reply, proves the path that it needs, and makes this node's part of it real. A reply that is not taken
    /// keeps what it says of path and mechanism, by which it is undone.
    #[allow(
        clippy::too_many_arguments,
        reason = "one Request's facts, used once and together"
    )]
    async fn accept(
        &self,
        ask: &Ask,
        route: &Route,
        case: &Case,
        reply: &mut Connection,
        sent_source: Option<String>,
        prior: Option<&Established>,
        strict: bool,
    ) -> Result<Established, RequestError> {
        check(ask, route, case, reply)?;
        let mut next_mechanism = reply.mechanism.clone();
        if let Some(mechanism) = &mut next_mechanism {
            let addresses = &self.lookup.addresses;
            addresses.swap_reply(route.crossing, mechanism, sent_source.as_deref());
        }
        let none = Parameters::new();
        let parameters = next_mechanism
            .as_ref()
            .map_or(&none, |mechanism| &mechanism.parameters);
        let wrong = |error: &dyn std::fmt::Display| bad_answer(route, error.to_string());
        let id = &ask.connection.id;
        let context = reply.context.get_or_insert_default();
        let mut joined = None;
        let mut agreed_mtu = 0;
        let (client_mechanism, plan, vni) = match case {
            Case::Through => {
                if let Some(plan) = prior.and_then(|prior| prior.plan.as_ref()) {
                    self.forwarder()?.down(plan).await?;
                }
                (next_mechanism.clone(), None, None)
            }
            Case::PodToPod(client, mechanism) => {
                let endpoint = self.endpoint_pod(route, parameters).await?;
                set_mac(context, End::Endpoint, &mac(id, "endpoint"));
                let name = interface(&client.kernel, id);
                let plan = Ends::parse(self.alias(id)?, context)
                    .and_then(|ends| {
                        ends.pair(
                            (client, name.clone()),
                            (&endpoint, interface(&endpoint.kernel, id)),
                        )
                    })
                    .map_err(|error| wrong(&error))?;
                self.bring_up(&plan, prior).await?;
                let mechanism = named(mechanism, &client.kernel, &name);
                (Some(mechanism), Some(plan), None)
            }
            Case::PodToTunnel(client, mechanism) => {
                let vxlan = Vxlan::parse(parameters).map_err(|error| wrong(&error))?;
                let (Some(vni), Some(remote)) = (vxlan.vni, vxlan.dst_ip) else {
                    return Err(wrong(&"its VXLAN mechanism lacks vni or dst_ip"));
                };
                let underlay = self.forwarder()?.underlay(Some(remote)).await?;
                agreed_mtu = if vxlan.dst_discriminator.is_some() {
                    // One that watches the path agrees in the mechanism; its context has what the path carries now.
                    let asked = vxlan.mtu.unwrap_or(context.mtu);
                    lower_mtu(asked, vxlan_mtu(underlay.mtu, underlay.ip))
                } else {
                    tunnel_mtu(context, &underlay, vxlan.mtu)
                };
                let path = self
                    .liveness
                    .join(
                        id,
                        Remote {
                            address: remote,
                            port: vxlan.dst_port,
                            reflector: reflector(vxlan.dst_discriminator, vxlan.sbfd_vni),
                        },
                        vxlan_mtu(underlay.mtu, underlay.ip),
                        prior,
                    )
                    .await;
                joined = Some(path);
                let name = interface(&client.kernel, id);
                let tunnel = Tunnel {
                    vni,
                    local: underlay.ip,
                    remote,
                    port: vxlan.dst_port,
                };
                let made = async {
                    let is_other_way = path.is_new || ask.avoid.is_some();
                    if is_other_way || path.is_joined_anew {
                        // A peer that has another reflector now is refused no more than one that is as it was.
                        self.liveness
                            .prove(route.url.as_str(), &path, strict && is_other_way)
                            .await?;
                    }
                    let carried =
                        lower_mtu(context.mtu, self.liveness.path_mtu(path.watched.as_ref()));
                    context.mtu = lower_mtu(agreed_mtu, carried);
                    let plan = Ends::parse(self.alias(id)?, context)
                        .and_then(|ends| ends.client_tunnel(client, name.clone(), tunnel))
                        .map_err(|error| wrong(&error))?;
                    let held = prior.and_then(|prior| prior.vni);
                    if held != Some(vni) {
                        let claimed = self.held.vnis.claim(vni);
                        claimed.map_err(|_| ForwarderError::VniTaken(vni.get()))?;
                    }
                    if let Err(error) = self.bring_up(&plan, prior).await {
                        self.release_unless(held, vni);
                        return Err(error);
                    }
                    Ok(plan)
                };
                let plan = match made.await {
                    Ok(plan) => plan,
                    Err(error) => {
                        self.liveness.leave(id, &path);
                        return Err(error);
                    }
                };
                self.lookup.peers.get(&route.url).set_tunnel(path.watched);
                let mechanism = named(mechanism, &client.kernel, &name);
                (Some(mechanism), Some(plan), Some(vni))
            }
            Case::TunnelToPod(vxlan, mechanism) => {
                let endpoint = self.endpoint_pod(route, parameters).await?;
                set_mac(context, End::Endpoint, &mac(id, "endpoint"));
                let answered = self
                    .answer_tunnel(id, vxlan, mechanism, &endpoint, context, route, prior)
                    .await?;
                joined = Some(answered.path);
                agreed_mtu = answered.agreed_mtu;
                (
                    Some(answered.mechanism),
                    Some(answered.plan),
                    Some(answered.vni),
                )
            }
        };
        let mut view = std::mem::take(reply);
        view.id.clone_from(id);
        view.network_service
            .clone_from(&ask.connection.network_service);
        view.network_service_endpoint_name
            .clone_from(&route.endpoint_answered);
        view.mechanism = client_mechanism;
        view.set_state(State::Up);
        let path = self.liveness.path_state(
            joined.as_ref(),
            agreed_mtu,
            prior.filter(|_| ask.avoid.is_none()),
        );
        let mut established = Established {
            view,
            route: route.clone(),
            next_mechanism,
            plan: plan.map(Plan::without_descriptors),
            vni,
            expires: ask.expires,
            path,
        };
        self.liveness.settle(&mut established);
        Ok(established)
    }

    /// Stores the connection, tells the monitors, and answers.
    fn commit(
        self: &Arc<Self>,
        turn: &Arc<Turn>,
        prior: Option<Arc<Established>>,
        established: Established,
        hop: &Hop,
        asked_id: String,
    ) -> Answer {
        let id = turn.id();
        let mut connection = established.view.clone();
        connection.id = asked_id;
        // Granted, whatever the monitors are told of its path.
        connection.set_state(State::Up);
        if let Some(path) = &mut connection.path {
            path.index = hop.previous.unwrap_or_default();
        }
        let answer = Answer {
            connection,
            resolution: established.route.resolution.clone(),
            next_mechanism: established
                .next_mechanism
                .as_ref()
                .map(|mechanism| mechanism.r#type.clone()),
            vni: established.vni.map(Vni::get),
        };
        if let Some(prior) = prior {
            if prior.route.url != established.route.url {
                let peer = self.lookup.peers.get(&prior.route.url);
                peer.leave(id);
                self.undo_at(&peer, self.downstream_view(&prior), turn);
            }
            self.liveness.exchange(id, &prior, &established);
            if let Some(vni) = prior.vni
                && prior.vni != established.vni
            {
                self.held.vnis.release(vni);
            }
        }
        let established = Arc::new(established);
        let peer = self.lookup.peers.get(&established.route.url);
        turn.set(Some(Arc::clone(&established)));
        self.held.expiries.set(id, established.expires);
        peer.join(id, || {
            let liveness = Arc::clone(&self.liveness);
            stream::watch(
                Arc::clone(&self.lookup.peers),
                Arc::clone(&peer),
                self.config.name.clone(),
                move |peer, report| liveness.on_report(peer, report),
            )
        });
        self.held
            .monitors
            .publish_answered(ConnectionEventType::Update, &established.view);
        self.liveness.catch_up(&established);
        answer
    }

    fn alias(&self, id: &str) -> Result<LinkAlias, RequestError> {
        LinkAlias::new(self.config.domain.as_str(), id).map_err(|error| RequestError::Field {
            field: "id of our path segment",
            value: id.to_owned(),
            reason: error.to_string(),
        })
    }

    /// The next hop does not have the connection any more, and its Request has failed: nothing passes until another one succeeds.
    fn publish_gone(&self, turn: &Turn) {
        let current = turn.current();
        if let Some(changed) = current.and_then(|current| current.with_reported(State::Down)) {
            let changed = Arc::new(changed);
            turn.set(Some(Arc::clone(&changed)));
            let monitors = &self.held.monitors;
            monitors.publish(ConnectionEventType::Update, &changed.view);
        }
    }

    /// A Request has failed and what stood before stands: the client is alive, and the connection ends with the token of this Request.
    fn outlive(&self, turn: &Turn, expires: SystemTime) {
        let Some(current) = turn.current().filter(|current| current.expires < expires) else {
            return;
        };
        let mut changed = (*current).clone();
        changed.expires = expires;
        turn.set(Some(Arc::new(changed)));
        self.held.expiries.set(turn.id(), expires);
    }

    /// Takes back, in the background, what a next hop may have granted. Until that is done the
    /// connection's next event waits.
    fn undo_at(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        connection: Connection,
        turn: &Arc<Turn>,
    ) -> tokio::task::JoinHandle<()> {
        let (calls, peer, turn) = (Arc::clone(self), Arc::clone(peer), Arc::clone(turn));
        tokio::spawn(async move {
            let deadline = Instant::now() + UNDO_TIMEOUT;
            let returned = calls
                .returned_netns(&peer, connection.mechanism.as_ref())
                .await;
            calls.close_at(&peer, connection, returned, deadline).await;
            drop(turn);
        })
    }
}
