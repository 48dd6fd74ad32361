//! A registry somewhere else: another agent, an NSM registry, a registry proxy or a manager, over gRPC.

use std::sync::Arc;

use futures_util::{FutureExt as _, TryFutureExt as _, stream::unfold};
use nsm_core::{
    identity::access::{Role, Server},
    net::PeerUrl,
    nsm::name::Domain,
};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use tokio::time::{Instant, timeout_at};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status, Streaming};

use super::{Asker, DomainRegistry, Entries, Events, Terms, entry::Event, wire::Wire};
use crate::{
    error::RequestError,
    peer::{
        calls::{call, refused},
        peers::{Peer, Peers},
    },
    transport::dial::Link,
};

/// A registry behind one URL or several. Cheap to make; its HTTP/2 connections are those of the agent's peers.
#[derive(Debug)]
pub struct Remote {
    peers: Arc<Peers>,
    /// The ways to one registry, the best first.
    urls: Vec<PeerUrl>,
    /// The domain whose registry it has to be; none: ours.
    domain: Option<Domain>,
}

impl Remote {
    /// The registry behind `urls`; the first that can be reached is asked.
    pub(crate) fn at(peers: &Arc<Peers>, urls: impl IntoIterator<Item = PeerUrl>) -> Self {
        Self {
            peers: Arc::clone(peers),
            urls: urls.into_iter().collect(),
            domain: None,
        }
    }

    /// The same as the registry of another domain: a server that shows a certificate has to be that.
    pub(crate) fn of_domain(self, domain: Domain) -> Self {
        Self {
            domain: Some(domain),
            ..self
        }
    }

    /// A link to the first of `urls` that takes the connection.
    async fn reached(
        &self,
        urls: &[PeerUrl],
        deadline: Instant,
    ) -> Result<(Arc<Peer>, Link), RequestError> {
        if urls.is_empty() {
            return Err(RequestError::Missing("registry address"));
        }
        let (peer, link) = self.peers.first_reached(urls, deadline).await?;
        let server = self.domain.as_ref().map_or(Server::Own, Server::Of);
        let session = link.session();
        self.peers.check(session.as_ref(), server, Role::Registry)?;
        Ok((peer, link))
    }

    /// Makes a call at the first URL that takes the connection; once more where the channel could not connect after all, and nothing was
    /// sent.
    async fn called<T, F>(
        &self,
        method: &'static str,
        deadline: Instant,
        send: impl Fn(Link) -> F + Send + Sync,
    ) -> Result<T, RequestError>
    where
        F: Future<Output = Result<Response<T>, Status>> + Send,
    {
        let mut may_repeat = true;
        loop {
            let (peer, link) = self.reached(&self.urls, deadline).await?;
            let outcome = call(&peer.url, method, deadline, send(link)).await;
            peer.note(&outcome);
            match outcome {
                Err(RequestError::Dial(_)) if may_repeat => may_repeat = false,
                outcome => return Ok(outcome?.into_inner()),
            }
        }
    }

    fn outgoing<T>(&self, link: &Link, message: T, terms: Terms) -> Request<T> {
        let deadline = Some(terms.deadline);
        let mut request = self.peers.outgoing(link, message, deadline);
        if let Some(owner) = terms.owner {
            owner.apply(request.metadata_mut());
        }
        request
    }

    async fn find_at<E: Wire>(
        &self,
        peer: &Peer,
        link: Link,
        query: E,
        deadline: Instant,
    ) -> Result<Events<E>, RequestError> {
        let query = query.into_query(false);
        let request = self.peers.outgoing(&link, query, Some(deadline));
        let find = E::find(link.channel, request);
        let answer = call(&peer.url, E::FIND, deadline, find).await;
        peer.note(&answer);
        let source = Source {
            url: peer.url.clone(),
            deadline: Some(deadline),
            began: Instant::now(),
        };
        Ok(Events::arriving(source.events(answer?.into_inner())))
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
        let register = |link: Link| {
            let request = self.outgoing(&link, entry.clone(), terms.clone());
            E::register(link.channel, request)
        };
        self.called("Register", terms.deadline, register).await
    }

    async fn unregister(&self, entry: E, terms: Terms) -> Result<(), RequestError> {
        let unregister = |link: Link| {
            let request = self.outgoing(&link, entry.clone(), terms.clone());
            E::unregister(link.channel, request)
        };
        self.called("Unregister", terms.deadline, unregister).await
    }

    async fn find(&self, query: E, deadline: Instant) -> Result<Events<E>, RequestError> {
        let mut left = self.urls.clone();
        let mut may_repeat = true;
        loop {
            let (peer, link) = self.reached(&left, deadline).await?;
            let found = self.find_at(&peer, link, query.clone(), deadline).await;
            match found {
                // The channel's error may be an old one.
                Err(RequestError::Dial(_)) if may_repeat => may_repeat = false,
                // A registry that was reached before fails by the call when it is gone, not by the dial.
                Err(error) if error.code() == Code::Unavailable && left.len() > 1 => {
                    left.retain(|url| *url != peer.url);
                }
                outcome => return outcome,
            }
        }
    }

    /// A registry may send no headers before the first entry (gRPC for Go does so). The call is therefore made by the first poll of
    /// the stream.
    async fn watch(&self, query: E, asker: Asker) -> Result<Events<E>, RequestError> {
        let (peer, link) = self.reached(&self.urls, asker.deadline).await?;
        let request = self.peers.outgoing(&link, query.into_query(true), None);
        let source = Source {
            url: peer.url.clone(),
            deadline: None,
            began: Instant::now(),
        };
        let answer = E::find(link.channel, request).map(|answer| match answer {
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
