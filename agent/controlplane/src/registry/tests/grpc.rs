//! The registry through its gRPC services, over loopback.

use nsm_proto::registry::{
    NetworkServiceEndpointQuery, NetworkServiceQuery,
    network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    network_service_endpoint_registry_server::NetworkServiceEndpointRegistryServer,
    network_service_registry_client::NetworkServiceRegistryClient,
    network_service_registry_server::NetworkServiceRegistryServer,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Code,
    transport::{Channel, Server},
};

use super::*;

async fn serve(registry: &Registry) -> Channel {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = Server::builder()
        .add_service(NetworkServiceRegistryServer::new(registry.clone()))
        .add_service(NetworkServiceEndpointRegistryServer::new(registry.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    Channel::from_shared(url).unwrap().connect().await.unwrap()
}

fn query(name: &str, watch: bool) -> NetworkServiceEndpointQuery {
    NetworkServiceEndpointQuery {
        network_service_endpoint: Some(endpoint(name, &[])),
        watch,
    }
}

#[tokio::test]
async fn register_find_watch_unregister() {
    let registry = registry();
    let channel = serve(&registry).await;
    let mut services = NetworkServiceRegistryClient::new(channel.clone());
    let mut endpoints = NetworkServiceEndpointRegistryClient::new(channel);

    let registered = services.register(service("s")).await.unwrap().into_inner();
    assert_eq!(registered.payload, "IP");
    let registered = endpoints.register(endpoint("a", &["s"])).await.unwrap();
    let expiry = registered.into_inner().expiration_time.unwrap();
    let expiry = SystemTime::try_from(expiry).unwrap();
    assert!(expiry <= SystemTime::now() + Duration::from_secs(60));

    // No query at all finds everything.
    let all = services.find(NetworkServiceQuery::default()).await.unwrap();
    let all: Vec<_> = all.into_inner().collect().await;
    assert_eq!(all.len(), 1);
    // Nothing that matches is an empty stream, not an error.
    let none = endpoints.find(query("b", false)).await.unwrap();
    assert_eq!(none.into_inner().collect::<Vec<_>>().await.len(), 0);

    let watch = endpoints.find(query("a", true)).await.unwrap();
    let mut watch = watch.into_inner();
    let first = watch.next().await.unwrap().unwrap();
    assert!(!first.deleted);
    endpoints.unregister(endpoint("a", &[])).await.unwrap();
    let gone = watch.next().await.unwrap().unwrap();
    assert!(gone.deleted);
    assert_eq!(gone.network_service_endpoint.unwrap().name, "a");

    let nameless = endpoints.register(endpoint("", &["s"])).await.unwrap_err();
    assert_eq!(nameless.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_client_that_vanishes_leaves_no_watcher() {
    let registry = registry();
    let channel = serve(&registry).await;
    let mut endpoints = NetworkServiceEndpointRegistryClient::new(channel);
    let mut streams = Vec::new();
    for _ in 0..50 {
        let watch = endpoints.find(query("a", true)).await.unwrap();
        streams.push(watch.into_inner());
    }
    assert_eq!(registry.watchers(), 50);
    drop(streams);
    drop(endpoints);
    eventually(|| registry.watchers() == 0).await;
}
