//! What callers of the network may use an agent for: names of its own domain.

use nsm_proto::registry::NetworkServiceEndpoint;
use tonic::Code;

use crate::support::{Client, World, assert_refusal, client_side, endpoint_side};

const OTHER: &str = "svc@peer.example";

/// A stranger gets one answer, whatever lies behind the name that it asks for, and nothing is dialled.
#[tokio::test]
async fn a_stranger_neither_relays_nor_probes() {
    let world = World::of([client_side().without_relays(), endpoint_side()]).await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let open = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let open_address = open.local_addr().expect("bound");
    let before = world.held();
    let stranger = Client::over_network(a).await;
    let domains = [
        "peer.example".to_owned(),
        "nowhere.example".to_owned(),
        open_address.to_string(),
        "127.0.0.1:1".to_owned(),
        "169.254.169.254:80".to_owned(),
    ];
    let mut said = Vec::new();
    for domain in &domains {
        let name = format!("svc@{domain}");
        let found = stranger.find(&name).await.expect_err("refused");
        let endpoint = NetworkServiceEndpoint {
            name: format!("planted@{domain}"),
            network_service_names: vec![name],
            url: "tcp://192.0.2.66:5006".to_owned(),
            ..NetworkServiceEndpoint::default()
        };
        let registered = stranger
            .register(endpoint.clone())
            .await
            .expect_err("refused");
        let unregistered = stranger.unregister(endpoint).await.expect_err("refused");
        for status in [found, registered, unregistered] {
            assert_refusal(&status, Code::PermissionDenied, &["does not serve that"]);
            said.push(status.message().to_owned());
        }
    }
    said.dedup();
    assert_eq!(said.len(), 1, "{said:?}");
    let dialled = tokio::time::timeout(std::time::Duration::from_millis(50), open.accept()).await;
    assert!(
        dialled.is_err(),
        "a stranger made the agent dial its own loopback"
    );
    // What a client of this node has found is no way for strangers either.
    let client = Client::on_node(a).await;
    client.find(OTHER).await.expect("found");
    let mut request = stranger.request_for(OTHER);
    let connection = request.connection.as_mut().expect("one");
    connection.network_service_endpoint_name = format!("{}@peer.example", peer.name);
    let status = stranger.refused(request).await;
    assert_refusal(&status, Code::PermissionDenied, &["does not serve that"]);
    assert!(peer.requests().is_empty());
    world.settles(&before).await;
}

/// A name of DNS or an address in a name leads nowhere inside, whoever asks.
#[tokio::test]
async fn nothing_of_the_node_is_dialled() {
    let world = World::of([client_side().dialling_outside_only(), endpoint_side()]).await;
    let [a, _] = world.agents();
    let open = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let open_address = open.local_addr().expect("bound");
    let client = Client::on_node(a).await;
    for address in [
        open_address.to_string(),
        "127.0.0.1:1".to_owned(),
        "[::1]:80".to_owned(),
    ] {
        let status = client
            .refused(client.request_for(&format!("svc@{address}")))
            .await;
        assert_refusal(&status, Code::Unavailable, &["loopback", "dial_inside"]);
    }
    let dialled = tokio::time::timeout(std::time::Duration::from_millis(50), open.accept()).await;
    assert!(dialled.is_err(), "the agent dialled its own loopback");
    // What the operator has configured is dialled.
    world.foreign_domain("peer.example", "svc").await;
    let granted = client.ask(OTHER).await;
    client.close(&granted.connection).await.expect("closed");
}

/// An endpoint that a stranger registers in our domain leads to nothing of this node, and its state is not told.
#[tokio::test]
async fn a_registered_url_is_no_probe() {
    let setup = client_side().without_relays().dialling_outside_only();
    let world = World::of([setup, endpoint_side()]).await;
    let [a, _] = world.agents();
    let open = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let stranger = Client::over_network(a).await;
    let mut said = Vec::new();
    for (name, url) in [
        (
            "one",
            format!("tcp://{}", open.local_addr().expect("bound")),
        ),
        ("two", "tcp://127.0.0.1:1".to_owned()),
    ] {
        stranger
            .register(NetworkServiceEndpoint {
                name: name.to_owned(),
                network_service_names: vec![name.to_owned()],
                url,
                ..NetworkServiceEndpoint::default()
            })
            .await
            .expect("registered");
        let mut request = stranger.request_for(name);
        request.mechanism_preferences = Vec::new();
        said.push(stranger.refused(request).await);
    }
    for status in &said {
        assert_refusal(status, Code::Unavailable, &["cannot be reached now"]);
    }
    assert_eq!(said[0].message(), said[1].message());
}
