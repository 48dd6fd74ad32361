//! Finds through an agent: whose registry answers, in which names, and for how long.

use std::{pin::Pin, sync::Arc, time::Duration};

use nsm_proto::registry::{
    NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceEndpointResponse,
    network_service_endpoint_registry_server::{
        NetworkServiceEndpointRegistry, NetworkServiceEndpointRegistryServer,
    },
};
use tokio::{net::TcpListener, sync::Notify};
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Code, Request, Response, Status, transport::Server};

use crate::support::{
    Client, World, assert_refusal, client_side, endpoint_side, eventually, registration,
};

#[tokio::test]
async fn names_are_found_as_they_are_asked_for() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let here = world.endpoint(a, "here", "svc").await;
    world.endpoint(b, "there", "svc").await;
    let client = Client::over_network(a).await;
    for (service, name) in [
        ("svc", "here"),
        ("svc@cluster-1.example", "here@cluster-1.example"),
        ("svc@cluster-2.example", "there@cluster-2.example"),
    ] {
        let found = client.find(service).await.expect("found");
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].name, name);
        assert_eq!(found[0].network_service_names, [service]);
        assert!(found[0].network_service_labels.contains_key(service));
        assert_eq!(found[0].url, a.url, "whoever asks us comes by us");
    }
    // An endpoint of another node: by a name with our domain it is asked for through us too, for
    // that node may know its bare name only.
    let mut elsewhere = registration(&here, "svc-2", &[]);
    elsewhere.name = "elsewhere".to_owned();
    elsewhere.url = "tcp://192.0.2.9:5001".to_owned();
    client
        .register(elsewhere.clone())
        .await
        .expect("registered");
    for (service, url) in [
        ("svc-2", &elsewhere.url),
        ("svc-2@cluster-1.example", &a.url),
    ] {
        let found = client.find(service).await.expect("found");
        assert_eq!(&found[0].url, url);
    }
    // Gone from the registry, gone from the node.
    let node = Client::on_node(a).await;
    node.ask("svc").await;
    node.unregister(registration(&here, "svc", &[]))
        .await
        .expect("gone");
    let status = node.refused(node.request_for("svc")).await;
    assert_refusal(&status, Code::NotFound, &["`svc`"]);
}

#[tokio::test]
async fn a_watch_reaches_through_and_ends_with_who_watches() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let before = world.held();
    let client = Client::over_network(a).await;
    let mut watches = Vec::new();
    for service in ["svc@cluster-1.example", "svc@cluster-2.example"] {
        watches.push(client.watch_endpoints(service).await);
    }
    let watchers = || a.registry.counts().watchers + b.registry.counts().watchers;
    eventually(2, watchers).await;
    let there = world.endpoint(b, "there", "svc").await;
    let found = watches[1].next().await;
    let endpoint = found.network_service_endpoint.expect("an endpoint");
    assert_eq!(endpoint.name, "there@cluster-2.example");
    assert_eq!((endpoint.url, found.deleted), (a.url.clone(), false));
    Client::on_node(b)
        .await
        .unregister(registration(&there, "svc", &[]))
        .await
        .expect("gone");
    assert!(watches[1].next().await.deleted);
    drop((watches, client));
    eventually(0, watchers).await;
    // The service outlives its endpoints.
    assert!(b.registry.services.unregister("svc"));
    there.kill();
    eventually(true, || world.held().resembles(&before)).await;
}

#[tokio::test]
async fn a_drain_ends_watches_of_every_domain() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let client = Client::over_network(a).await;
    let mut watches = Vec::new();
    for service in ["svc@cluster-1.example", "svc@cluster-2.example"] {
        watches.push(client.watch_endpoints(service).await);
    }
    a.plane.drain(Duration::from_secs(10)).await;
    for watch in watches {
        assert!(watch.rest().await.is_empty());
    }
}

/// A registry whose answer does not begin before there is something to tell, as in Go.
struct Late(Arc<Notify>);

#[tonic::async_trait]
impl NetworkServiceEndpointRegistry for Late {
    type FindStream =
        Pin<Box<dyn Stream<Item = Result<NetworkServiceEndpointResponse, Status>> + Send>>;

    async fn register(
        &self,
        _: Request<NetworkServiceEndpoint>,
    ) -> Result<Response<NetworkServiceEndpoint>, Status> {
        Err(Status::unimplemented("only found"))
    }

    async fn find(
        &self,
        query: Request<NetworkServiceEndpointQuery>,
    ) -> Result<Response<Self::FindStream>, Status> {
        self.0.notified().await;
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(
            NetworkServiceEndpointResponse {
                network_service_endpoint: query.into_inner().network_service_endpoint,
                deleted: false,
            },
        )))))
    }

    async fn unregister(&self, _: Request<NetworkServiceEndpoint>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("only found"))
    }
}

#[tokio::test]
async fn a_watch_may_wait_longer_than_a_request() {
    let timeout = Duration::from_millis(200);
    let world = World::of([client_side().request_timeout(timeout), endpoint_side()]).await;
    let [a, _] = world.agents();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    world.publish(
        "late.example",
        &format!("tcp://{}", listener.local_addr().expect("bound")),
    );
    let news = Arc::new(Notify::new());
    let server = Server::builder()
        .add_service(NetworkServiceEndpointRegistryServer::new(Late(Arc::clone(
            &news,
        ))))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    let client = Client::over_network(a).await;
    let status = client.find("svc@late.example").await.expect_err("silent");
    assert_refusal(&status, Code::DeadlineExceeded, &["Find"]);
    let mut watch = client.watch_endpoints("svc@late.example").await;
    // A Find that has nothing to wait for takes its time meanwhile, and then some.
    let status = client.find("svc@late.example").await.expect_err("silent");
    assert_refusal(&status, Code::DeadlineExceeded, &["Find"]);
    news.notify_waiters();
    let told = watch.next().await;
    let told = told.network_service_endpoint.expect("an endpoint");
    assert_eq!(told.network_service_names, ["svc@late.example"]);
}
