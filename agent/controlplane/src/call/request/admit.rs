//! Step: what the other party may put into the pods of this node is decided, by the rules of [`nsm_core::link::admission`].
//!
//! The client's pod gets `src_*` of the answer, the endpoint's pod `dst_*`. What the pod has already is read before the Request goes on,
//! and travels with it as `excluded_prefixes`, so that an endpoint can choose other addresses.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use nsm_core::{
    link::{
        LinkAlias, RouteSpec,
        admission::{
            Dns, HoldingKind, Inadmissible, MAX_CONNECTION, Proposal, Side, Surroundings,
            beside_own_default, check_preferences, check_size, wants_default_route,
        },
    },
    nsm::name::Domain,
};
use nsm_proto::{
    connection::{Connection, Mechanism},
    connectioncontext::{self, ConnectionContext, IpContext, PolicyRoute},
};
use prost::Message as _;

use super::{around::Around, ask::Attempt};
use crate::{
    call::Calls,
    connection::model::Established,
    convert,
    error::RequestError,
    ports::PodNetns,
    route::{addresses::Crossing, next::Route},
};

/// Prefixes that we exclude beside the client's own. They are aggregates; a node with more networks than that has them in a few ranges,
/// and what is not excluded is refused when it is answered.
const MAX_EXCLUDED: usize = 256;

/// What a connection of the largest size must have left for the hops behind us: their path segments, the mechanism, the answer.
const ROOM: usize = 4 << 10;

/// Bytes of an excluded prefix on the wire beside its text: a field number and a length.
const PER_PREFIX: usize = 2;

/// The size of a connection in a Request, where the Request is of a size that may be kept.
pub(super) fn check_sizes(
    connection: &Connection,
    preferences: &[Mechanism],
) -> Result<usize, RequestError> {
    check_preferences(preferences.len())?;
    let preferences: usize = preferences.iter().map(Mechanism::encoded_len).sum();
    let connection = connection.encoded_len();
    check_size(connection + preferences)?;
    Ok(connection)
}

/// A default route for a pod that has one of its own, as every pod of a cluster has, is made of two halves that come before it.
pub(in crate::call) fn split_default_routes(
    terms: &Terms<'_>,
    around_client: Option<&Around>,
    context: &mut ConnectionContext,
) {
    let (Some(around), Some(ip)) = (around_client, &mut context.ip_context) else {
        return;
    };
    if !wants_default_route(terms.labels) {
        return;
    }
    let routes = std::mem::take(&mut ip.src_routes).into_iter();
    let split = routes.flat_map(|route| {
        let prefix = route.prefix.parse();
        let halves = prefix
            .ok()
            .and_then(|prefix| beside_own_default(prefix, &around.pod));
        let Some(halves) = halves else {
            return vec![route];
        };
        let half = |prefix: IpNet| connectioncontext::Route {
            prefix: prefix.to_string(),
            next_hop: route.next_hop.clone(),
        };
        halves.map(half).into()
    });
    ip.src_routes = split.collect();
}

/// The prefixes that we excluded are ours: the previous hop goes on with its own, so that it does not exclude for ever what a pod or a
/// node had once. The client gets back what it asked with, whatever its endpoint made of that.
pub(super) fn restore_exclusions(attempt: &Attempt<'_>, reply: &mut Connection) {
    let answered = reply.context.as_mut();
    let Some(answered) = answered.and_then(|context| context.ip_context.as_mut()) else {
        return;
    };
    if !attempt.excludes() {
        return;
    }
    let asked = attempt.ask.connection.context.as_ref();
    let asked = asked.and_then(|context| context.ip_context.as_ref());
    let asked = asked.map_or(&[][..], |ip| &ip.excluded_prefixes);
    if attempt.around_client.is_some() {
        answered.excluded_prefixes = asked.to_vec();
    } else {
        answered
            .excluded_prefixes
            .retain(|prefix| asked.contains(prefix));
    }
}

impl Calls {
    /// What is around the pod in `netns`, without the connection `alias`.
    pub(in crate::call) async fn around(
        &self,
        netns: &PodNetns,
        alias: &LinkAlias,
    ) -> Result<Around, RequestError> {
        let forwarder = self.forwarder()?;
        Ok(Around {
            node: forwarder.own_addresses().await?,
            pod: forwarder.holdings(netns, alias).await?,
        })
    }

    /// Excludes what the client's pod, the node and the cluster have from what the endpoint may choose. The IP context is there after
    /// that, as NSM's NSMgr makes it: some endpoints read it unseen.
    pub(super) async fn exclude(
        &self,
        attempt: &Attempt<'_>,
        context: &mut ConnectionContext,
    ) -> Result<(), RequestError> {
        let node = match (&attempt.around_client, &self.forwarder) {
            (Some(around), _) => Arc::clone(&around.node),
            (None, Some(forwarder)) => forwarder.own_addresses().await?,
            (None, None) => Arc::default(),
        };
        let pod = attempt.around_client.iter().flat_map(|around| &around.pod);
        let pod = pod.filter(|held| {
            held.prefix.prefix_len() > 0 && !matches!(held.kind, HoldingKind::Gateway)
        });
        let rules = self.config.admission.rules();
        let mut taken: Vec<IpNet> = pod
            .map(|held| held.prefix.trunc())
            .chain(node.iter().map(IpNet::trunc))
            .chain(rules.protected.iter().copied())
            .collect();
        taken = IpNet::aggregate(&taken);
        taken.truncate(MAX_EXCLUDED);
        let ip = context.ip_context.get_or_insert_default();
        let mut room = MAX_CONNECTION.saturating_sub(attempt.ask.connection.encoded_len() + ROOM);
        for prefix in taken.iter().map(IpNet::to_string) {
            let bytes = prefix.len() + PER_PREFIX;
            if bytes <= room && !ip.excluded_prefixes.contains(&prefix) {
                room -= bytes;
                ip.excluded_prefixes.push(prefix);
            }
        }
        Ok(())
    }

    /// Decides on what the client's pod on this node would get; `peer` is the other end of its tunnel.
    pub(in crate::call) fn admit_client(
        &self,
        terms: &Terms<'_>,
        context: &ConnectionContext,
        around: Option<&Around>,
        peer: Option<IpAddr>,
    ) -> Result<(), RequestError> {
        self.admit(terms, Side::Client, context, around, peer)
    }

    /// Decides on what the endpoint's pod on this node would get; `peer` is the other end of its tunnel.
    pub(in crate::call) fn admit_endpoint(
        &self,
        terms: &Terms<'_>,
        context: &ConnectionContext,
        around: &Around,
        peer: Option<IpAddr>,
    ) -> Result<(), RequestError> {
        self.admit(terms, Side::Endpoint, context, Some(around), peer)
    }

    /// Decides on what passes through this node into our domain: the answer of another domain to a client, and what a client of another
    /// domain sends to an endpoint.
    pub(in crate::call) fn admit_passing(
        &self,
        terms: &Terms<'_>,
        answered: &ConnectionContext,
    ) -> Result<(), RequestError> {
        let side = match terms.route.crossing {
            Crossing::Inside => return Ok(()),
            Crossing::Out => Side::Client,
            Crossing::In => Side::Endpoint,
        };
        self.admit(terms, side, answered, None, None)
    }

    fn admit(
        &self,
        terms: &Terms<'_>,
        side: Side,
        context: &ConnectionContext,
        around: Option<&Around>,
        peer: Option<IpAddr>,
    ) -> Result<(), RequestError> {
        let domain = other_domain(terms.route);
        let around = Surroundings {
            domain: domain.as_ref(),
            wants_default_route: side == Side::Client && wants_default_route(terms.labels),
            peer,
            node: around.map_or(&[], |around| &around.node),
            pod: around.map_or(&[], |around| &around.pod),
        };
        let none = IpContext::default();
        let ip = context.ip_context.as_ref().unwrap_or(&none);
        let steers = side == Side::Client && terms.route.crossing != Crossing::Inside;
        self.admit_ip(side, ip, steers, &around)
            .and_then(|admitted| {
                if side == Side::Client {
                    self.admit_dns(context, &around)
                } else {
                    Ok(admitted)
                }
            })
            .map_err(|error| match error {
                RequestError::Excessive(refusal) => terms.inadmissible(refusal),
                unreadable => RequestError::bad_answer(&terms.route.url, unreadable),
            })
    }

    /// `steers` where policies and extra prefixes count: they are the client's, and another domain's.
    fn admit_ip(
        &self,
        side: Side,
        ip: &IpContext,
        steers: bool,
        around: &Surroundings<'_>,
    ) -> Result<(), RequestError> {
        let src = convert::addresses("src_ip_addrs", &ip.src_ip_addrs)?;
        let dst = convert::addresses("dst_ip_addrs", &ip.dst_ip_addrs)?;
        let neighbours = ip.ip_neighbors.iter().map(|neighbour| {
            let parsed = neighbour.ip.parse();
            parsed.map_err(|_| Inadmissible::NotAnAddress {
                field: "ip_neighbors",
                value: neighbour.ip.clone(),
            })
        });
        let neighbours = neighbours.collect::<Result<Vec<IpAddr>, _>>()?;
        let (addresses, others, mut routes) = match side {
            Side::Client => (&src, &dst, convert::routes("src_routes", &ip.src_routes)?),
            Side::Endpoint => (&dst, &src, convert::routes("dst_routes", &ip.dst_routes)?),
        };
        let mut extra = Vec::new();
        if steers {
            routes.extend(policy_routes(&ip.policies)?);
            extra = convert::addresses("extra_prefixes", &ip.extra_prefixes)?;
        }
        let proposal = Proposal {
            side,
            addresses,
            routes: &routes,
            extra: &extra,
            others,
            neighbours: &neighbours,
        };
        Ok(self.config.admission.rules().admit(&proposal, around)?)
    }

    fn admit_dns(
        &self,
        context: &ConnectionContext,
        around: &Surroundings<'_>,
    ) -> Result<(), RequestError> {
        let Some(dns) = &context.dns_context else {
            return Ok(());
        };
        let configs = || dns.configs.iter();
        let servers: Vec<&str> = configs()
            .flat_map(|config| config.dns_server_ips.iter().map(String::as_str))
            .collect();
        let search: Vec<&str> = configs()
            .flat_map(|config| config.search_domains.iter().map(String::as_str))
            .collect();
        let dns = Dns {
            servers: &servers,
            search: &search,
        };
        Ok(self.config.admission.rules().admit_dns(dns, around)?)
    }
}

/// A connection as the rules see it.
#[derive(Debug, Clone, Copy)]
pub(in crate::call) struct Terms<'a> {
    /// The next hop, whose word is decided on.
    pub(in crate::call) route: &'a Route,
    /// The labels of the client.
    labels: &'a BTreeMap<String, String>,
}

impl<'a> Terms<'a> {
    /// Those of a connection that stands.
    pub(in crate::call) fn of(established: &'a Established) -> Self {
        Self {
            route: &established.route,
            labels: &established.view.labels,
        }
    }

    /// The answer of this hop would put something into a pod that is not admitted there.
    pub(super) fn inadmissible(&self, refusal: Inadmissible) -> RequestError {
        RequestError::Inadmissible {
            url: self.route.url.to_string(),
            refusal,
        }
    }
}

impl Attempt<'_> {
    pub(super) fn terms(&self) -> Terms<'_> {
        Terms {
            route: self.route,
            labels: &self.ask.connection.labels,
        }
    }
}

/// Whether a context that the next hop of `route` published is of a size that may be kept.
pub(in crate::call) fn check_context(
    context: &ConnectionContext,
    route: &Route,
) -> Result<(), RequestError> {
    check_size(context.encoded_len()).map_err(|refusal| RequestError::Inadmissible {
        url: route.url.to_string(),
        refusal,
    })
}

/// The routes of a client's policies. This agent makes none of them, but a forwarder before it may.
fn policy_routes(policies: &[PolicyRoute]) -> Result<Vec<RouteSpec>, RequestError> {
    let mut all = Vec::new();
    for policy in policies {
        if policy.routes.is_empty() {
            // NSM's forwarders make a default route of a policy without routes.
            let everything = connectioncontext::Route {
                prefix: "0.0.0.0/0".to_owned(),
                next_hop: String::new(),
            };
            all.extend(convert::routes("policies", &[everything])?);
        } else {
            all.extend(convert::routes("policies", &policy.routes)?);
        }
    }
    Ok(all)
}

/// The domain of the endpoint, where it is another than ours.
fn other_domain(route: &Route) -> Option<Domain> {
    let named = [&route.endpoint, &route.service];
    let mut domains = named.into_iter().filter_map(|name| name.split_once('@'));
    domains.find_map(|(_, domain)| domain.parse().ok())
}
