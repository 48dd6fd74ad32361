//! Other shapes than two domains: floating domains, several nodes, agents that only pass on.

use nsm_controlplane::ports::Plan;
use nsm_core::address::ipmap::IpMap;
use nsm_proto::networkservice::NetworkServiceRequest;

use crate::support::{
    Agent, Client, Endpoint, Setup, World, Zone, client_side, endpoint_side, eventually, mechanism,
    names, offer, parameter, registration,
};

fn map(from: &str, to: &str) -> IpMap {
    let address = |text: &str| text.parse().expect("an address");
    IpMap::from_pairs([(address(from), address(to))]).expect("a map")
}

/// A client's agent and an endpoint's, and a domain of a registry alone.
async fn with_floating_domain() -> (World, std::sync::Arc<Endpoint>) {
    let floating = Endpoint::domain("floating").await;
    let port = floating.url.rsplit(':').next().expect("a port");
    let zone = Zone::default()
        .srv(
            "registry.nsm-system.floating.example",
            "host.floating.example",
            port.parse().expect("a port"),
        )
        .a("host.floating.example", [127, 0, 0, 1].into());
    let world = World::with_dns(
        [
            Setup::new("agent-1", "cluster-1.example", "10.0.0.1"),
            Setup::new("agent-2", "cluster-2.example", "10.0.0.2"),
        ],
        zone,
    )
    .await;
    let floating = world.keep(floating);
    (world, floating)
}

async fn register_floating(world: &World, agent: &Agent, floating: &Endpoint) -> Client {
    let endpoint = Endpoint::on_node(agent.folder.path(), "x", true).await;
    let endpoint = world.keep(endpoint);
    let client = Client::on_node(agent).await;
    let mut entry = registration(&endpoint, "svc@floating.example", &[]);
    entry.name = "x@floating.example".to_owned();
    let registered = client.offer(entry).await.expect("registered");
    assert_eq!(registered.name, "x@floating.example");
    assert_eq!(registered.network_service_names, ["svc@floating.example"]);
    assert_eq!(registered.url, endpoint.url);
    // There it is known by its bare name, behind the agent that registered it.
    let registry = floating.registry.as_ref().expect("a domain");
    let found = registry.endpoints.find(&Default::default());
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), &found[0].url), ("x", &agent.url));
    assert_eq!(found[0].network_service_names, ["svc"]);
    client
}

#[tokio::test]
async fn a_floating_domain_has_a_registry_and_no_proxy() {
    let (world, floating) = with_floating_domain().await;
    let [a, b] = world.agents();
    a.plane.set_ip_map(map("10.0.0.1", "203.0.113.1"));
    b.plane.set_ip_map(map("10.0.0.2", "203.0.113.2"));
    let registrar = register_floating(&world, b, &floating).await;
    let before = world.held();
    let client = Client::on_node(a).await;

    let mut granted = client.ask("svc@floating.example").await;
    for _ in 0..2 {
        let connection = &granted.connection;
        assert_eq!(connection.network_service, "svc@floating.example");
        assert_eq!(
            connection.network_service_endpoint_name,
            "x@floating.example"
        );
        assert_eq!(
            names(connection),
            [client.name(), "agent-1", "agent-2", "x"]
        );
        // Each side sees the other's public address and its own internal one.
        let ends: Vec<_> = [a, b]
            .map(|agent| match agent.kernel().only().plan {
                Plan::Vxlan { spec, .. } => (spec.local.to_string(), spec.remote.to_string()),
                Plan::Pair { .. } => panic!("a tunnel"),
            })
            .into();
        assert_eq!(ends[0], ("10.0.0.1".to_owned(), "203.0.113.2".to_owned()));
        assert_eq!(ends[1], ("10.0.0.2".to_owned(), "203.0.113.1".to_owned()));
        granted = client.refresh(&granted).await.expect("refreshed");
    }
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;

    let mut gone = nsm_proto::registry::NetworkServiceEndpoint {
        name: "x@floating.example".to_owned(),
        ..Default::default()
    };
    registrar.unregister(gone.clone()).await.expect("gone");
    let registry = floating.registry.as_ref().expect("a domain");
    assert_eq!(registry.counts().endpoints, 0);
    let status = client
        .refused(client.request_for("svc@floating.example"))
        .await;
    assert_eq!(status.code(), tonic::Code::NotFound, "{status:?}");
    gone.name = "never@floating.example".to_owned();
    registrar.unregister(gone).await.expect("nothing to do");
}

/// Client and endpoint of a floating domain on one node need no tunnel.
#[tokio::test]
async fn a_floating_endpoint_of_this_node_is_a_pair_away() {
    let (world, floating) = with_floating_domain().await;
    let [_, b] = world.agents();
    register_floating(&world, b, &floating).await;
    let before = world.held();
    let client = Client::on_node(b).await;
    let granted = client.ask("svc@Floating.example").await;
    assert_eq!(
        granted.connection.network_service_endpoint_name,
        "x@Floating.example"
    );
    assert_eq!(names(&granted.connection), [client.name(), "agent-2", "x"]);
    assert!(matches!(b.kernel().only().plan, Plan::Pair { .. }));
    client.refresh(&granted).await.expect("refreshed");
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

/// A domain may have more gates than one; the first that is there is taken.
#[tokio::test]
async fn a_domain_of_two_gates_survives_the_loss_of_one() {
    let gates = [
        Endpoint::domain("gate-1").await,
        Endpoint::domain("gate-2").await,
    ];
    let mut zone = Zone::default().a("host.twin.example", [127, 0, 0, 1].into());
    for gate in &gates {
        let port = gate.url.rsplit(':').next().expect("a port");
        for service in ["registry", "nsmgr-proxy"] {
            zone = zone.srv(
                &format!("{service}.nsm-system.twin.example"),
                "host.twin.example",
                port.parse().expect("a port"),
            );
        }
        let registry = gate.registry.as_ref().expect("a domain");
        let mut entry = registration(gate, "svc", &[]);
        entry.name = "nse".to_owned();
        offer(registry, entry);
    }
    let world = World::with_dns([client_side()], zone).await;
    let [first, second] = gates.map(|gate| world.keep(gate));
    let client = Client::on_node(world.agents::<1>()[0]).await;
    let before = world.held();
    let granted = client.ask("svc@twin.example").await;
    assert_eq!((first.standing().len(), second.standing().len()), (1, 0));
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;

    first.kill();
    let granted = client.ask("svc@twin.example").await;
    assert_eq!((first.standing().len(), second.standing().len()), (0, 1));
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

/// A registry must not lead us to a socket of our own node.
#[tokio::test]
async fn a_socket_in_a_foreign_registry_is_not_dialled() {
    let (world, floating) = with_floating_domain().await;
    let [a, _] = world.agents();
    let victim = world.endpoint(a, "victim", "private").await;
    let mut trap = registration(&victim, "svc", &[]);
    trap.name = "trap".to_owned();
    let registry = floating.registry.as_ref().expect("a domain");
    registry
        .endpoints
        .register(trap, std::time::SystemTime::now(), &[])
        .expect("registered");
    let before = world.held();
    let client = Client::on_node(a).await;
    let status = client
        .refused(client.request_for("svc@floating.example"))
        .await;
    assert_eq!(status.code(), tonic::Code::NotFound, "{status:?}");
    // Neither for one who asks us as a proxy.
    let network = Client::over_network(a).await;
    let found = network.find("svc@floating.example").await.expect("found");
    assert_eq!(found[0].url, a.url);
    let mut request = network.request_for("svc@floating.example");
    let connection = request.connection.as_mut().expect("a connection");
    connection.network_service_endpoint_name = found[0].name.clone();
    request.mechanism_preferences = vec![mechanism("REMOTE", "VXLAN", &[("src_ip", "192.0.2.50")])];
    network.refused(request).await;
    assert!(victim.requests().is_empty());
    world.settles(&before).await;
}

#[tokio::test]
async fn our_own_address_is_our_own_domain() {
    let world = World::of([client_side()]).await;
    let [a] = world.agents();
    world.endpoint(a, "nse-1", "svc").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client.ask(&format!("svc@{}", a.address)).await;
    assert_eq!(
        granted.connection.network_service_endpoint_name,
        format!("nse-1@{}", a.address)
    );
    assert!(matches!(a.kernel().only().plan, Plan::Pair { .. }));
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

/// Two nodes of one domain share the registry of the first; a third agent is another domain.
#[tokio::test]
async fn nodes_of_one_domain_share_a_registry() {
    let world = World::of([
        endpoint_side(),
        Setup::new("agent-3", "cluster-2.example", "192.0.2.3").sharing_the_registry(),
        client_side(),
    ])
    .await;
    let [gate, node, a] = world.agents();
    let near = world.endpoint(gate, "near", "svc").await;
    let far = world.endpoint(node, "far", "svc").await;
    assert_eq!(gate.registry.counts().endpoints, 2);
    let before = world.held();

    // Inside the domain.
    let inside = Client::on_node(node).await;
    for (endpoint, path) in [
        ("near", vec![inside.name(), "agent-3", "agent-2", "near"]),
        ("far", vec![inside.name(), "agent-3", "far"]),
    ] {
        let mut request = inside.request_for("svc");
        let connection = request.connection.as_mut().expect("a connection");
        endpoint.clone_into(&mut connection.network_service_endpoint_name);
        let granted = inside.send(request).await.expect("granted");
        assert_eq!(names(&granted.connection), path);
        assert_eq!(granted.connection.network_service_endpoint_name, endpoint);
        inside.close(&granted.connection).await.expect("closed");
        world.settles(&before).await;
    }

    // From outside by the gate, first to its own pod, then, on a refresh, through it to the other
    // node's and back: each time the tunnel moves, and no link stays behind.
    let outside = Client::on_node(a).await;
    let mut request = outside.request_for("svc@cluster-2.example");
    for (round, (endpoint, serving, idle)) in
        [(&near, gate, node), (&far, node, gate), (&near, gate, node)]
            .into_iter()
            .enumerate()
    {
        let connection = request.connection.as_mut().expect("a connection");
        connection.network_service_endpoint_name = format!("{}@cluster-2.example", endpoint.name);
        let granted = outside
            .send(request)
            .await
            .unwrap_or_else(|status| panic!("round {round}: {status:?}"));
        assert_eq!(
            a.kernel().only().tunnel,
            serving.kernel().only().tunnel,
            "round {round}"
        );
        eventually(0, || idle.kernel().links().len()).await;
        assert_eq!(idle.plane.holdings().vnis, 0, "round {round}");
        request = NetworkServiceRequest {
            connection: Some(granted.connection),
            mechanism_preferences: Vec::new(),
        };
    }
    let connection = request.connection.expect("a connection");
    outside.close(&connection).await.expect("closed");
    world.settles(&before).await;
}

/// An agent without forwarder between an NSMgr of its domain and another domain: what it taught by
/// Find it passes on, names and mechanisms as they are, addresses swapped.
#[tokio::test]
async fn a_proxy_passes_on_what_it_has_found() {
    let world = World::of([client_side().without_forwarder(), endpoint_side()]).await;
    let [proxy, b] = world.agents();
    proxy.plane.set_ip_map(map("10.0.0.7", "203.0.113.7"));
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    Client::on_node(b)
        .await
        .register_service(nsm_proto::registry::NetworkService {
            name: "icmp-responder".to_owned(),
            ..Default::default()
        })
        .await
        .expect("registered");
    let before = world.held();
    let nsmgr = Client::over_network(proxy).await;

    let service = "icmp-responder@cluster-2.example";
    let found = nsmgr.find_service(service).await.expect("found");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, service);
    let found = nsmgr.find(service).await.expect("found");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, "nse-1@cluster-2.example");
    assert_eq!(found[0].network_service_names, [service]);
    assert_eq!(found[0].url, proxy.url, "the Request comes to the proxy");

    // Domains are the same however they are written.
    for name in ["nse-1@cluster-2.example", "nse-1@CLUSTER-2.example"] {
        let mut request = nsmgr.request_for(service);
        let connection = request.connection.as_mut().expect("a connection");
        name.clone_into(&mut connection.network_service_endpoint_name);
        request.mechanism_preferences = vec![mechanism(
            "REMOTE",
            "VXLAN",
            &[("src_ip", "10.0.0.7"), ("of_another_release", "kept")],
        )];
        let mut granted = nsmgr.send(request).await.expect("granted");
        for _ in 0..2 {
            let connection = &granted.connection;
            assert_eq!(
                names(connection),
                [nsmgr.name(), "agent-1", "agent-2", "nse-1"]
            );
            assert_eq!(connection.network_service, service);
            assert_eq!(connection.network_service_endpoint_name, name);
            assert_eq!(parameter(connection, "src_ip"), "10.0.0.7");
            assert_eq!(parameter(connection, "dst_ip"), "192.0.2.2");
            assert_eq!(parameter(connection, "of_another_release"), "kept");
            let Plan::Vxlan { spec, .. } = b.kernel().only().plan else {
                panic!("a tunnel");
            };
            assert_eq!(spec.remote.to_string(), "203.0.113.7");
            assert_eq!(parameter(connection, "vni"), spec.vni.to_string());
            assert_eq!(proxy.plane.holdings().vnis, 0);
            granted = nsmgr.refresh(&granted).await.expect("refreshed");
        }
        nsmgr.close(&granted.connection).await.expect("closed");
        world.settles(&before).await;
    }
    assert_eq!(endpoint.closes().len(), 2);
    // One that it has not heard of is looked for here, and is not here.
    let mut request = nsmgr.request_for("other@cluster-2.example");
    request.mechanism_preferences = vec![mechanism("REMOTE", "VXLAN", &[("src_ip", "10.0.0.7")])];
    let status = nsmgr.refused(request).await;
    assert_eq!(status.code(), tonic::Code::NotFound, "{status:?}");
    world.settles(&before).await;
}

/// An agent that has just started does not tell others of an address that they cannot reach.
#[tokio::test]
async fn what_others_are_told_waits_for_the_public_address() {
    let world = World::of([
        Setup::new("agent-1", "cluster-1.example", "10.0.0.1"),
        Setup::new("agent-2", "cluster-2.example", "10.0.0.2"),
    ])
    .await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let mut remotes = Vec::new();
    for (agent, from, to) in [
        (b, "10.0.0.2", "203.0.113.2"),
        (a, "10.0.0.1", "203.0.113.1"),
    ] {
        agent.plane.set_public_address_known(false);
        let learn = async {
            eventually(1, || agent.plane.holdings().connections).await;
            assert!(agent.kernel().links().is_empty());
            agent.plane.set_ip_map(map(from, to));
            agent.plane.set_public_address_known(true);
        };
        let (granted, ()) = tokio::join!(client.ask("icmp-responder@cluster-2.example"), learn);
        let Plan::Vxlan { spec, .. } = a.kernel().only().plan else {
            unreachable!("the endpoint is on another node")
        };
        assert_eq!(spec.remote.to_string(), "203.0.113.2");
        let Plan::Vxlan { spec, .. } = b.kernel().only().plan else {
            unreachable!("the client is on another node")
        };
        remotes.push(spec.remote.to_string());
        client.close(&granted.connection).await.expect("closed");
    }
    assert_eq!(remotes, ["10.0.0.1", "203.0.113.1"]);
}
