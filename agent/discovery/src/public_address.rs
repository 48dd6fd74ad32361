//! Questions to the sources of the node's public address: metadata services, Kubernetes, STUN servers.
//!
//! What each is asked and what its answers mean is decided in [`nsm_core::address::public`]; here are the sockets. Nothing of this is
//! ever fatal: a service that is not there, silent or wrong is an [`Outcome::Failed`] with a sentence, within a second for HTTP and
//! seven for STUN, whose server's name may have to be found first.

use std::{net::IpAddr, path::PathBuf, sync::Mutex, time::Duration};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use nsm_core::address::public::{Outcome, Provider, Source};
use tokio_stream::Stream;

mod http;
mod kubernetes;
mod metadata;
mod stun;
#[cfg(test)]
mod tests;

pub use self::{
    http::{BaseUrl, Trust},
    kubernetes::{IN_CLUSTER_ACCOUNT, KubernetesNode},
    stun::StunServer,
};

/// The longest time for everything that one source is asked by HTTP. A metadata service is on the same machine and an API server in
/// the same network: both answer within milliseconds, or, as behind a hop limit, never.
pub const HTTP_TIMEOUT: Duration = Duration::from_secs(1);

/// Whom to ask.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LookupConfig {
    /// Metadata services, with where each is.
    pub metadata: Vec<(Provider, BaseUrl)>,
    /// Our node in Kubernetes.
    pub kubernetes: Option<KubernetesNode>,
    /// STUN servers.
    pub stun: Vec<StunServer>,
}

/// Asks all of them, again and again.
#[derive(Debug)]
pub struct Lookup {
    config: LookupConfig,
    /// AWS's session token, once there is one.
    aws_token: Mutex<Option<String>>,
    /// Whom to believe that they are who they are, for services beside Kubernetes.
    trust: Trust,
}

impl Lookup {
    /// Nobody is asked yet.
    pub fn new(config: LookupConfig) -> Self {
        Self {
            config,
            aws_token: Mutex::default(),
            trust: Trust::System,
        }
    }

    /// Asks everybody at once, for a node whose packets leave from `local`; each answer as it comes.
    pub fn ask(&self, local: Option<IpAddr>) -> impl Stream<Item = (Source, Outcome)> + Unpin {
        let asked = FuturesUnordered::<BoxFuture<'_, (Source, Outcome)>>::new();
        for (provider, base) in &self.config.metadata {
            let source = Source::Metadata(*provider);
            let question = metadata::ask(*provider, base, &self.trust, &self.aws_token);
            asked.push(Box::pin(async move {
                (source, outcome(in_time(base, question).await))
            }));
        }
        if let Some(node) = &self.config.kubernetes {
            asked.push(Box::pin(async move {
                let answer = in_time(&node.api, node.external_ip(local)).await;
                (Source::Kubernetes, outcome(answer))
            }));
        }
        for server in &self.config.stun {
            asked.push(Box::pin(async move {
                let answer = server.ask(local).await.map(Some);
                (Source::Stun(server.to_string()), outcome(answer))
            }));
        }
        asked.map(|answer| answer)
    }
}

/// Why a source did not answer, or not understandably.
#[derive(Debug, thiserror::Error)]
enum LookupError {
    #[error("no HTTP exchange with {url}: {cause}")]
    Http { url: String, cause: String },
    #[error("{url}: {cause}")]
    Answer { url: String, cause: String },
    #[error(
        "{base} did not answer within {HTTP_TIMEOUT:?}: it is not there, or its answer does not reach this network namespace (on AWS raise HttpPutResponseHopLimit)"
    )]
    Silent { base: String },
    #[error("cannot read {}: {cause}", path.display())]
    File {
        path: PathBuf,
        cause: std::io::Error,
    },
    #[error(
        "no list of public authorities to check a certificate with ({causes}): install `ca-certificates`, or mount the host's list"
    )]
    NoAuthorities { causes: String },
    #[error("STUN server {server}: {cause}")]
    Stun { server: String, cause: String },
}

async fn in_time<T>(
    base: &BaseUrl,
    work: impl Future<Output = Result<T, LookupError>>,
) -> Result<T, LookupError> {
    match tokio::time::timeout(HTTP_TIMEOUT, work).await {
        Ok(answer) => answer,
        Err(_) => Err(LookupError::Silent {
            base: base.to_string(),
        }),
    }
}

fn outcome(answer: Result<Option<IpAddr>, LookupError>) -> Outcome {
    match answer {
        Ok(Some(address)) => Outcome::Address(address),
        Ok(None) => Outcome::None,
        Err(error) => Outcome::Failed(error.to_string()),
    }
}
