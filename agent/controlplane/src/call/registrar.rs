//! The registry services as our listeners serve them: a name of our own domain goes to our
//! domain's registry, a name of another to that domain's.
//!
//! What goes out loses its `@domain`, what comes back gets it again. An endpoint that is found by a
//! name with a domain, or registered in another one, is answered with our own URL: the Request for it
//! then comes to our proxy, which has the true one (see [`crate::route::bypass`]).

mod endpoints;
mod names;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use nsm_core::{
    identity::{
        SpiffeId,
        access::Ask,
        policy::{Action, Name, decide},
        relay::Source,
        share::Holder,
    },
    net::PeerUrl,
    nsm::name::Domain,
};
use nsm_proto::registry::{NetworkService, NetworkServiceQuery};
use prost::Message;
use tokio::sync::watch;
use tokio_stream::StreamExt as _;

use self::names::Named;
use crate::{
    call::Call,
    error::RequestError,
    identity::gate::Shown,
    places::Budget,
    registry::{
        Asker, DomainRegistry, Events, Terms, entry::Event, memory::STREAM,
        path_header::PathHeader, remote::Remote, wire::Answers,
    },
    route::{lookup::Lookup, router::Arrival},
};

/// Which registry a message belongs to, and how its names change on the way there.
struct Place {
    registry: Arc<dyn DomainRegistry>,
    /// The domain that the message's names share; put back on what is answered.
    domain: Option<Domain>,
    is_ours: bool,
    /// Another agent is the registry proxy: names are not touched, and its answers are passed on as they are.
    by_proxy: bool,
}

impl Place {
    /// Whether the entries are those of our own domain. A registry proxy has others' under their full names.
    const fn has_our_entries(&self) -> bool {
        self.is_ours && !self.by_proxy
    }

    fn strip(&self, entry: &mut impl Named) -> Result<(), RequestError> {
        if self.by_proxy {
            return Ok(());
        }
        entry.strip()
    }
}

/// The registry services of this agent.
pub(crate) struct Registrar {
    /// The domain of this agent.
    domain: Domain,
    /// The registry proxy that is asked for names of other domains; without one this agent is its own.
    proxy_url: Option<PeerUrl>,
    /// Labels of this node for its endpoints.
    client_info: BTreeMap<String, String>,
    lookup: Arc<Lookup>,
    budget: Budget,
    /// True once the drain has closed all connections: watches end then.
    drained: watch::Sender<bool>,
}

impl Registrar {
    pub(crate) fn new(
        domain: Domain,
        proxy_url: Option<PeerUrl>,
        client_info: BTreeMap<String, String>,
        lookup: Arc<Lookup>,
        budget: Budget,
        drained: watch::Sender<bool>,
    ) -> Self {
        Self {
            domain,
            proxy_url,
            client_info,
            lookup,
            budget,
            drained,
        }
    }

    /// Which registry has the entry. Names of other domains are for callers that may relay.
    async fn place(
        &self,
        entry: &impl Named,
        source: Source,
        holder: Holder,
    ) -> Result<Place, RequestError> {
        let domain = entry.domain()?;
        let is_ours = domain.as_ref().is_none_or(|domain| *domain == self.domain);
        if !is_ours {
            self.lookup.check_relay(source)?;
        }
        if let (false, Some(url)) = (is_ours, &self.proxy_url) {
            return Ok(Place {
                registry: Arc::new(Remote::at(&self.lookup.peers, [url.clone()])),
                domain: None,
                is_ours: true,
                by_proxy: true,
            });
        }
        let registry = match &domain {
            Some(domain) if !is_ours => {
                let resolved = self.lookup.resolve(domain, holder).await?;
                Arc::new(self.lookup.registry_of(domain, &resolved))
            }
            _ => Arc::clone(&self.lookup.registry),
        };
        Ok(Place {
            registry,
            domain,
            is_ours,
            by_proxy: false,
        })
    }

    /// What each registration and its end begin with: the registry that has the entry, the entry as it is named there, and the terms.
    async fn enter<E: Named>(
        &self,
        call: &Call<E>,
        path: Option<PathHeader>,
    ) -> Result<(Place, E, Terms), RequestError> {
        let mut entry = call.message.clone();
        let place = self.place(&entry, call.source, call.holder).await?;
        self.lookup.check_registrant(call.source)?;
        place.strip(&mut entry)?;
        Ok((place, entry, terms(call, path)))
    }

    /// Decides a registration, or its end, by the caller's certificate and the tokens of the path. The caller is then the workload that
    /// they prove, and the entry has the ids of the path.
    fn admit<E: Named>(
        &self,
        mut call: Call<E>,
        path: Option<&PathHeader>,
    ) -> Result<Call<E>, RequestError> {
        let Some(shown) = &call.shown else {
            return Ok(call);
        };
        let alone = call.token.as_ref().map_or("", |token| token.text.as_str());
        let tokens = path.map_or_else(|| vec![alone], PathHeader::tokens);
        let gate = &self.lookup.gate;
        let proved = gate.prove_call(shown, &tokens)?;
        let first = proved.first();
        let domain = self.other_domain(&call.message)?;
        if call.arrival == Arrival::Network {
            let names = call.message.names().map(names::bare);
            let names: Vec<&str> = names.filter(|name| !name.is_empty()).collect();
            gate.admit(
                shown,
                Ask::Register {
                    names: &names,
                    domain: domain.as_ref(),
                    first,
                },
            )?;
            call.caller = call.caller.with_workload(gate.workload(shown, first));
        } else {
            gate.admit_on_node(shown, domain.as_ref())?;
        }
        let ids = proved.subjects().chain([&shown.own]);
        let ids = ids.map(ToString::to_string).collect();
        call.message.set_path_ids(ids);
        // What a message claims can end it sooner, and never later.
        if let Some(token) = &mut call.token {
            token.expires = token.expires.min(proved.expires());
        }
        Ok(call)
    }

    /// The domain of an entry, where that is not ours.
    fn other_domain(&self, entry: &impl Named) -> Result<Option<Domain>, RequestError> {
        let domain = entry.domain()?;
        Ok(domain.filter(|domain| *domain != self.domain))
    }

    /// Decides a Find by the caller's certificate.
    fn admit_find(
        &self,
        shown: Option<&Shown>,
        arrival: Arrival,
        wanted: &impl Named,
    ) -> Result<(), RequestError> {
        let Some(shown) = shown else {
            return Ok(());
        };
        let domain = self.other_domain(wanted)?;
        let domain = domain.as_ref();
        let gate = &self.lookup.gate;
        match arrival {
            Arrival::Network => gate.admit(shown, Ask::Find { domain })?,
            Arrival::Local | Arrival::Forwarder => gate.admit_on_node(shown, domain)?,
        }
        Ok(())
    }

    /// Registers a network service.
    pub(crate) async fn register_service(
        &self,
        call: Call<NetworkService>,
        path: Option<PathHeader>,
    ) -> Result<NetworkService, RequestError> {
        let call = self.admit(call, path.as_ref())?;
        decide(&call.caller, Action::Register(name_of(&call.message)))?;
        call.message.check()?;
        let (place, service, terms) = self.enter(&call, path).await?;
        let mut registered = place.registry.services().register(service, terms).await?;
        registered.join(place.domain.as_ref())?;
        Ok(registered)
    }

    /// Takes a network service out.
    pub(crate) async fn unregister_service(
        &self,
        call: Call<NetworkService>,
        path: Option<PathHeader>,
    ) -> Result<(), RequestError> {
        let call = self.admit(call, path.as_ref())?;
        decide(&call.caller, Action::Unregister(name_of(&call.message)))?;
        let (place, service, terms) = self.enter(&call, path).await?;
        place.registry.services().unregister(service, terms).await
    }

    /// Finds network services, or watches them.
    pub(crate) async fn find_services(
        &self,
        call: Call<NetworkServiceQuery>,
    ) -> Result<Answers<NetworkService>, RequestError> {
        let sight = self.sight::<NetworkService>(&call);
        let (place, found) = self.find(call).await?;
        let sight = sight.filter(|_| place.has_our_entries());
        Ok(answers(
            found,
            sight,
            move |service: &mut NetworkService| service.join(place.domain.as_ref()),
        ))
    }

    /// What the caller sees of our entries; none where it sees all.
    fn sight<E: Named>(&self, call: &Call<E::Query>) -> Option<Sight> {
        let shown = call.shown.as_ref()?;
        if call.arrival != Arrival::Network || self.lookup.gate.is_own(shown) {
            return None;
        }
        let mut sight = Sight {
            lookup: Arc::clone(&self.lookup),
            shown: Arc::clone(shown),
            is_blind: false,
            was_shown: HashSet::new(),
        };
        let (wanted, _) = E::from_query(call.message.clone());
        let mut services = wanted.asked_services();
        sight.is_blind = wanted.asks_inside() || !services.all(|it| sight.sees(it));
        Some(sight)
    }

    /// Finds or watches what a query asks for, in the registry that its names belong to. A watch ends with the agent.
    async fn find<E: Named + Message>(
        &self,
        call: Call<E::Query>,
    ) -> Result<(Place, Events<E>), RequestError> {
        let (holder, deadline) = (call.holder, call.deadline);
        let stream = self.budget.streams.take(holder, 1)?;
        let (mut wanted, watch) = E::from_query(call.message);
        self.admit_find(call.shown.as_deref(), call.arrival, &wanted)?;
        let changed = self.until_rules_change(call.shown.as_ref(), call.arrival);
        let place = self.place(&wanted, call.source, holder).await?;
        place.strip(&mut wanted)?;
        let entries = E::part_of(&*place.registry);
        if watch {
            let asker = Asker { holder, deadline };
            let found = entries.watch(wanted, asker).await?.holding([stream]);
            let found = found.until(self.drained());
            let found = match changed {
                Some(changed) => found.until(changed),
                None => found,
            };
            return Ok((place, found));
        }
        let found = entries.find(wanted, deadline).await?;
        // A caller that does not read the entries holds their memory, which is charged to its source.
        let bytes: usize = found.here().iter().map(|entry| entry.encoded_len()).sum();
        let bytes = self.budget.bytes.take(holder, bytes + STREAM)?;
        Ok((place, found.holding([stream, bytes])))
    }

    /// Returns when the rules have changed by which a caller of the network sees entries: it watches anew then, and gets what it sees now.
    fn until_rules_change(
        &self,
        shown: Option<&Arc<Shown>>,
        arrival: Arrival,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        let is_bound = shown.is_some() && arrival == Arrival::Network;
        is_bound.then(|| Arc::clone(&self.lookup.gate).until_not(|_| false))
    }

    /// Returns when the drain has closed all connections.
    fn drained(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut drained = self.drained.subscribe();
        async move {
            let _ = drained.wait_for(|is_drained| *is_drained).await;
        }
    }
}

/// What a caller of another domain sees of our entries.
struct Sight {
    lookup: Arc<Lookup>,
    shown: Arc<Shown>,
    /// It asks by what it does not see: what it finds would show that an endpoint of another service serves that one too.
    is_blind: bool,
    /// The names of entries that it was shown: one that it does not see any more is gone for it.
    was_shown: HashSet<String>,
}

impl Sight {
    fn sees(&self, service: &str) -> bool {
        self.lookup.gate.sees(&self.shown, service)
    }

    /// Leaves of an event what is seen; whether anything is. Ids of our own systems are not.
    fn leave<E: Named>(&mut self, event: &mut Event<E>) -> bool {
        if self.is_blind {
            return false;
        }
        let entry = Arc::make_mut(&mut event.entry);
        let first = entry.path_ids().first();
        let first = first.and_then(|id| id.parse::<SpiffeId>().ok());
        let own = self.shown.own.trust_domain();
        if first.is_some_and(|first| first.trust_domain() == own) {
            entry.set_path_ids(Vec::new());
        }
        let is_seen = entry.leave(|service| self.lookup.gate.sees(&self.shown, service));
        let name = entry.name();
        if is_seen && !event.deleted {
            self.was_shown.insert(name.to_owned());
            return true;
        }
        let was_shown = self.was_shown.remove(name);
        event.deleted = true;
        was_shown
    }
}

/// Whose a network service is the registry knows that has it.
fn name_of(service: &NetworkService) -> Name<'_> {
    Name {
        full: &service.name,
        owner: None,
    }
}

fn terms<T>(call: &Call<T>, owner: Option<PathHeader>) -> Terms {
    Terms {
        caller: call.caller.clone(),
        holder: call.holder,
        deadline: call.deadline,
        owner,
        expires: call.token.as_ref().map(|token| token.expires),
    }
}

/// What was found and is seen, with the names that the caller asked by.
fn answers<E: Named>(
    found: Events<E>,
    mut sight: Option<Sight>,
    change: impl Fn(&mut E) -> Result<(), RequestError> + Send + 'static,
) -> Answers<E> {
    Box::pin(found.filter_map(move |event| {
        let mut event = match event {
            Ok(event) => event,
            Err(error) => return Some(Err(error.into())),
        };
        let is_hidden = |sight: &mut Sight| !sight.leave(&mut event);
        if sight.as_mut().is_some_and(is_hidden) {
            return None;
        }
        let changed = change(Arc::make_mut(&mut event.entry)).map_err(Into::into);
        Some(changed.map(|()| E::into_answer(event)))
    }))
}
