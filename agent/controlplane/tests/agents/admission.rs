//! What another domain would put into a pod: refused at the agent, closed at the next hop, and named.

use nsm_core::link::admission::{Holding, HoldingKind, MAX_CONNECTION};
use nsm_proto::{
    connection::Connection,
    connectioncontext::{DnsConfig, DnsContext, IpContext, IpNeighbor, PolicyRoute, Route},
};
use tonic::{Code, Status};

use crate::support::{Client, World, assert_refusal, client_side, endpoint_side};

const SERVICE: &str = "svc@peer.example";
const LOCAL_SERVICE: &str = "icmp-responder";

fn ip(connection: &mut Connection) -> &mut IpContext {
    let context = connection.context.get_or_insert_default();
    context.ip_context.get_or_insert_default()
}

fn routed(mut connection: Connection, prefixes: &[&str]) -> Result<Connection, Status> {
    ip(&mut connection)
        .src_routes
        .extend(prefixes.iter().map(|prefix| Route {
            prefix: (*prefix).to_owned(),
            next_hop: String::new(),
        }));
    Ok(connection)
}

fn addressed(mut connection: Connection, address: &str) -> Result<Connection, Status> {
    ip(&mut connection).src_ip_addrs.push(address.to_owned());
    Ok(connection)
}

#[tokio::test]
async fn a_peer_takes_nothing_of_the_pod_or_the_node() {
    type Twist = fn(Connection) -> Result<Connection, Status>;
    let cases: &[(Twist, &[&str])] = &[
        (
            |it| routed(it, &["0.0.0.0/1", "128.0.0.0/1"]),
            &["--default-route"],
        ),
        (|it| routed(it, &["0.0.0.0/0"]), &["--default-route"]),
        (
            |it| routed(it, &["169.254.169.254/32"]),
            &["169.254.169.254/32", "metadata"],
        ),
        (
            |it| routed(it, &["127.0.0.0/8"]),
            &["127.0.0.0/8", "loopback"],
        ),
        (
            |it| routed(it, &["224.0.0.0/4"]),
            &["224.0.0.0/4", "multicast"],
        ),
        // The node, and the other end of the tunnel.
        (
            |it| routed(it, &["192.0.2.1/32"]),
            &["192.0.2.1/32", "this node"],
        ),
        (
            |it| routed(it, &["192.0.2.99/32"]),
            &["192.0.2.99/32", "own tunnel"],
        ),
        (
            |it| routed(it, &["10.30.0.0/24"]),
            &["10.30.0.0/24", "10.30.0.7/32", "`eth0`"],
        ),
        (
            |it| addressed(it, "10.30.0.7/31"),
            &["10.30.0.7/31", "10.30.0.7/32", "`eth0`"],
        ),
        (|it| addressed(it, "127.0.0.2/8"), &["127.0.0.2/8"]),
        (
            |it| addressed(it, "203.0.113.10/24"),
            &["203.0.113.10/24", "admission.prefixes"],
        ),
        (
            |mut it| {
                ip(&mut it).ip_neighbors.push(IpNeighbor {
                    ip: "10.30.0.1".to_owned(),
                    hardware_address: "02:00:00:00:00:01".to_owned(),
                });
                Ok(it)
            },
            &["the neighbour 10.30.0.1"],
        ),
        (
            |mut it| {
                it.context.get_or_insert_default().dns_context = Some(DnsContext {
                    configs: vec![DnsConfig {
                        dns_server_ips: vec!["172.16.0.1".to_owned()],
                        search_domains: vec!["svc.cluster.local".to_owned()],
                    }],
                });
                Ok(it)
            },
            &["svc.cluster.local"],
        ),
        (
            |it| {
                let all: Vec<String> = (0..255).map(|n| format!("10.31.{n}.0/24")).collect();
                routed(it, &all.iter().map(String::as_str).collect::<Vec<_>>())
            },
            &["routes", "64"],
        ),
        (
            |mut it| {
                it.labels
                    .insert("much".to_owned(), "x".repeat(MAX_CONNECTION));
                Ok(it)
            },
            &["bytes", "16384"],
        ),
    ];
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    a.kernel().give(Holding {
        prefix: "10.30.0.7/32".parse().expect("a prefix"),
        kind: HoldingKind::Address,
        link: "eth0".to_owned(),
        is_connection: false,
    });
    let before = world.held();
    let client = Client::on_node(a).await;
    for (at, (twist, words)) in cases.iter().enumerate() {
        peer.twist(*twist);
        let status = client.refused(client.request_for(SERVICE)).await;
        assert_refusal(&status, Code::FailedPrecondition, &[&peer.url]);
        assert_refusal(&status, Code::FailedPrecondition, words);
        assert_eq!(peer.closes().len(), at + 1, "{words:?}");
        world.settles(&before).await;
    }
    // The same endpoint is taken when it does not.
    peer.mend();
    let granted = client.ask(SERVICE).await;
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

/// Routes of a policy, which NSM's forwarders put into a table of their own.
fn steered(mut connection: Connection, prefixes: &[&str]) -> Result<Connection, Status> {
    let routes = prefixes.iter().map(|prefix| Route {
        prefix: (*prefix).to_owned(),
        next_hop: String::new(),
    });
    ip(&mut connection).policies.push(PolicyRoute {
        proto: "6".to_owned(),
        dst_port: "443".to_owned(),
        routes: routes.collect(),
        ..PolicyRoute::default()
    });
    Ok(connection)
}

fn delegated(mut connection: Connection, prefix: &str) -> Result<Connection, Status> {
    ip(&mut connection).extra_prefixes.push(prefix.to_owned());
    Ok(connection)
}

/// Where another forwarder makes the links, the answer of another domain is checked all the same, with what only that forwarder applies.
#[tokio::test]
async fn a_peer_takes_nothing_by_policies_and_extra_prefixes() {
    type Twist = fn(Connection) -> Result<Connection, Status>;
    let cases: &[(Twist, &[&str])] = &[
        (|it| steered(it, &["0.0.0.0/0"]), &["--default-route"]),
        // NSM's forwarders make a default route of it.
        (|it| steered(it, &[]), &["--default-route"]),
        (
            |it| steered(it, &["169.254.169.254/32"]),
            &["169.254.169.254/32", "metadata"],
        ),
        (
            |it| {
                let all: Vec<String> = (0..64).map(|n| format!("10.31.{n}.0/24")).collect();
                steered(it, &all.iter().map(String::as_str).collect::<Vec<_>>())
            },
            &["routes", "64"],
        ),
        (
            |it| delegated(it, "169.254.0.0/16"),
            &["the extra prefix 169.254.0.0/16"],
        ),
        (
            |it| delegated(it, "203.0.113.0/24"),
            &["the extra prefix 203.0.113.0/24", "admission.prefixes"],
        ),
    ];
    for setup in [client_side().without_forwarder(), client_side()] {
        let world = World::of([setup, endpoint_side()]).await;
        let [a, _] = world.agents();
        let peer = world.foreign_domain("peer.example", "svc").await;
        let before = world.held();
        let client = Client::on_node(a).await;
        for (at, (twist, words)) in cases.iter().enumerate() {
            peer.twist(*twist);
            let status = client.refused(client.request_for(SERVICE)).await;
            assert_refusal(&status, Code::FailedPrecondition, &[&peer.url]);
            assert_refusal(&status, Code::FailedPrecondition, words);
            assert_eq!(peer.closes().len(), at + 1, "{words:?}");
            world.settles(&before).await;
        }
        peer.twist(|it| {
            steered(it, &["10.31.0.0/24"]).and_then(|it| delegated(it, "10.32.0.0/24"))
        });
        let granted = client.ask(SERVICE).await;
        client.close(&granted.connection).await.expect("closed");
        world.settles(&before).await;
    }
}

#[tokio::test]
async fn a_default_route_is_given_to_the_client_that_asked() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    peer.twist(|it| routed(it, &["0.0.0.0/1", "128.0.0.0/1"]));
    let client = Client::on_node(a).await;
    let mut request = client.request_for(SERVICE);
    let labels = &mut request.connection.as_mut().expect("one").labels;
    labels.insert("nsm-default-route".to_owned(), "true".to_owned());
    let granted = client.send(request).await.expect("granted");
    client.close(&granted.connection).await.expect("closed");
}

/// Every pod of a cluster has a default route of its own: it stays, and that of the connection comes before it.
#[tokio::test]
async fn a_default_route_beside_the_pods_own() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    a.kernel().give(Holding {
        prefix: "0.0.0.0/0".parse().expect("a prefix"),
        kind: HoldingKind::Route,
        link: "eth0".to_owned(),
        is_connection: false,
    });
    peer.twist(|it| routed(it, &["0.0.0.0/0", "10.30.0.0/24"]));
    let client = Client::on_node(a).await;
    let mut request = client.request_for(SERVICE);
    let labels = &mut request.connection.as_mut().expect("one").labels;
    labels.insert("nsm-default-route".to_owned(), "true".to_owned());
    let granted = client.send(request).await.expect("granted");
    let refreshed = client.refresh(&granted).await.expect("refreshed");
    for it in [&granted, &refreshed] {
        let context = it.connection.context.clone().unwrap_or_default();
        let routes = context.ip_context.unwrap_or_default().src_routes;
        let routes: Vec<_> = routes.iter().map(|route| route.prefix.as_str()).collect();
        let [.., first, second, other] = routes[..] else {
            panic!("{routes:?}")
        };
        assert_eq!(
            [first, second, other],
            ["0.0.0.0/1", "128.0.0.0/1", "10.30.0.0/24"]
        );
        assert!(!routes.contains(&"0.0.0.0/0"), "{routes:?}");
    }
    client.close(&granted.connection).await.expect("closed");
}

/// What is excluded beside the client's own does not make a Request larger than one may be.
#[tokio::test]
async fn exclusions_find_room() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    for number in 0..250 {
        a.kernel().give(Holding {
            prefix: format!("10.99.{number}.17/32").parse().expect("a prefix"),
            kind: HoldingKind::Address,
            link: "eth0".to_owned(),
            is_connection: false,
        });
    }
    let client = Client::on_node(a).await;
    let mut request = client.request_for("icmp-responder@cluster-2.example");
    let labels = &mut request.connection.as_mut().expect("one").labels;
    labels.insert("text".to_owned(), "x".repeat(12 << 10));
    let granted = client.send(request).await.expect("granted");
    let granted = client.refresh(&granted).await.expect("refreshed");
    client.close(&granted.connection).await.expect("closed");
}

/// The pod's own prefixes go to the endpoint, and do not come back to the client as its own.
#[tokio::test]
async fn the_endpoint_is_given_what_it_must_leave_out() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    a.kernel().give(Holding {
        prefix: "10.30.0.7/32".parse().expect("a prefix"),
        kind: HoldingKind::Address,
        link: "eth0".to_owned(),
        is_connection: false,
    });
    let client = Client::on_node(a).await;
    let excluded = |connection: &Connection| {
        let context = connection.context.clone().unwrap_or_default();
        context.ip_context.unwrap_or_default().excluded_prefixes
    };
    let mut request = client.request_for(SERVICE);
    let own = vec!["10.40.0.0/16".to_owned()];
    ip(request.connection.as_mut().expect("one")).excluded_prefixes = own.clone();
    let granted = client.send(request).await.expect("granted");
    let asked = peer.requests().pop().and_then(|request| request.connection);
    let asked = excluded(&asked.expect("a connection"));
    for prefix in ["10.40.0.0/16", "10.30.0.7/32", "192.0.2.1/32"] {
        assert!(asked.iter().any(|it| it == prefix), "{prefix} in {asked:?}");
    }
    assert_eq!(excluded(&granted.connection), own);
    // What one connection of a pod has is excluded from the next.
    let second = client.ask(SERVICE).await;
    let asked = peer.requests().pop().and_then(|request| request.connection);
    let first = granted.connection.context.clone().unwrap_or_default();
    let first = first.ip_context.expect("addresses").src_ip_addrs.remove(0);
    let asked = excluded(&asked.expect("a connection"));
    let first: ipnet::IpNet = first.parse().expect("a prefix");
    let is_covered = |text: &String| {
        text.parse::<ipnet::IpNet>()
            .is_ok_and(|net| net.contains(&first))
    };
    assert!(asked.iter().any(is_covered), "{first} in {asked:?}");
    client.close(&second.connection).await.expect("closed");
    client.close(&granted.connection).await.expect("closed");
}

/// A client of another domain puts nothing into the endpoint's pod, also where the endpoint passes on what it was sent.
#[tokio::test]
async fn a_client_takes_nothing_of_the_endpoints_pod() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", LOCAL_SERVICE).await;
    let before = world.held();
    let client = Client::on_node(a).await;
    for (prefix, words) in [
        ("0.0.0.0/1", "default-route"),
        ("169.254.169.254/32", "metadata"),
        ("192.0.2.2/32", "this node"),
    ] {
        let mut request = client.request_for("icmp-responder@cluster-2.example");
        let context = ip(request.connection.as_mut().expect("one"));
        context.src_ip_addrs = vec!["172.20.0.1/32".to_owned()];
        context.dst_ip_addrs = vec!["172.20.0.2/32".to_owned()];
        context.dst_routes = vec![Route {
            prefix: prefix.to_owned(),
            next_hop: String::new(),
        }];
        let status = client.refused(request).await;
        assert_refusal(&status, Code::FailedPrecondition, &[words]);
        world.settles(&before).await;
    }
}

#[tokio::test]
async fn a_request_is_no_store() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let before = world.held();
    let client = Client::on_node(a).await;
    let mut request = client.request_for(LOCAL_SERVICE);
    let labels = &mut request.connection.as_mut().expect("one").labels;
    labels.insert("much".to_owned(), "x".repeat(MAX_CONNECTION));
    let status = client.refused(request).await;
    assert_refusal(&status, Code::InvalidArgument, &["bytes", "16384"]);
    world.settles(&before).await;
}
