//! Which endpoint serves: labels, matches, weights, and the next one when one fails.

use std::collections::BTreeMap;

use nsm_proto::{
    connection::{ConnectionEventType::Delete, State},
    registry::{Destination, Match, Metadata, NetworkService},
};
use tonic::{Code, Status};

use crate::support::{Client, Watch, World, assert_refusal, eventually};

const SERVICE: &str = "db@cluster-2.example";
const NSE: &str = "nse-1@cluster-2.example";

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn rule(source: &[(&str, &str)], destinations: &[(&[(&str, &str)], u32)]) -> Match {
    Match {
        source_selector: labels(source),
        routes: destinations
            .iter()
            .map(|(selector, weight)| Destination {
                destination_selector: labels(selector),
                weight: *weight,
            })
            .collect(),
        ..Match::default()
    }
}

/// Asks `times` with these labels and counts which endpoint was told.
async fn told(
    client: &Client,
    own: &[(&str, &str)],
    times: usize,
) -> Result<BTreeMap<String, usize>, Status> {
    let mut counts = BTreeMap::new();
    for _ in 0..times {
        let mut request = client.request_for(SERVICE);
        request.connection.as_mut().expect("a connection").labels = labels(own);
        let granted = client.send(request).await?;
        let name = &granted.connection.network_service_endpoint_name;
        *counts.entry(name.clone()).or_default() += 1;
        client.close(&granted.connection).await?;
    }
    Ok(counts)
}

fn counted(pairs: &[(&str, usize)]) -> BTreeMap<String, usize> {
    pairs
        .iter()
        .map(|(name, count)| (format!("{name}@cluster-2.example"), *count))
        .collect()
}

/// A service's matches say which clients it is for. Without the service nobody is served, as by NSM's own discovery; with it at once.
#[tokio::test]
async fn a_service_that_is_not_registered_is_not_found_though_endpoints_offer_it() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "db").await;
    assert!(b.registry.services.unregister("db"));
    let client = Client::on_node(a).await;
    for (service, endpoint) in [(SERVICE, ""), (SERVICE, NSE), ("", NSE)] {
        let mut request = client.request_for(service);
        let connection = request.connection.as_mut().expect("a connection");
        endpoint.clone_into(&mut connection.network_service_endpoint_name);
        let status = client.refused(request).await;
        assert_refusal(&status, Code::NotFound, &["is not registered"]);
    }
    let service = NetworkService {
        name: "db".to_owned(),
        ..NetworkService::default()
    };
    let registered = Client::on_node(b).await.register_service(service).await;
    registered.expect("registered");
    client.ask(SERVICE).await;
}

/// Whoever may not use a service any more is let go, at the endpoint's node and at the client's, and asks again. The others stay.
#[tokio::test]
async fn connections_end_that_new_matches_do_not_allow() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "db").await;
    let operator = Client::on_node(b).await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let mut granted = Vec::new();
    for app in ["friend", "stranger"] {
        let mut request = client.request_for(SERVICE);
        let connection = request.connection.as_mut().expect("a connection");
        connection.labels = labels(&[("app", app)]);
        granted.push(client.send(request).await.expect("granted"));
    }
    let mut watch = client.monitor().await;
    assert_eq!(watch.next().await.connections.len(), 2);
    let mut service = NetworkService {
        name: "db".to_owned(),
        matches: vec![rule(&[("app", "friend")], &[(&[], 1)])],
        ..NetworkService::default()
    };
    let registered = operator.register_service(service.clone()).await;
    registered.expect("registered");
    assert_eq!(deleted(&mut watch).await, granted[1].agent_id());
    eventually(1, || endpoint.standing().len()).await;
    assert_eq!(a.plane.connections()[0].id(), granted[0].agent_id());
    let again = client.refresh(&granted[1]).await.expect_err("not for it");
    assert_refusal(&again, Code::NotFound, &["matches the client's labels"]);
    // The other is let go when its time has come.
    service.matches[0].source_selector = labels(&[("app", "nobody")]);
    let registered = operator.register_service(service).await;
    registered.expect("registered");
    assert_eq!(deleted(&mut watch).await, granted[0].agent_id());
    drop(watch);
    world.settles(&before).await;
}

/// A connection is granted while the matches change: it was chosen by the former ones.
#[tokio::test]
async fn matches_that_change_during_a_request_hold_for_its_connection() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "db").await;
    let operator = Client::on_node(b).await;
    let client = Client::on_node(a).await;
    client.ask(SERVICE).await;
    let asked = endpoint.requests().len();
    endpoint.hold(true);
    let second = client.send(client.request_for(SERVICE));
    let (second, ()) = tokio::join!(second, async {
        eventually(asked + 1, || endpoint.requests().len()).await;
        let service = NetworkService {
            name: "db".to_owned(),
            matches: vec![rule(&[("app", "nobody")], &[(&[], 1)])],
            ..NetworkService::default()
        };
        let registered = operator.register_service(service).await;
        registered.expect("registered");
        // The first connection is gone, so the change has been applied.
        let connections = || {
            (
                a.plane.holdings().connections,
                b.plane.holdings().connections,
            )
        };
        eventually((1, 1), connections).await;
        endpoint.hold(false);
    });
    drop(second);
    // The endpoint did not answer while it was held: what it has of the first ends with its token.
    let connections = || a.plane.holdings().connections + b.plane.holdings().connections;
    eventually(0, connections).await;
}

/// The endpoint's answer has no say in who the client is.
#[tokio::test]
async fn labels_that_an_endpoint_answers_are_not_the_clients() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "db").await;
    endpoint.twist(|mut connection| {
        connection.labels = labels(&[("app", "friend")]);
        Ok(connection)
    });
    let client = Client::on_node(a).await;
    let mut request = client.request_for(SERVICE);
    request.connection.as_mut().expect("a connection").labels = labels(&[("app", "stranger")]);
    let granted = client.send(request).await.expect("granted");
    assert_eq!(granted.connection.labels["app"], "stranger");
    endpoint.mend();
}

/// The connection that ends next. It may be DOWN before, where the other agent is first.
async fn deleted(watch: &mut Watch) -> String {
    loop {
        let event = watch.next().await;
        let connection = event.connections.values().next().expect("one");
        match event.r#type() {
            Delete => return connection.id.clone(),
            _ => assert_eq!(connection.state(), State::Down, "{event:?}"),
        }
    }
}

#[tokio::test]
async fn labels_matches_and_weights_decide() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world
        .labelled_endpoint(b, "old", "db", &[("version", "1")])
        .await;
    world
        .labelled_endpoint(b, "new", "db", &[("version", "2")])
        .await;
    let registrar = Client::on_node(b).await;
    let mut service = NetworkService {
        name: "db".to_owned(),
        payload: "ETHERNET".to_owned(),
        ..NetworkService::default()
    };
    registrar
        .register_service(service.clone())
        .await
        .expect("registered");
    let before = world.held();
    let client = Client::on_node(a).await;

    // No rules: everyone in turn.
    let spread = told(&client, &[], 6).await.expect("granted");
    assert_eq!(spread, counted(&[("old", 3), ("new", 3)]));

    service.matches = vec![
        rule(&[("app", "batch")], &[(&[("version", "1")], 0)]),
        rule(&[], &[(&[("version", "1")], 1), (&[("version", "2")], 3)]),
    ];
    registrar
        .register_service(service.clone())
        .await
        .expect("registered");
    let batch = told(&client, &[("app", "batch")], 3)
        .await
        .expect("granted");
    assert_eq!(batch, counted(&[("old", 3)]));
    let weighted = told(&client, &[], 8).await.expect("granted");
    assert_eq!(weighted, counted(&[("old", 2), ("new", 6)]));

    // A rule that nothing fits: refused, unless it falls through.
    service.matches[0] = rule(&[("app", "batch")], &[(&[("version", "3")], 0)]);
    registrar
        .register_service(service.clone())
        .await
        .expect("registered");
    let refused = told(&client, &[("app", "batch")], 1).await;
    let refused = refused.expect_err("nothing matches");
    assert_refusal(
        &refused,
        Code::NotFound,
        &[
            "none of the 2 endpoints",
            "`db`",
            "`cluster-2.example`",
            "app=batch",
        ],
    );
    service.matches[0].fallthrough = true;
    registrar
        .register_service(service.clone())
        .await
        .expect("registered");
    told(&client, &[("app", "batch")], 1)
        .await
        .expect("granted");

    // A rule of metadata alone lets everyone serve; one without anything, nobody.
    service.matches = vec![Match {
        metadata: Some(Metadata::default()),
        ..Match::default()
    }];
    registrar
        .register_service(service.clone())
        .await
        .expect("registered");
    told(&client, &[], 1).await.expect("granted");
    service.matches = vec![Match::default()];
    registrar
        .register_service(service)
        .await
        .expect("registered");
    let refused = told(&client, &[], 1).await.expect_err("nobody");
    assert_refusal(&refused, Code::NotFound, &["none of the 2 endpoints"]);
    world.settles(&before).await;
}

#[tokio::test]
async fn an_endpoint_that_refuses_gives_way_to_the_next() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let bad = world.endpoint(b, "bad", "db").await;
    let dead = world.endpoint(b, "dead", "db").await;
    let good = world.endpoint(b, "good", "db").await;
    bad.twist(|_| Err(Status::resource_exhausted("no address left")));
    dead.kill();
    let before = world.held();
    let client = Client::on_node(a).await;
    let spread = told(&client, &[], 6).await.expect("granted");
    assert_eq!(spread, counted(&[("good", 6)]));
    assert!(!bad.requests().is_empty(), "its turn came");

    // When nobody can, every cause is told.
    good.twist(|_| Err(Status::unavailable("I am leaving")));
    let refused = told(&client, &[], 1).await.expect_err("nobody can");
    assert_refusal(
        &refused,
        refused.code(),
        &["no address left", "I am leaving", "dead.sock"],
    );
    world.settles(&before).await;
}

/// A refresh of a connection whose endpoint is gone says so; with another name it goes elsewhere.
#[tokio::test]
async fn a_refresh_goes_to_another_endpoint_when_asked_to() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let one = world.endpoint(b, "one", "db").await;
    let two = world.endpoint(b, "two", "db").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let mut granted = client.ask(SERVICE).await;
    for _ in 0..2 {
        let was = granted.connection.network_service_endpoint_name.clone();
        let (old, new) = if was.starts_with("one") {
            (&one, &two)
        } else {
            (&two, &one)
        };
        let mut connection = granted.connection.clone();
        connection.network_service_endpoint_name = format!("{}@cluster-2.example", new.name);
        granted = client
            .send(nsm_proto::networkservice::NetworkServiceRequest {
                connection: Some(connection),
                mechanism_preferences: Vec::new(),
            })
            .await
            .expect("granted");
        assert_eq!(
            granted.connection.network_service_endpoint_name,
            format!("{}@cluster-2.example", new.name)
        );
        // The one before is closed, and each side has one link.
        eventually(Vec::new(), || old.standing()).await;
        assert_eq!(new.standing().len(), 1);
        assert_eq!(a.kernel().only().tunnel, b.kernel().only().tunnel);
    }
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}
