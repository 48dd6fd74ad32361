//! The server's part of NSM's path rules, for a Request and a Close.

use std::{sync::Arc, time::SystemTime};

use nsm_core::{
    identity::{Caller, Workload, policy::Refusal, workload::is_bound},
    nsm::path::{Hop, Path},
};
use nsm_proto::connection::Connection;
use uuid::Uuid;

use crate::{
    call::Calls,
    convert,
    error::RequestError,
    identity::{
        gate::{Guest, Shown},
        session::Session,
        token::Token,
    },
    route::router::Arrival,
};

/// The path of a call, with our own segment in it.
pub(crate) struct Entered {
    pub(crate) path: Path,
    /// Our segment.
    pub(crate) hop: Hop,
    /// When the connection ends unless it is refreshed.
    pub(crate) expires: SystemTime,
    /// Who asks, where it has shown a certificate.
    pub(crate) guest: Option<Guest>,
    /// Whose the connection is, where that is a workload of the network.
    workload: Option<Workload>,
}

impl Entered {
    /// The caller, with what its tokens have proved.
    pub(crate) fn name(&self, caller: Caller) -> Caller {
        match self.workload {
            Some(workload) => caller.with_workload(workload),
            None => caller,
        }
    }
}

/// What a call brings beside its message.
pub(crate) struct Entering {
    /// The previous hop's token.
    pub(crate) token: Option<Token>,
    /// The listener that it came in by.
    pub(crate) arrival: Arrival,
    /// What both ends have shown; none in plain text.
    pub(crate) shown: Option<Arc<Shown>>,
    /// The TLS connection; our token is signed with the key that was shown on it.
    pub(crate) session: Option<Arc<Session>>,
}

impl Calls {
    /// Puts the previous hop's token into its segment, adds our own segment or finds it again, and puts our token into it. The
    /// connection's id becomes that of our segment; its path is taken out.
    ///
    /// Of a caller that has shown a certificate the tokens are checked, and the times of the segments are those of the tokens. Over the
    /// network our segment's id is then bound to the caller: another cannot show it, also where nothing is known of the connection any
    /// more.
    pub(crate) fn enter(
        &self,
        connection: &mut Connection,
        entering: Entering,
    ) -> Result<Entered, RequestError> {
        let Entering {
            token,
            arrival,
            shown,
            session,
        } = entering;
        let shown = shown.as_ref();
        let mut path = convert::path(connection.path.take().unwrap_or_default());
        let now = SystemTime::now();
        if let Some(token) = token
            && let Some(previous) = path.segments.get_mut(path.index as usize)
        {
            previous.token = token.text;
            previous.expires = Some(token.expires);
        }
        let proved = shown.map(|shown| self.prove(&mut path, shown));
        let (guest, proved_until) = proved.transpose()?.unzip();
        let name = &self.config.name;
        let bound = guest.as_ref().filter(|_| arrival == Arrival::Network);
        let workload = match bound {
            Some(guest) => Some(self.owner(&mut path, guest)?),
            None => None,
        };
        let fresh_id = (!path.knows(name)).then(|| own_id(&path, name, workload));
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
        let ours = self.tokens.token_for(session.as_deref(), now);
        if let Some(own) = path.segments.get_mut(hop.index as usize) {
            own.token = ours.text;
            own.expires = Some(ours.expires);
        }
        connection.id.clone_from(&hop.id);
        Ok(Entered {
            path,
            hop,
            // A caller's clock or claim keeps nothing here beyond our own token, which is on the path too: a refresh in time for the
            // smallest expiry is in time for this one.
            expires: expires
                .min(ours.expires)
                .min(proved_until.unwrap_or(ours.expires)),
            guest,
            workload,
        })
    }

    /// Checks the tokens down to the caller's; gives who asks, and when the first of the tokens ends. A time in a segment can be earlier
    /// than its token's, and never later.
    fn prove(
        &self,
        path: &mut Path,
        shown: &Arc<Shown>,
    ) -> Result<(Guest, SystemTime), RequestError> {
        let known = path.segments.len();
        // An index beyond the path has no token, and is refused for that.
        let upto = known.min((path.index as usize).saturating_add(1));
        let segments = &mut path.segments[..upto];
        let tokens: Vec<&str> = segments.iter().map(|it| it.token.as_str()).collect();
        let proved = self.lookup.gate.prove_call(shown, &tokens)?;
        for (segment, hop) in segments.iter_mut().zip(&proved.hops) {
            let claimed = segment.expires.unwrap_or(hop.expires);
            segment.expires = Some(claimed.min(hop.expires));
        }
        let guest = Guest {
            shown: Arc::clone(shown),
            first: proved.first().clone(),
        };
        Ok((guest, proved.expires()))
    }

    /// Whose the connection is, and that the id which the path has for our segment is the caller's to show. One of the time before
    /// identities is nobody's and is taken out: the caller gets a connection of its own.
    fn owner(&self, path: &mut Path, guest: &Guest) -> Result<Workload, RequestError> {
        let gate = &self.lookup.gate;
        let new = || gate.workload(&guest.shown, &guest.first);
        let own = path.segments.get_mut(path.index as usize + 1);
        let Some(own) = own.filter(|own| own.name == self.config.name) else {
            return Ok(new());
        };
        match Uuid::parse_str(&own.id).map(|id| id.as_u128()) {
            Ok(id) if is_bound(id) => {
                let owner = gate.owner_of(guest, id);
                owner.ok_or_else(|| Refusal::ConnectionOfAnother.into())
            }
            _ => {
                own.id.clear();
                Ok(new())
            }
        }
    }
}

/// The id of our segment when the previous hop has none for us: derived from the path before it, so that a Request whose reply was
/// lost and is sent again finds the connection that it made. Where the caller's workload is proved, the id is bound to it.
fn own_id(path: &Path, own_name: &str, workload: Option<Workload>) -> String {
    let mut before = Vec::new();
    for segment in path.segments.iter().take(path.index as usize + 1) {
        for text in [&segment.name, &segment.id] {
            before.extend_from_slice(&(text.len() as u64).to_be_bytes());
            before.extend_from_slice(text.as_bytes());
        }
    }
    before.extend_from_slice(own_name.as_bytes());
    let id = Uuid::new_v5(&Uuid::NAMESPACE_OID, &before);
    let id = match workload {
        Some(workload) => Uuid::from_u128(workload.bound_id(id.as_u128())),
        None => id,
    };
    id.to_string()
}
