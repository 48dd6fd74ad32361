//! Which of several addresses of one service is asked: what worked last comes first, what failed last comes last, and a silent one is not
//! waited for alone.

use std::sync::Arc;

use nsm_core::net::PeerUrl;
use tokio::time::Instant;

use super::peers::{Peer, Peers};
use crate::{
    error::RequestError,
    transport::{
        dial::{DialError, Link},
        stagger,
    },
};

impl Peers {
    /// A link to the first of `urls` that takes the connection, and which that is.
    ///
    /// # Errors
    /// None takes it: why, of each.
    pub(crate) async fn first_reached(
        &self,
        urls: &[PeerUrl],
        deadline: Instant,
    ) -> Result<(Arc<Peer>, Link), RequestError> {
        let mut peers: Vec<Arc<Peer>> = urls.iter().map(|url| self.get(url)).collect();
        peers.sort_by_key(|peer| (peer.is_unreached(), !peer.is_reached()));
        let attempts = peers.into_iter().map(|peer| async move {
            let link = self.link_to(&peer, deadline).await?;
            Ok::<_, RequestError>((peer, link))
        });
        stagger::first(attempts)
            .await
            .map_err(|mut failures| match failures.len() {
                1 => failures.remove(0),
                _ => DialError::All(failures.iter().map(ToString::to_string).collect()).into(),
            })
    }

    /// Whether the last try to connect to each of `urls` failed; not of none.
    pub(crate) fn are_unreached(&self, urls: impl IntoIterator<Item = PeerUrl>) -> bool {
        let mut urls = urls.into_iter().peekable();
        urls.peek().is_some()
            && urls.all(|url| self.known(&url).is_some_and(|it| it.is_unreached()))
    }
}
