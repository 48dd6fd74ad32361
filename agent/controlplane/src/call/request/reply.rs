//! What a next hop may answer, and what is closed there when we do not take the answer.

use nsm_core::{
    link::admission::check_size,
    mechanism::{KERNEL, LOCAL, ORIG_SRC_IP, REMOTE, SRC_IP},
    nsm::path::check_reply,
};
use nsm_proto::{
    connection::{Connection, Mechanism},
    networkservice::NetworkServiceRequest,
};
use prost::Message as _;

use super::ask::Attempt;
use crate::{call::case::Case, convert, error::RequestError};

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
                .get(ORIG_SRC_IP)
                .or_else(|| mechanism.parameters.get(SRC_IP))
                .cloned()
        })
}

/// What a next hop must not change.
pub(super) fn check(attempt: &Attempt<'_>, reply: &Connection) -> Result<(), RequestError> {
    let ask = attempt.ask;
    check_size(reply.encoded_len()).map_err(|refusal| attempt.terms().inadmissible(refusal))?;
    if reply.id != ask.connection.id {
        return Err(attempt.bad_answer(format_args!(
            "the connection's id is `{}`, we sent `{}`",
            reply.id, ask.connection.id
        )));
    }
    let (index, segments) = reply
        .path
        .as_ref()
        .map_or((0, &[][..]), |path| (path.index, &path.path_segments));
    let segments = segments.iter();
    check_reply(
        &ask.path,
        index,
        segments.map(|segment| (segment.name.as_str(), segment.id.as_str())),
    )
    .map_err(|error| attempt.bad_answer(error))?;
    let chosen = reply.mechanism.as_ref();
    let chosen = chosen.filter(|mechanism| !mechanism.r#type.is_empty());
    let (cls, r#type) = match &attempt.case {
        Case::Through => return check_choice(attempt, chosen),
        Case::Initiate(_, remote) => (REMOTE, remote.wire_type()),
        Case::LocalPair(_) | Case::Terminate(_) => (LOCAL, KERNEL),
    };
    if chosen.is_some_and(|mechanism| mechanism.cls == cls && mechanism.r#type == r#type) {
        return Ok(());
    }
    Err(wrong_choice(attempt, chosen, &format!("{cls} {type}")))
}

/// What goes through us must be what the previous hop can use. One that offers nothing takes what
/// comes; and an endpoint that needs no interface may leave out a LOCAL mechanism, as those of NSM
/// do that were built without any.
fn check_choice(attempt: &Attempt<'_>, chosen: Option<&Mechanism>) -> Result<(), RequestError> {
    let ask = attempt.ask;
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
    Err(wrong_choice(attempt, chosen, &all.join(", ")))
}

fn wrong_choice(attempt: &Attempt<'_>, chosen: Option<&Mechanism>, offered: &str) -> RequestError {
    let chosen = match chosen {
        Some(chosen) => format!("the mechanism {} {}", chosen.cls, chosen.r#type),
        None => "no mechanism".to_owned(),
    };
    attempt.bad_answer(format_args!("it chose {chosen}, we offered {offered}"))
}

/// The connection to close at a next hop whose reply we could not use.
pub(super) fn undo_connection(attempt: &Attempt<'_>, reply: Connection) -> Connection {
    let (ask, route) = (attempt.ask, attempt.route);
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
