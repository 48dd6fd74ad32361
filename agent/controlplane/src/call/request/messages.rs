//! The pure steps of a Request: on messages and plans, without I/O.

use nsm_core::{
    liveness::{Reflector, sbfd::Discriminator},
    mechanism::{INODE_URL, KERNEL, Kernel, LOCAL, REMOTE, VXLAN},
    net::{IfName, MacAddr, Vni},
    nsm::path::{Path, check_reply_of},
};
use nsm_proto::{
    connection::{Connection, Mechanism},
    connectioncontext::ConnectionContext,
    networkservice::NetworkServiceRequest,
};
use uuid::Uuid;

use super::Ask;
use crate::{
    call::case::Case, connection::model::Established, convert, error::RequestError, ports::Plan,
    route::router::Route,
};

#[derive(Clone, Copy)]
pub(super) enum End {
    Client,
    Endpoint,
}

pub(super) fn set_mac(context: &mut ConnectionContext, end: End, mac: &MacAddr) {
    let ethernet = context.ethernet_context.get_or_insert_default();
    match end {
        End::Client => ethernet.src_mac = mac.to_string(),
        End::Endpoint => ethernet.dst_mac = mac.to_string(),
    }
}

/// The id of our segment when the previous hop has none for us: derived from who asks, so that a
/// Request whose reply was lost and is sent again finds the connection that it made.
pub(super) fn own_id(path: &Path, own_name: &str) -> String {
    let mut who = Vec::new();
    for segment in path.segments.iter().take(path.index as usize + 1) {
        for text in [&segment.name, &segment.id] {
            who.extend_from_slice(&(text.len() as u64).to_be_bytes());
            who.extend_from_slice(text.as_bytes());
        }
    }
    who.extend_from_slice(own_name.as_bytes());
    Uuid::new_v5(&Uuid::NAMESPACE_OID, &who).to_string()
}

/// Puts the hops below ours onto the path as we know them. A client that never saw an answer, or
/// sends an older one again, does not know their ids, and an endpoint that is asked under another
/// id makes another connection.
pub(super) fn resume(path: &mut Path, view: &Connection) {
    let known = convert::path(view.path.clone().unwrap_or_default());
    path.segments.truncate(path.index as usize + 1);
    path.segments
        .extend(known.segments.into_iter().skip(path.segments.len()));
}

/// Whether the connection goes on where it stands.
pub(super) fn serves(prior: &Established, asked: &Connection) -> bool {
    let endpoint = &asked.network_service_endpoint_name;
    prior.view.network_service == asked.network_service
        && (endpoint.is_empty() || *endpoint == prior.view.network_service_endpoint_name)
}

/// Whether a plan can be reached from another by changing the link that stands.
pub(super) fn is_same_link(old: &Plan, new: &Plan) -> bool {
    match (old, new) {
        (
            Plan::Vxlan { netns, spec },
            Plan::Vxlan {
                netns: new_netns,
                spec: new_spec,
            },
        ) => {
            netns == new_netns
                && spec.link.name == new_spec.link.name
                && spec.vni == new_spec.vni
                && spec.port == new_spec.port
                && spec.remote == new_spec.remote
        }
        (
            Plan::Veth { client, endpoint },
            Plan::Veth {
                client: new_client,
                endpoint: new_endpoint,
            },
        ) => {
            client.0 == new_client.0
                && client.1.name == new_client.1.name
                && endpoint.0 == new_endpoint.0
                && endpoint.1.name == new_endpoint.1.name
        }
        _ => false,
    }
}

/// The client's mechanism with the interface's name in it.
pub(super) fn named(mechanism: &Mechanism, kernel: &Kernel, name: &IfName) -> Mechanism {
    let mut mechanism = mechanism.clone();
    Kernel {
        name: Some(name.clone()),
        ..kernel.clone()
    }
    .write(&mut mechanism.parameters);
    mechanism
}

/// The source address before it was swapped, to be restored in the reply.
pub(super) fn source(request: &NetworkServiceRequest) -> Option<String> {
    request
        .connection
        .iter()
        .flat_map(|connection| &connection.mechanism)
        .chain(&request.mechanism_preferences)
        .find_map(|mechanism| {
            mechanism
                .parameters
                .get(nsm_core::mechanism::ORIG_SRC_IP)
                .or_else(|| mechanism.parameters.get(nsm_core::mechanism::SRC_IP))
                .cloned()
        })
}

/// What a next hop must not change.
pub(super) fn check(
    ask: &Ask,
    route: &Route,
    case: &Case,
    reply: &Connection,
) -> Result<(), RequestError> {
    if reply.id != ask.connection.id {
        return Err(bad_answer(
            route,
            format!(
                "the connection's id is `{}`, we sent `{}`",
                reply.id, ask.connection.id
            ),
        ));
    }
    let (index, segments) = reply
        .path
        .as_ref()
        .map_or((0, &[][..]), |path| (path.index, &path.path_segments));
    let segments = segments.iter();
    check_reply_of(
        &ask.path,
        index,
        segments.map(|segment| (segment.name.as_str(), segment.id.as_str())),
    )
    .map_err(|error| bad_answer(route, error.to_string()))?;
    let chosen = reply.mechanism.as_ref();
    let chosen = chosen.filter(|mechanism| !mechanism.r#type.is_empty());
    let (cls, r#type) = match case {
        Case::Through => return check_choice(ask, route, chosen),
        Case::PodToTunnel(..) => (REMOTE, VXLAN),
        Case::PodToPod(..) | Case::TunnelToPod(..) => (LOCAL, KERNEL),
    };
    if chosen.is_some_and(|mechanism| mechanism.cls == cls && mechanism.r#type == r#type) {
        return Ok(());
    }
    Err(wrong_choice(route, chosen, &format!("{cls} {type}")))
}

/// What goes through us must be what the previous hop can use. One that offers nothing takes what
/// comes; and an endpoint that needs no interface may leave out a LOCAL mechanism, as those of NSM
/// do that were built without any.
fn check_choice(ask: &Ask, route: &Route, chosen: Option<&Mechanism>) -> Result<(), RequestError> {
    let offered: Vec<&Mechanism> = ask
        .connection
        .mechanism
        .iter()
        .filter(|mechanism| !mechanism.r#type.is_empty())
        .chain(&ask.preferences)
        .collect();
    let is_offered = match chosen {
        Some(chosen) => offered
            .iter()
            .any(|one| one.cls == chosen.cls && one.r#type == chosen.r#type),
        None => offered.iter().any(|one| one.cls != REMOTE),
    };
    if is_offered || offered.is_empty() {
        return Ok(());
    }
    let all: Vec<String> = offered
        .iter()
        .map(|one| format!("{} {}", one.cls, one.r#type))
        .collect();
    Err(wrong_choice(route, chosen, &all.join(", ")))
}

fn wrong_choice(route: &Route, chosen: Option<&Mechanism>, offered: &str) -> RequestError {
    let chosen = match chosen {
        Some(chosen) => format!("the mechanism {} {}", chosen.cls, chosen.r#type),
        None => "no mechanism".to_owned(),
    };
    bad_answer(route, format!("it chose {chosen}, we offered {offered}"))
}

/// A standing mechanism as an endpoint of this node is told it. It knows its namespace better than
/// we do, and one that reads an inode waits for the descriptor.
pub(crate) fn without_inode(mut mechanism: Mechanism) -> Mechanism {
    let parameters = &mut mechanism.parameters;
    if parameters
        .get(INODE_URL)
        .is_some_and(|url| url.starts_with("inode:"))
    {
        parameters.remove(INODE_URL);
    }
    mechanism
}

/// The MTU to ask for again, where the client asks with what its path came to carry meanwhile: what was agreed before.
pub(super) fn agreed_mtu(ask: &Ask, prior: Option<&Established>) -> Option<u32> {
    let prior = prior?;
    let agreed = prior.path.agreed_mtu;
    let now = prior.view.context.as_ref()?.mtu;
    let asked = ask.connection.context.as_ref()?.mtu;
    (agreed > now && asked == now).then_some(agreed)
}

/// A peer's reflector, where it told one.
pub(super) fn reflector(
    discriminator: Option<Discriminator>,
    vni: Option<Vni>,
) -> Option<Reflector> {
    Some(Reflector {
        discriminator: discriminator?,
        vni: vni?,
    })
}

pub(crate) fn bad_answer(route: &Route, fault: String) -> RequestError {
    RequestError::BadAnswer {
        url: route.url.to_string(),
        method: "Request",
        fault,
    }
}

/// The connection to close at a next hop whose reply we could not use.
pub(super) fn undo_connection(ask: &Ask, route: &Route, reply: Connection) -> Connection {
    let ours = convert::wire_path(ask.path.clone());
    // What stands below ours in our own path may be of another endpoint.
    let path = match reply.path {
        Some(mut path) if path.path_segments.len() > ours.index as usize + 1 => {
            path.index = ours.index;
            path
        }
        _ => ours,
    };
    Connection {
        id: ask.connection.id.clone(),
        path: Some(path),
        network_service: route.service.clone(),
        network_service_endpoint_name: route.endpoint.clone(),
        mechanism: reply.mechanism,
        ..ask.connection.clone()
    }
}

pub(super) fn all_failed(service: &str, mut failures: Vec<RequestError>) -> RequestError {
    match failures.len() {
        1 => failures.remove(0),
        _ => RequestError::AllFailed {
            service: service.to_owned(),
            code: failures
                .last()
                .map_or(tonic::Code::Unavailable, RequestError::code),
            causes: failures.iter().map(ToString::to_string).collect(),
        },
    }
}
