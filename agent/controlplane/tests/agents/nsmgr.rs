//! What NSM's own NSMgr does for its clients and endpoints, and this agent in its place.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use nsm_core::mechanism::VXLAN;
use nsm_proto::{
    connection::Connection,
    connectioncontext::{ConnectionContext, IpContext},
    registry::{Destination, Match, NetworkService},
};
use tonic::Code;

use crate::support::{
    Client, Endpoint, Setup, World, client_side, endpoint_side, mechanism, registration,
};

const SERVICE: &str = "icmp-responder@cluster-2.example";

fn excluded(connection: &Connection) -> Option<&[String]> {
    let ip = connection.context.as_ref()?.ip_context.as_ref()?;
    Some(&ip.excluded_prefixes)
}

fn last_asked(endpoint: &Endpoint) -> Connection {
    let requests = endpoint.requests();
    let last = requests.last().and_then(|last| last.connection.clone());
    last.expect("a connection")
}

fn protecting(mut setup: Setup) -> Setup {
    let service_range = "10.96.0.0/12".parse().expect("a prefix");
    setup.admission.protected.push(service_range);
    setup
}

/// A client of another NSMgr, which offers a tunnel and no context at all.
#[tokio::test]
async fn an_endpoint_gets_an_ip_context_with_the_prefixes_of_its_cluster() {
    let world = World::of([protecting(endpoint_side())]).await;
    let [b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::over_network(b).await;
    let mut request = client.request_for("icmp-responder@cluster-2.example");
    request.mechanism_preferences = vec![mechanism("REMOTE", VXLAN, &[("src_ip", "192.0.2.1")])];
    let own = "203.0.113.0/24".to_owned();
    for asked in [vec![], vec![own]] {
        let mut request = request.clone();
        if !asked.is_empty() {
            let connection = request.connection.as_mut().expect("a connection");
            connection.context = Some(ConnectionContext {
                ip_context: Some(IpContext {
                    excluded_prefixes: asked.clone(),
                    ..IpContext::default()
                }),
                ..ConnectionContext::default()
            });
        }
        let granted = client.send(request).await.expect("granted");
        let got = last_asked(&endpoint);
        let got = excluded(&got).expect("an IP context");
        assert!(got.contains(&"10.96.0.0/12".to_owned()), "{got:?}");
        assert!(asked.iter().all(|own| got.contains(own)), "{got:?}");
        // What was added is not the client's.
        assert_eq!(excluded(&granted.connection), Some(&asked[..]));
        client.close(&granted.connection).await.expect("closed");
    }
    world.settles(&before).await;
}

#[tokio::test]
async fn an_endpoint_gets_an_ip_context_from_an_nsmgr_that_makes_no_links() {
    let world = World::of([protecting(endpoint_side()).without_forwarder()]).await;
    let [b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(b).await;
    let granted = client.ask("icmp-responder").await;
    let got = last_asked(&endpoint);
    assert_eq!(excluded(&got), Some(&["10.96.0.0/12".to_owned()][..]));
    client.close(&granted.connection).await.expect("closed");
}

fn named(setup: Setup, node: &str) -> Setup {
    let labels = [("nodeName", node), ("clusterName", "c")];
    let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
    setup.client_info(labels.into())
}

/// As NSM's `clientinfo` does it: labels that are there already are left.
#[tokio::test]
async fn clients_and_endpoints_carry_the_names_of_their_node() {
    let far = named(
        Setup::new("agent-3", "cluster-2.example", "192.0.2.3"),
        "two",
    );
    let world = World::of([named(endpoint_side(), "one"), far.sharing_the_registry()]).await;
    let [near, far] = world.agents();
    let here = world.endpoint(near, "here", "db").await;
    let there = world.endpoint(far, "there", "db").await;
    let client = Client::on_node(near).await;
    let same_node = BTreeMap::from([("nodeName".to_owned(), "{{.nodeName}}".to_owned())]);
    let service = NetworkService {
        name: "db".to_owned(),
        matches: vec![Match {
            routes: vec![Destination {
                destination_selector: same_node,
                weight: 0,
            }],
            ..Match::default()
        }],
        ..NetworkService::default()
    };
    client.register_service(service).await.expect("registered");
    for _ in 0..3 {
        let granted = client.ask("db").await;
        let labels = &granted.connection.labels;
        assert_eq!(labels.get("nodeName").map(String::as_str), Some("one"));
        assert_eq!(labels.get("clusterName").map(String::as_str), Some("c"));
        client.close(&granted.connection).await.expect("closed");
    }
    assert_eq!((here.closes().len(), there.closes().len()), (3, 0));
    assert_eq!(last_asked(&here).labels["nodeName"], "one");

    let mut request = client.request_for("db");
    let connection = request.connection.as_mut().expect("a connection");
    connection.labels = [("nodeName".to_owned(), "two".to_owned())].into();
    let granted = client.send(request).await.expect("granted");
    assert_eq!(there.standing().len(), 1, "the client's own label counts");
    client.close(&granted.connection).await.expect("closed");
}

/// The registry is elsewhere and gets our token: it cannot see that of the endpoint.
#[tokio::test]
async fn the_endpoints_token_bounds_its_registration_elsewhere_too() {
    let other = Setup::new("agent-3", "cluster-2.example", "192.0.2.3");
    let world = World::of([endpoint_side(), other.sharing_the_registry()]).await;
    let [registry, node] = world.agents();
    let endpoint = world.endpoint(registry, "nse-1", "svc").await;
    let mut client = Client::on_node(node).await;
    client.lifetime = Some(Duration::from_secs(3));
    let mut other = registration(&endpoint, "svc", &[]);
    other.name = "nse-2".to_owned();
    let latest = SystemTime::now() + Duration::from_secs(4);
    let registered = client.register(other).await.expect("registered");
    let found = Client::on_node(registry).await.find("svc").await;
    let found = found.expect("found").into_iter();
    for endpoint in found.filter(|it| it.name == "nse-2").chain([registered]) {
        let expires = endpoint.expiration_time.expect("it expires");
        let expires = SystemTime::try_from(expires).expect("a time");
        assert!(expires <= latest, "{endpoint:?}");
    }
}

/// What is registered can be asked for: names that a Request cannot carry are refused here too.
#[tokio::test]
async fn names_that_cannot_be_asked_for_cannot_be_registered() {
    let world = World::of([client_side()]).await;
    let [a] = world.agents();
    let endpoint = world.endpoint(a, "nse-1", "svc").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    for name in ["a/b", "a b", "größe", "a\tb", &"x".repeat(254)] {
        let asked = client.refused(client.request_for(name)).await;
        assert_eq!(asked.code(), Code::InvalidArgument);
        let good = registration(&endpoint, "svc", &[]);
        let mut its_name = good.clone();
        its_name.name = name.to_owned();
        let mut its_service = good.clone();
        its_service.network_service_names.push(name.to_owned());
        let mut its_label = good;
        let labels = &mut its_label.network_service_labels;
        labels.insert(name.to_owned(), Default::default());
        for registration in [its_name, its_service, its_label] {
            let status = client.register(registration).await.expect_err(name);
            assert_eq!(status.message(), asked.message());
        }
        let service = NetworkService {
            name: name.to_owned(),
            ..NetworkService::default()
        };
        let status = client.register_service(service).await.expect_err(name);
        assert_eq!(status.message(), asked.message());
    }
    world.settles(&before).await;
}

/// An endpoint that checks tokens must be able to take the Close.
#[tokio::test]
async fn a_connection_is_closed_while_the_clients_token_is_alive() {
    let world = World::two().await;
    let [_, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let [a, _] = world.agents();
    let mut client = Client::on_node(a).await;
    client.lifetime = Some(Duration::from_secs(2));
    let granted = client.ask(SERVICE).await;
    let expires = granted.connection.path.expect("a path").path_segments[0].expires;
    let expires = SystemTime::try_from(expires.expect("a time")).expect("a time");
    let closed = endpoint.closed_at().await;
    assert!(closed < expires, "{closed:?}, {expires:?}");
}
