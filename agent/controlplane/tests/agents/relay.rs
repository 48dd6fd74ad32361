//! What callers of the network may use an agent for: names of its own domain.

use std::time::Duration;

use nsm_proto::registry::NetworkServiceEndpoint;
use tokio::net::TcpListener;
use tonic::{Code, Status};

use crate::support::{Client, World, assert_refusal, client_side, endpoint_side};

const OTHER: &str = "svc@peer.example";

/// A stranger gets one answer, whatever lies behind the name that it asks for, and nothing is dialled.
#[tokio::test]
async fn a_stranger_neither_relays_nor_probes() {
    let world = World::of([client_side().without_relays(), endpoint_side()]).await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let open = TcpListener::bind("127.0.0.1:0").await.expect("a port");
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
    let dialled = tokio::time::timeout(Duration::from_millis(50), open.accept()).await;
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
    let open = TcpListener::bind("127.0.0.1:0").await.expect("a port");
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
    let dialled = tokio::time::timeout(Duration::from_millis(50), open.accept()).await;
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
    let open = TcpListener::bind("127.0.0.1:0").await.expect("a port");
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
            .offer(NetworkServiceEndpoint {
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

/// What accepts connections without being a peer, what refuses them, what stays silent and what answers an error: a stranger cannot tell
/// one from another.
#[tokio::test]
async fn a_stranger_is_answered_the_same_whatever_listens_at_a_registered_url() {
    let timeout = Duration::from_millis(500);
    let setup = client_side()
        .without_relays()
        .without_forwarder()
        .request_timeout(timeout);
    let world = World::of([setup, endpoint_side()]).await;
    let [a, _] = world.agents();
    let refusing = world.foreign_domain("peer.example", "svc").await;
    refusing.twist(|_| Err(Status::permission_denied("not you")));
    let silent = world.foreign_domain("silent.example", "svc").await;
    silent.hold(true);
    let open = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let open_url = format!("tcp://{}", open.local_addr().expect("bound"));
    let closing = tokio::spawn(async move { while open.accept().await.is_ok() {} });
    let stranger = Client::over_network(a).await;
    let mut said = Vec::new();
    for (name, url) in [
        ("closed", "tcp://127.0.0.1:1"),
        ("open", &open_url),
        ("refusing", &refusing.url),
        ("silent", &silent.url),
    ] {
        let entry = NetworkServiceEndpoint {
            name: name.to_owned(),
            network_service_names: vec!["planted".to_owned()],
            url: url.to_owned(),
            ..NetworkServiceEndpoint::default()
        };
        stranger.offer(entry.clone()).await.expect("registered");
        let status = stranger.refused(stranger.request_for("planted")).await;
        said.push((status.code(), status.message().to_owned()));
        stranger.unregister(entry).await.expect("gone");
    }
    said.dedup();
    assert_eq!(said.len(), 1, "{said:#?}");
    assert_eq!(said[0].0, Code::Unavailable);
    silent.hold(false);
    closing.abort();
}

/// An agent dials as itself: a process of its node must not reach services of the node through it that trust the node's own addresses.
#[tokio::test]
async fn an_endpoint_of_the_node_is_not_at_an_address_of_the_node() {
    let world = World::of([client_side().dialling_outside_only(), endpoint_side()]).await;
    let [a, _] = world.agents();
    let local = Client::on_node(a).await;
    let entry = |url: &str| NetworkServiceEndpoint {
        name: "nse-1".to_owned(),
        network_service_names: vec!["svc".to_owned()],
        url: url.to_owned(),
        ..NetworkServiceEndpoint::default()
    };
    for url in [
        "tcp://127.0.0.1:22",
        "tcp://[::1]:22",
        "tcp://169.254.169.254:80",
    ] {
        let status = local.register(entry(url)).await.expect_err("inside");
        assert_refusal(&status, Code::InvalidArgument, &[url, "dial_inside"]);
    }
    // What is reached at our public address is this node, too.
    a.plane
        .set_public_url(Some("tcp://192.0.2.50:5006".to_owned()));
    let status = local.register(entry("tcp://192.0.2.50:22")).await;
    let status = status.expect_err("our own");
    assert_refusal(
        &status,
        Code::InvalidArgument,
        &["192.0.2.50", "dial_inside"],
    );
    local
        .register(entry("tcp://192.0.2.51:5006"))
        .await
        .expect("elsewhere");
}
