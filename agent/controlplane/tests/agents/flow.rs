//! The main job: a client in one domain consumes a service of another.

use nsm_controlplane::{api::server::facts, ports::Plan};
use nsm_core::{address::ipmap::IpMap, link::VxlanSpec};
use nsm_proto::{connection::State, networkservice::NetworkServiceRequest};

use crate::support::{
    Client, Connected, Endpoint, PORT, SERVICE, Standing, World, client_side, endpoint_side,
    eventually, names, parameter, peers,
};

fn tunnel(standing: &Standing) -> &VxlanSpec {
    match &standing.plan {
        Plan::Vxlan { spec, .. } => spec,
        Plan::Pair { .. } => panic!("a tunnel is wanted: {standing:?}"),
    }
}

fn only_request(endpoint: &Endpoint) -> NetworkServiceRequest {
    let requests = endpoint.requests();
    assert_eq!(requests.len(), 1, "{requests:#?}");
    requests.into_iter().next().expect("one")
}

#[tokio::test]
async fn a_client_consumes_a_service_of_another_domain() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);

    let connection = &granted.connection;
    assert_eq!(
        names(connection),
        [client.name(), "agent-1", "agent-2", "nse-1"]
    );
    let path = connection.path.as_ref().expect("a path");
    assert_eq!(path.index, 0);
    assert_eq!(connection.id, path.path_segments[0].id);
    for segment in &path.path_segments[..3] {
        assert!(
            !segment.token.is_empty() && segment.expires.is_some(),
            "{segment:?}"
        );
    }
    assert_eq!(connection.network_service, SERVICE);
    assert_eq!(
        connection.network_service_endpoint_name,
        "nse-1@cluster-2.example"
    );
    assert_eq!(connection.state(), State::Up);
    assert_eq!(parameter(connection, "inodeURL"), client.netns());

    // The endpoint knows nothing of domains.
    let asked = only_request(&it.endpoint).connection.expect("a connection");
    assert_eq!(asked.network_service, "icmp-responder");
    assert_eq!(asked.network_service_endpoint_name, "nse-1");
    assert_eq!(names(&asked), [client.name(), "agent-1", "agent-2"]);

    // One tunnel with two ends: one VNI, each side's address, addresses and MACs crosswise.
    let (ours, theirs) = (a.kernel().only(), b.kernel().only());
    assert_eq!(ours.tunnel, theirs.tunnel);
    let (ours, theirs) = (tunnel(&ours), tunnel(&theirs));
    assert_eq!((ours.local, ours.remote), (theirs.remote, theirs.local));
    assert_eq!(ours.local.to_string(), "192.0.2.1");
    assert_eq!(ours.port, PORT);
    assert_eq!((ours.link.mtu, theirs.link.mtu), (1450, 1450));
    assert_eq!(connection.context.as_ref().expect("a context").mtu, 1450);
    let (mac, their_mac) = (
        ours.link.mac.expect("a MAC"),
        theirs.link.mac.expect("a MAC"),
    );
    assert_ne!(mac, their_mac);
    assert_eq!(
        ours.link.neighbours,
        [(theirs.link.addresses[0].addr(), their_mac)]
    );
    assert_eq!(
        theirs.link.neighbours,
        [(ours.link.addresses[0].addr(), mac)]
    );
    assert_eq!(ours.link.routes[0].prefix, theirs.link.addresses[0]);
    assert_eq!(theirs.link.routes[0].prefix, ours.link.addresses[0]);

    // What a person is told of it.
    assert_eq!(granted.fact(facts::DOMAIN), "cluster-2.example");
    assert_eq!(granted.fact(facts::DNS_QUESTION), "cluster-2.example");
    assert!(
        granted
            .fact(facts::DNS_ANSWER)
            .contains(&b.address.to_string())
    );
    assert_eq!(granted.fact(facts::REMOTE_MECHANISM), "VXLAN");
    assert_eq!(granted.fact(facts::VNI), ours.vni.to_string());
    assert_eq!(peers(a), [(b.url.clone(), 1)]);

    client.close(connection).await.expect("closed");
    let closes = it.endpoint.closes();
    assert_eq!(closes.len(), 1, "{closes:#?}");
    assert_eq!(closes[0].network_service, "icmp-responder");
    it.settles().await;
}

#[tokio::test]
async fn the_smallest_mtu_holds_for_both_ends() {
    for (client_mtu, endpoint_mtu, nse_mtu, expected) in [
        (1500, 9000, 0, 1450),
        (9000, 1500, 0, 1450),
        (9000, 9000, 0, 8950),
        (9000, 9000, 1300, 1300),
    ] {
        let world = World::of([
            client_side().mtu(client_mtu),
            endpoint_side().mtu(endpoint_mtu),
        ])
        .await;
        let [a, b] = world.agents();
        let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
        endpoint.limit_mtu(nse_mtu);
        let granted = Client::on_node(a).await.ask(SERVICE).await;
        assert_eq!(
            [
                granted.connection.context.expect("a context").mtu,
                tunnel(&a.kernel().only()).link.mtu,
                tunnel(&b.kernel().only()).link.mtu,
            ],
            [expected; 3],
            "{client_mtu} {endpoint_mtu} {nse_mtu}"
        );
    }
}

/// Nodes behind 1:1 NAT: each knows its own internal address and the other's public one.
#[tokio::test]
async fn addresses_are_swapped_where_a_request_leaves_its_domain() {
    for (public_a, public_b, parity) in [
        ("203.0.113.1", "203.0.113.2", 0),
        ("203.0.113.2", "203.0.113.1", 1),
    ] {
        let world = World::of([
            // The internal order says the contrary of the public one in the first row.
            crate::support::Setup::new("agent-1", "cluster-1.example", "10.0.9.1"),
            crate::support::Setup::new("agent-2", "cluster-2.example", "10.0.1.1"),
        ])
        .await;
        let [a, b] = world.agents();
        let map = |from: &str, to: &str| {
            let pair = (
                from.parse().expect("an address"),
                to.parse().expect("an address"),
            );
            IpMap::from_pairs([pair]).expect("a map")
        };
        a.plane.set_ip_map(map("10.0.9.1", public_a));
        b.plane.set_ip_map(map("10.0.1.1", public_b));
        world.endpoint(b, "nse-1", "icmp-responder").await;
        let before = world.held();
        let client = Client::on_node(a).await;

        let mut granted = client.ask(SERVICE).await;
        let vni = a.kernel().only().tunnel;
        // A refresh brings the swapped addresses of the first answer along.
        for _ in 0..2 {
            let (ours, theirs) = (a.kernel().only(), b.kernel().only());
            let (ours, theirs) = (tunnel(&ours), tunnel(&theirs));
            assert_eq!(ours.local.to_string(), "10.0.9.1");
            assert_eq!(ours.remote.to_string(), public_b);
            assert_eq!(theirs.local.to_string(), "10.0.1.1");
            assert_eq!(theirs.remote.to_string(), public_a);
            // NSM's rule: even where the client's address is not above the server's.
            assert_eq!(ours.vni.get() % 2, parity, "{public_a} {public_b}");
            granted = client.refresh(&granted).await.expect("refreshed");
            assert_eq!(a.kernel().only().tunnel, vni);
        }
        client.close(&granted.connection).await.expect("closed");
        world.settles(&before).await;
    }
}

#[tokio::test]
async fn a_refresh_keeps_everything() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let first = client.ask(SERVICE).await;
    eventually(1, || b.plane.holdings().monitors).await;
    let standing = (a.kernel().links(), b.kernel().links(), world.held());
    let ids: Vec<_> = endpoint.standing();

    let second = client.refresh(&first).await.expect("refreshed");

    assert_eq!(second.connection.id, first.connection.id);
    assert_eq!(second.agent_id(), first.agent_id());
    assert_eq!(second.connection.context, first.connection.context);
    assert_eq!(second.connection.mechanism, first.connection.mechanism);
    assert_eq!(
        (a.kernel().links(), b.kernel().links(), world.held()),
        standing
    );
    assert_eq!(endpoint.standing(), ids);
    // One that was lost and is sent anew, as if nothing had been answered, finds it too.
    let mut again = client.request_for(SERVICE);
    let connection = again.connection.as_mut().expect("a connection");
    connection.id.clone_from(&first.connection.id);
    connection.path.as_mut().expect("a path").path_segments[0]
        .id
        .clone_from(&first.connection.id);
    again.mechanism_preferences = vec![client.kernel(parameter(&first.connection, "name"))];
    let third = client.send(again).await.expect("granted");
    assert_eq!(third.agent_id(), first.agent_id());
    assert_eq!(world.held(), standing.2);

    client.close(&second.connection).await.expect("closed");
    world.settles(&before).await;
}

#[tokio::test]
async fn a_close_without_the_answer_finds_the_connection() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let request = client.request_for(SERVICE);
    client.send(request.clone()).await.expect("granted");
    // The client never saw the answer: it knows its own segment only.
    let own = request.connection.expect("a connection");
    client.close(&own).await.expect("closed");
    world.settles(&before).await;
}

#[tokio::test]
async fn a_name_of_the_own_domain_is_served_here() {
    let world = World::of([client_side()]).await;
    let [a] = world.agents();
    let endpoint = world.endpoint(a, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    for (service, told) in [
        ("icmp-responder", "nse-1"),
        (
            "icmp-responder@cluster-1.example",
            "nse-1@cluster-1.example",
        ),
    ] {
        let granted = client.ask(service).await;
        assert_eq!(granted.connection.network_service, service);
        assert_eq!(granted.connection.network_service_endpoint_name, told);
        assert_eq!(
            names(&granted.connection),
            [client.name(), "agent-1", "nse-1"]
        );
        let asked = endpoint.requests().pop().expect("a request");
        let asked = asked.connection.expect("a connection");
        assert_eq!(asked.network_service, "icmp-responder");
        assert_eq!(asked.network_service_endpoint_name, "nse-1");

        // Client and endpoint are pods of one node: two links that lead to each other, and no VNI.
        let Plan::Pair {
            client: ours,
            endpoint: theirs,
        } = a.kernel().only().plan
        else {
            panic!("{:?}", a.kernel().only());
        };
        assert_eq!(ours.netns.to_string(), client.netns());
        let (ours, theirs) = (ours.spec, theirs.spec);
        let [own, other] = [&ours, &theirs].map(|it| it.link.addresses[0].addr());
        let others_mac = theirs.link.mac.expect("a MAC");
        assert_eq!(ours.link.neighbours, [(other, others_mac)]);
        assert_eq!((ours.link.mtu, theirs.link.mtu), (1500, 1500));
        // Each sends as itself.
        assert_eq!(
            (ours.sources, theirs.sources),
            (vec![own.into()], vec![other.into()])
        );
        let alias = ours.link.alias.of_endpoint().expect("an alias");
        assert_eq!(theirs.link.alias, alias);
        assert_eq!(a.plane.holdings().vnis, 0);

        let refreshed = client.refresh(&granted).await.expect("refreshed");
        assert_eq!(refreshed.agent_id(), granted.agent_id());
        client.close(&refreshed.connection).await.expect("closed");
        world.settles(&before).await;
    }
}

/// Domains compare without case; the client gets its own words back.
#[tokio::test]
async fn a_domain_in_capitals_is_the_same_domain() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let there = world.endpoint(b, "nse-1", "icmp-responder").await;
    let here = world.endpoint(a, "nse-1", "local").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    for (service, endpoint, told) in [
        (
            "icmp-responder@Cluster-2.Example",
            "",
            "nse-1@Cluster-2.Example",
        ),
        (
            "icmp-responder@Cluster-2.Example",
            "nse-1@CLUSTER-2.example",
            "nse-1@CLUSTER-2.example",
        ),
        ("local@Cluster-1.Example", "", "nse-1@Cluster-1.Example"),
    ] {
        let mut request = client.request_for(service);
        let connection = request.connection.as_mut().expect("a connection");
        endpoint.clone_into(&mut connection.network_service_endpoint_name);
        let granted = client.send(request).await.expect("granted");
        assert_eq!(granted.connection.network_service, service);
        assert_eq!(granted.connection.network_service_endpoint_name, told);
        let far = usize::from(told.contains("uster-2") || told.contains("USTER-2"));
        eventually(far, || b.plane.holdings().monitors).await;
        // Each agent on the path watches the service.
        let watchers = || a.registry.counts().watchers + b.registry.counts().watchers;
        eventually(1 + far, watchers).await;
        let (asked, held) = (there.requests().len() + here.requests().len(), world.held());
        let links = (a.kernel().links(), b.kernel().links());

        let again = client.refresh(&granted).await.expect("refreshed");

        assert_eq!(again.connection.network_service_endpoint_name, told);
        assert_eq!(again.agent_id(), granted.agent_id());
        assert_eq!((a.kernel().links(), b.kernel().links()), links);
        assert_eq!(there.requests().len() + here.requests().len(), asked + 1);
        assert_eq!(world.held(), held);
        client.close(&again.connection).await.expect("closed");
        world.settles(&before).await;
    }
}

/// Who knows the endpoint need not know the service.
#[tokio::test]
async fn an_endpoint_can_be_asked_for_alone() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let mut request = client.request_for("");
    let connection = request.connection.as_mut().expect("a connection");
    connection.network_service_endpoint_name = "nse-1@cluster-2.example".to_owned();
    let granted = client.send(request).await.expect("granted");
    assert_eq!(
        granted.connection.network_service_endpoint_name,
        "nse-1@cluster-2.example"
    );
    let asked = only_request(&endpoint).connection.expect("a connection");
    assert_eq!(asked.network_service_endpoint_name, "nse-1");
    assert_eq!(asked.network_service, "");
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

#[tokio::test]
async fn ten_clients_at_once_share_one_peer() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(Client::on_node(a).await);
    }
    let granted =
        futures_util::future::join_all(clients.iter().map(|client| client.ask(SERVICE))).await;
    assert_eq!(peers(a), [(b.url.clone(), 10)]);
    for agent in [a, b] {
        assert_eq!(agent.kernel().links().len(), 10);
        let holdings = agent.plane.holdings();
        assert_eq!((holdings.connections, holdings.vnis), (10, 10));
    }
    // Ten connections, one monitor stream between the agents.
    eventually(1, || b.plane.holdings().monitors).await;
    let closing = clients
        .iter()
        .zip(&granted)
        .map(|(client, granted)| client.close(&granted.connection));
    for closed in futures_util::future::join_all(closing).await {
        closed.expect("closed");
    }
    world.settles(&before).await;
}

#[tokio::test]
async fn a_hundred_pairs_of_request_and_close_leave_nothing() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    for _ in 0..100 {
        let granted = client.ask(SERVICE).await;
        client.close(&granted.connection).await.expect("closed");
    }
    world.settles(&before).await;
    assert_eq!(a.kernel().changes(), (100, 100));
    assert_eq!(b.kernel().changes(), (100, 100));
}
