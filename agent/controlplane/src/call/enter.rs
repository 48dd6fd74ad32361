//! The server's part of NSM's path rules, for a Request and a Close.

use std::time::SystemTime;

use nsm_core::nsm::path::{Hop, Path};
use nsm_proto::connection::Connection;
use uuid::Uuid;

use crate::{call::Calls, convert, error::RequestError, identity::token::Token};

/// The path of a call, with our own segment in it.
pub(crate) struct Entered {
    pub(crate) path: Path,
    /// Our segment.
    pub(crate) hop: Hop,
    /// When the connection ends unless it is refreshed.
    pub(crate) expires: SystemTime,
}

impl Calls {
    /// Puts the previous hop's token into its segment, adds our own segment or finds it again, and puts our token into it. The
    /// connection's id becomes that of our segment; its path is taken out.
    pub(crate) fn enter(
        &self,
        connection: &mut Connection,
        token: Option<Token>,
    ) -> Result<Entered, RequestError> {
        let mut path = convert::path(connection.path.take().unwrap_or_default());
        let now = SystemTime::now();
        if let Some(token) = token
            && let Some(previous) = path.segments.get_mut(path.index as usize)
        {
            previous.token = token.text;
            previous.expires = Some(token.expires);
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
        let ours = self.tokens.token(now);
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
            expires: expires.min(ours.expires),
        })
    }
}

/// The id of our segment when the previous hop has none for us: derived from the path before it, so that a Request whose reply was
/// lost and is sent again finds the connection that it made.
fn own_id(path: &Path, own_name: &str) -> String {
    let mut before = Vec::new();
    for segment in path.segments.iter().take(path.index as usize + 1) {
        for text in [&segment.name, &segment.id] {
            before.extend_from_slice(&(text.len() as u64).to_be_bytes());
            before.extend_from_slice(text.as_bytes());
        }
    }
    before.extend_from_slice(own_name.as_bytes());
    Uuid::new_v5(&Uuid::NAMESPACE_OID, &before).to_string()
}
