//! How the entries of a registry travel: the messages and clients of NSM v1's two registry services, behind one trait.

use std::{pin::Pin, sync::Arc};

use nsm_proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
    NetworkServiceEndpointResponse, NetworkServiceQuery, NetworkServiceResponse,
    network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    network_service_registry_client::NetworkServiceRegistryClient,
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming, transport::Channel};

use super::entry::{Entry, Event};

/// What Find answers to a caller.
pub(crate) type Answers<E> =
    Pin<Box<dyn Stream<Item = Result<<E as Wire>::Answer, Status>> + Send>>;

/// The messages and calls for one kind of entries.
pub trait Wire: Entry {
    /// What Find is asked.
    type Query: Clone + Send + 'static;
    /// One item of what Find answers.
    type Answer: Send + 'static;
    /// How errors name a Find of this kind.
    const FIND: &'static str;

    /// This entry as the query of a Find, or of a watch.
    fn into_query(self, watch: bool) -> Self::Query;

    /// The entry to compare with, and whether its changes are watched.
    fn from_query(query: Self::Query) -> (Self, bool);

    /// A change as an item of the answer.
    fn into_answer(event: Event<Self>) -> Self::Answer;

    /// The change that an item of an answer holds; an item without an entry holds none.
    fn from_answer(answer: Self::Answer) -> Option<Event<Self>>;

    /// Calls Register.
    fn register(
        channel: Channel,
        request: Request<Self>,
    ) -> impl Future<Output = Result<Response<Self>, Status>> + Send;

    /// Calls Unregister.
    fn unregister(
        channel: Channel,
        request: Request<Self>,
    ) -> impl Future<Output = Result<Response<()>, Status>> + Send;

    /// Calls Find.
    fn find(
        channel: Channel,
        request: Request<Self::Query>,
    ) -> impl Future<Output = Result<Response<Streaming<Self::Answer>>, Status>> + Send + 'static;
}

/// The two kinds differ in the names of their messages, fields and clients only.
macro_rules! wire {
    ($entry:ident, $field:ident, $query:ident, $answer:ident, $client:ident, $find:literal) => {
        impl Wire for $entry {
            type Query = $query;
            type Answer = $answer;
            const FIND: &'static str = $find;

            fn into_query(self, watch: bool) -> $query {
                $query {
                    $field: Some(self),
                    watch,
                }
            }

            fn from_query(query: $query) -> (Self, bool) {
                (query.$field.unwrap_or_default(), query.watch)
            }

            fn into_answer(event: Event<Self>) -> $answer {
                $answer {
                    $field: Some(Arc::unwrap_or_clone(event.entry)),
                    deleted: event.deleted,
                }
            }

            fn from_answer(answer: $answer) -> Option<Event<Self>> {
                Some(Event {
                    entry: Arc::new(answer.$field?),
                    deleted: answer.deleted,
                })
            }

            async fn register(
                channel: Channel,
                request: Request<Self>,
            ) -> Result<Response<Self>, Status> {
                $client::new(channel).register(request).await
            }

            async fn unregister(
                channel: Channel,
                request: Request<Self>,
            ) -> Result<Response<()>, Status> {
                $client::new(channel).unregister(request).await
            }

            async fn find(
                channel: Channel,
                request: Request<$query>,
            ) -> Result<Response<Streaming<$answer>>, Status> {
                $client::new(channel).find(request).await
            }
        }
    };
}

wire!(
    NetworkService,
    network_service,
    NetworkServiceQuery,
    NetworkServiceResponse,
    NetworkServiceRegistryClient,
    "Find of network services"
);

wire!(
    NetworkServiceEndpoint,
    network_service_endpoint,
    NetworkServiceEndpointQuery,
    NetworkServiceEndpointResponse,
    NetworkServiceEndpointRegistryClient,
    "Find of network service endpoints"
);
