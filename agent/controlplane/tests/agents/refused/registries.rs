//! Domains, services and endpoints that are not there, registrations that break rules, limits.

use std::time::{Duration, SystemTime};

use tonic::Code;

use super::{SERVICE, connection};
use crate::support::{Client, World, Zone, assert_refusal, client_side, endpoint_side, stamp};

#[tokio::test]
async fn services_and_domains_that_are_not_there() {
    let zone = Zone::default().failing("broken.example");
    let world = World::with_dns([client_side(), endpoint_side()], zone).await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    Client::on_node(b)
        .await
        .register_service(nsm_proto::registry::NetworkService {
            name: "deserted".to_owned(),
            ..Default::default()
        })
        .await
        .expect("registered");
    let before = world.held();
    let client = Client::on_node(a).await;
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        format!("tcp://{}", listener.local_addr().expect("bound"))
    };
    world.publish("closed.example", &closed);
    let dns = world.dns().to_string();
    let asked = |name: &str| client.request_for(name);
    let mut endpoint = asked("icmp-responder@cluster-2.example");
    connection(&mut endpoint).network_service_endpoint_name = "nse-9@cluster-2.example".into();
    for (request, code, words) in [
        (
            asked("x@ghost.example"),
            Code::NotFound,
            vec!["ghost.example", "NXDOMAIN", &dns],
        ),
        (
            asked("x@broken.example"),
            Code::Unavailable,
            vec!["broken.example", "SERVFAIL", &dns],
        ),
        (
            asked("x@closed.example"),
            Code::Unavailable,
            vec![closed.as_str(), "refused"],
        ),
        (
            asked("x@cluster-2.example"),
            Code::NotFound,
            vec!["`x`", "cluster-2.example", "no network service"],
        ),
        (asked("x"), Code::NotFound, vec!["`x`", "cluster-1.example"]),
        (
            asked("x@cluster-1.example"),
            Code::NotFound,
            vec!["`x`", "cluster-1.example"],
        ),
        (
            asked("deserted@cluster-2.example"),
            Code::NotFound,
            vec!["`deserted`", "no endpoint"],
        ),
        (
            endpoint,
            Code::NotFound,
            vec!["`nse-9`", "cluster-2.example"],
        ),
    ] {
        let name = request.connection.clone().expect("one").network_service;
        let status = client.refused(request).await;
        assert_eq!(status.code(), code, "{name}: {status:?}");
        assert_refusal(&status, code, &words);
    }
    // A registry call is told the same.
    let status = client.find("x@ghost.example").await.expect_err("no domain");
    assert_refusal(&status, Code::NotFound, &["NXDOMAIN", &dns]);
    world.settles(&before).await;
}

#[tokio::test]
async fn registrations() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let endpoint = world.endpoint(a, "nse-1", "svc").await;
    let before = world.held();
    let node = Client::on_node(a).await;
    let network = Client::over_network(a).await;
    let registration = crate::support::registration(&endpoint, "svc", &[]);
    let mut mixed = registration.clone();
    mixed.name = "nse-1@cluster-1.example".to_owned();
    mixed.network_service_names = vec!["svc@cluster-2.example".to_owned()];
    let mut label = registration.clone();
    label.name = "nse-1@cluster-1.example".to_owned();
    label
        .network_service_labels
        .insert("svc@cluster-2.example".to_owned(), Default::default());
    let mut elsewhere = registration.clone();
    elsewhere.name = "nse-3".to_owned();
    let mut no_url = registration.clone();
    no_url.url.clear();
    let mut bad_name = registration.clone();
    bad_name.name = "a@b@c".to_owned();
    let mut nowhere = registration.clone();
    nowhere.name = "nse-1@ghost.example".to_owned();
    nowhere.network_service_names.clear();
    let mut old = registration.clone();
    old.expiration_time = Some(stamp(SystemTime::now() - Duration::from_secs(5)));
    for (client, endpoint, code, words) in [
        (
            &node,
            mixed,
            Code::InvalidArgument,
            ["svc@cluster-2.example", "one domain"],
        ),
        (
            &node,
            label,
            Code::InvalidArgument,
            ["svc@cluster-2.example", "one domain"],
        ),
        (&node, no_url, Code::InvalidArgument, ["url", "endpoint"]),
        (
            &node,
            bad_name,
            Code::InvalidArgument,
            ["a@b@c", "more than one"],
        ),
        (
            &node,
            nowhere,
            Code::NotFound,
            ["ghost.example", "NXDOMAIN"],
        ),
        (&node, old, Code::InvalidArgument, ["nse-1", "expire"]),
        // A socket of this node is nothing that somebody else can offer.
        (
            &network,
            elsewhere,
            Code::InvalidArgument,
            ["unix://", "tcp://"],
        ),
    ] {
        let status = client.register(endpoint).await.expect_err("refused");
        assert_refusal(&status, code, &words);
    }
    let mut call = node.call(registration);
    call.metadata_mut().insert(
        "path",
        r#"{"Index":9,"PathSegments":[{"token":"t"}]}"#
            .parse()
            .expect("ASCII"),
    );
    let status = node.register_call(call).await.expect_err("a bad path");
    assert_refusal(&status, Code::InvalidArgument, &["`path`"]);
    world.settles(&before).await;
}

#[tokio::test]
async fn one_connection_too_many() {
    let world = World::of([client_side().max_connections(3), endpoint_side()]).await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let mut granted = Vec::new();
    for _ in 0..3 {
        granted.push(client.ask(SERVICE).await);
    }
    let status = client.refused(client.request_for(SERVICE)).await;
    let words = ["holds 3 connections", "max_connections"];
    assert_refusal(&status, Code::ResourceExhausted, &words);
    // Those that stand can be refreshed, and make room.
    client.refresh(&granted[0]).await.expect("refreshed");
    let gone = granted.pop().expect("three");
    client.close(&gone.connection).await.expect("closed");
    granted.push(client.ask(SERVICE).await);
    for it in granted {
        client.close(&it.connection).await.expect("closed");
    }
    world.settles(&before).await;
}
