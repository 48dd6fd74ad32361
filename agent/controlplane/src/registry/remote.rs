//! A registry somewhere else: another agent, an NSM registry, a registry proxy or a manager, over gRPC.

use std::sync::Arc;

use futures_util::{FutureExt as _, TryFutureExt as _, stream::unfold};
use nsm_core::net::PeerUrl;
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use tokio::time::{Instant, timeout_at};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Streaming, transport::Channel};

use super::{Asker, DomainRegistry, Entries, Events, Terms, entry::Event, wire::Wire};
use crate::{
    error::RequestError,
    peer::peers::{Peers, call, refused},
};

/// A registry behind one URL or several. Cheap to make; its HTTP/2 connections are those of the agent's peers.
#[derive(Debug)]
pub struct Remote {
    peers: Arc<Peers>,
    /// The ways to one registry, the best first.
    urls: Vec<PeerUrl>,
}

impl Remote {
    /// The registry behind `urls`; the first that can be reached is asked.
    pub(crate) fn at(peers: &Arc<Peers>, urls: impl IntoIterator<Item = PeerUrl>) -> Self {
        Self {
            peers: Arc::clone(peers),
            urls: urls.into_iter().collect(),
        }
    }

    /// A channel to the first URL that takes the connection.
    async fn reached(&self, deadline: Instant) -> Result<(&PeerUrl, Channel), RequestError> {
        let mut last = None;
        for url in &self.urls {
            match self.peers.channel(url, deadline).await {
                Ok(channel) => return Ok((url, channel)),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or(RequestError::Missing("registry address")))
    }

    fn outgoing<T>(&self, message: T, terms: Terms) -> Request<T> {
        let mut request = self.peers.outgoing(message, Some(terms.deadline));
        if let Some(owner) = terms.owner {
            owner.apply(request.metadata_mut());
        }
        request
    }

    async fn find_at<E: Wire>(
        &self,
        url: &PeerUrl,
        query: E,
        deadline: Instant,
    ) -> Result<Events<E>, RequestError> {
        let channel = self.peers.channel(url, deadline).await?;
        let request = self.peers.outgoing(query.into_query(false), Some(deadline));
        let answer = call(url, E::FIND, deadline, E::find(channel, request)).await?;
        let source = Source {
            url: url.clone(),
            deadline: Some(deadline),
            began: Instant::now(),
        };
        Ok(Events::arriving(source.events(answer.into_inner())))
    }
}

impl DomainRegistry for Remote {
    fn services(&self) -> &dyn Entries<NetworkService> {
        self
    }

    fn endpoints(&self) -> &dyn Entries<NetworkServiceEndpoint> {
        self
    }
}

#[tonic::async_trait]
impl<E: Wire> Entries<E> for Remote {
    async fn register(&self, entry: E, terms: Terms) -> Result<E, RequestError> {
        let deadline = terms.deadline;
        let (url, channel) = self.reached(deadline).await?;
        let answer = E::register(channel, self.outgoing(entry, terms));
        Ok(call(url, "Register", deadline, answer).await?.into_inner())
    }

    async fn unregister(&self, entry: E, terms: Terms) -> Result<(), RequestError> {
        let deadline = terms.deadline;
        let (url, channel) = self.reached(deadline).await?;
        let answer = E::unregister(channel, self.outgoing(entry, terms));
        call(url, "Unregister", deadline, answer).await?;
        Ok(())
    }

    async fn find(&self, query: E, deadline: Instant) -> Result<Events<E>, RequestError> {
        let mut last = None;
        for url in &self.urls {
            match self.find_at(url, query.clone(), deadline).await {
                // A registry that was reached before fails by the call when it is gone, not by the dial.
                Err(error) if error.code() == Code::Unavailable => last = Some(error),
                outcome => return outcome,
            }
        }
        Err(last.unwrap_or(RequestError::Missing("registry address")))
    }

    /// A registry may send no headers before the first entry (gRPC for Go does so). The call is therefore made by the first poll of
    /// the stream.
    async fn watch(&self, query: E, asker: Asker) -> Result<Events<E>, RequestError> {
        let (url, channel) = self.reached(asker.deadline).await?;
        let request = self.peers.outgoing(query.into_query(true), None);
        let source = Source {
            url: url.clone(),
            deadline: None,
            began: Instant::now(),
        };
        let answer = E::find(channel, request).map(|answer| match answer {
            Ok(answer) => Ok(source.events(answer.into_inner())),
            Err(status) => Err(refused(&source.url, E::FIND, &status)),
        });
        Ok(Events::arriving(answer.try_flatten_stream()))
    }
}

/// Where a stream of answers comes from, for its errors.
struct Source {
    url: PeerUrl,
    /// When a stream that does not end is given up; `None` for a watch.
    deadline: Option<Instant>,
    began: Instant,
}

impl Source {
    fn events<E: Wire>(
        self,
        answers: Streaming<E::Answer>,
    ) -> impl Stream<Item = Result<Event<E>, RequestError>> + Send {
        unfold(Some((self, answers)), |state| async {
            let (source, mut answers) = state?;
            let next = match source.deadline {
                Some(deadline) => timeout_at(deadline, answers.next()).await,
                None => Ok(answers.next().await),
            };
            match next {
                Ok(None) => None,
                Ok(Some(Ok(answer))) => Some((Ok(E::from_answer(answer)), Some((source, answers)))),
                Ok(Some(Err(status))) => Some((Err(refused(&source.url, E::FIND, &status)), None)),
                Err(_) => Some((Err(source.silent(E::FIND)), None)),
            }
        })
        .filter_map(Result::transpose)
    }

    fn silent(&self, method: &'static str) -> RequestError {
        RequestError::Silent {
            url: self.url.to_string(),
            method,
            after: self.began.elapsed(),
        }
    }
}
