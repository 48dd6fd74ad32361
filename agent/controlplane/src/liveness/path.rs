//! The path of one connection: joined by a Request, proved before the commit, left with the tunnel.

use std::net::IpAddr;

use nsm_core::{
    liveness::{Health, PathId, Reason, Verdict},
    mechanism::TunnelEnd,
};

use super::{Liveness, Reachability};
use crate::{
    connection::model::{Established, PathState},
    error::RequestError,
    ports::PeerSpec,
    sync::lock,
};

/// A path that a Request joins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JoinedPath {
    /// The other end of the tunnel.
    pub(crate) remote: IpAddr,
    /// The UDP port of its tunnels.
    pub(crate) port: u16,
    /// What is watched: none where nothing is.
    pub(crate) watched: Option<PathId>,
    /// What would be watched if this node probed: none where the peer has no reflector.
    pub(crate) watchable: Option<PathId>,
    /// The health where there can be no session.
    pub(crate) unverified: Option<Health>,
    /// Whether the connection did not have this path before.
    pub(crate) is_new: bool,
    /// Whether the connection watched another path before, or none: the peer there may have another reflector now.
    pub(crate) is_joined_anew: bool,
}

impl Liveness {
    /// Joins the session with the other end of connection `id`'s tunnel. `mtu` is what the tunnel would like to carry.
    pub(crate) async fn join(
        &self,
        id: &str,
        remote: TunnelEnd,
        mtu: u32,
        prior: Option<&Established>,
    ) -> JoinedPath {
        let TunnelEnd { address, port, .. } = remote;
        let unverified = |reason| Some(Health::unverified(address, port, reason));
        let path = remote.reflector.map(|reflector| {
            let path = PathId {
                address,
                port,
                reflector,
            };
            // Events name the canonical path.
            path.canonical()
        });
        let unverified = match (self.prober(), path) {
            (None, _) => match self.config.policy {
                Reachability::Require => unverified(Reason::NotProbing),
                Reachability::Prefer | Reachability::Off => None,
            },
            (Some(_), None) => unverified(Reason::NoReflector),
            (Some(prober), Some(path)) => match prober.join(id, &PeerSpec { path, mtu }).await {
                Ok(()) => None,
                Err(error) => {
                    tracing::warn!(connection.id = %id, peer.ip = %address, %error, "a path is not watched");
                    unverified(Reason::NotProbing)
                }
            },
        };
        let before = prior.and_then(|prior| prior.path.watched);
        let watched = path.filter(|_| self.prober().is_some() && unverified.is_none());
        JoinedPath {
            remote: address,
            port,
            watched,
            watchable: path,
            unverified,
            is_new: prior.and_then(Established::remote).map(|(ip, _)| ip) != Some(address)
                || before.is_some_and(|before| before.port != port),
            is_joined_anew: before != watched,
        }
    }

    /// A Request has failed: it does not need the path any more, unless the connection had it before.
    pub(crate) fn leave(&self, id: &str, path: &JoinedPath) {
        if path.is_joined_anew {
            self.unwatch(id, path.watched.as_ref());
        }
    }

    fn unwatch(&self, id: &str, watched: Option<&PathId>) {
        if let (Some(prober), Some(path)) = (self.prober(), watched) {
            prober.leave(id, path);
        }
    }

    /// A connection goes on as `established`, and does not need what it had before any more.
    pub(crate) fn exchange(&self, id: &str, prior: &Established, established: &Established) {
        if prior.path.watched != established.path.watched {
            self.unwatch(id, prior.path.watched.as_ref());
        }
        if prior.remote().map(|(ip, _)| ip) != established.remote().map(|(ip, _)| ip) {
            self.forget_foreign_of(id, prior);
        }
    }

    /// A connection, or its old tunnel, is gone.
    pub(crate) fn leave_with(&self, id: &str, established: &Established) {
        self.unwatch(id, established.path.watched.as_ref());
        self.forget_foreign_of(id, established);
    }

    fn forget_foreign_of(&self, id: &str, established: &Established) {
        let Some((remote, _)) = established.remote() else {
            return;
        };
        let is_last = || {
            let others = self.held.connections.to(remote);
            others.iter().all(|it| it.view.id == id)
        };
        if lock(&self.foreign).has(remote) && is_last() {
            lock(&self.foreign).forget_peer(remote);
        }
    }

    /// Proves a path before the connection through the next hop at `url` is granted.
    ///
    /// # Errors
    /// It could not be proved, and that is required (`strict`: by the policy, or because another endpoint may do better).
    pub(crate) async fn prove(
        &self,
        url: &str,
        path: &JoinedPath,
        strict: bool,
    ) -> Result<(), RequestError> {
        let proved = match (path.watched, self.prober()) {
            // No answer is no proof: the session is gone, or the prober is.
            (Some(watched), Some(prober)) => Some(prober.prove(&watched).await.unwrap_or(
                Health::unverified(path.remote, path.port, Reason::NotProbing),
            )),
            _ => path.unverified,
        };
        let verdict = proved.map_or(Verdict::Up, |health| health.verdict());
        let is_good = match self.config.policy {
            Reachability::Require => verdict == Verdict::Up,
            // A peer without a reflector is as good as another.
            _ => matches!(verdict, Verdict::Up | Verdict::Unverified),
        };
        match proved {
            Some(health) if !is_good && strict => Err(RequestError::Unproven {
                url: url.to_owned(),
                evidence: health.to_string(),
            }),
            Some(health) if !is_good => {
                tracing::warn!(peer.url = %url, %health, "granted although the path is not proved");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// What is known of a joined path now. `refreshed` is set where the connection goes on as it was: its monitors have its health.
    pub(crate) fn path_state(
        &self,
        joined: Option<&JoinedPath>,
        agreed_mtu: u32,
        refreshed: Option<&Established>,
    ) -> PathState {
        let health = joined.and_then(|path| {
            let known = path.watched.and_then(|watched| self.health(&watched));
            known.or(path.unverified)
        });
        let is_down = health.is_some_and(|health| health.is_down());
        let was_granted_so = match (joined, refreshed) {
            (Some(path), Some(prior)) if !path.is_new => prior.path.granted_down,
            _ => true,
        };
        PathState {
            watched: joined.and_then(|path| path.watched),
            watchable: joined.and_then(|path| path.watchable),
            health,
            granted_down: is_down && was_granted_so,
            agreed_mtu,
            ..PathState::default()
        }
    }
}
