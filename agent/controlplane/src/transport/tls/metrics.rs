//! What comes of handshakes: counted by side and outcome, and logged once a minute a peer.

use std::{collections::HashMap, sync::Mutex, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::time::Instant;

use super::TlsError;
use crate::sync::lock;

/// The least time between two lines about one peer.
const INTERVAL: Duration = Duration::from_secs(60);

/// The most peers that are remembered for that. Of more, one line says nothing until a minute is over.
const MOST_PEERS: usize = 1024;

/// Which part we had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// We were dialled.
    Server,
    /// We have dialled.
    Client,
}

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    side: &'static str,
    outcome: &'static str,
}

/// The label of a handshake that gave a connection.
const DONE: &str = "done";

/// What has come of the handshakes.
#[derive(Debug, Default)]
pub struct Handshakes {
    counts: Family<Labels, Counter>,
    logged: Mutex<HashMap<String, Instant>>,
}

impl Handshakes {
    /// Adds the counts to a metrics registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "tls_handshakes",
            "TLS handshakes by side and outcome: done, or why there is no connection",
            self.counts.clone(),
        );
    }

    pub(super) fn note<T>(&self, side: Side, peer: &str, outcome: &Result<T, TlsError>) {
        let error = outcome.as_ref().err();
        let labels = Labels {
            side: side.name(),
            outcome: error.map_or(DONE, TlsError::reason),
        };
        self.counts.get_or_create(&labels).inc();
        // What is dialled fails the call that wanted it, which has the error.
        if let (Side::Server, Some(error)) = (side, error)
            && error.is_notable()
            && self.is_due(peer)
        {
            tracing::warn!(peer, %error, "refused a connection");
        }
    }

    fn is_due(&self, peer: &str) -> bool {
        let now = Instant::now();
        let mut logged = lock(&self.logged);
        if logged.get(peer).is_some_and(|last| now < *last + INTERVAL) {
            return false;
        }
        if logged.len() >= MOST_PEERS {
            logged.retain(|_, last| now < *last + INTERVAL);
        }
        if logged.len() >= MOST_PEERS {
            return false;
        }
        logged.insert(peer.to_owned(), now);
        true
    }
}
