//! Agents on the path that die: which state the others publish, what stays in place, and how the connection is repaired.

use std::time::Duration;

use nsm_core::liveness::{LostHop, Published};
use nsm_proto::{
    connection::{Connection, ConnectionEvent, ConnectionEventType::*, PathSegment, State},
    networkservice::NetworkServiceRequest,
};
use tonic::Code;

use crate::support::{
    Agent, Client, Connected, SERVICE, Setup, Watch, World, assert_refusal, client_side,
    endpoint_side, eventually, registration,
};

impl Connected {
    /// The client's monitor stream after its first event, once agent 1 monitors agent 2; and that event.
    async fn watched(&self) -> (Watch, Connection) {
        let [_, b] = self.world.agents();
        let mut watch = self.client.monitor().await;
        let before = watch.one(InitialStateTransfer).await;
        eventually(1, || b.plane.holdings().monitors).await;
        (watch, before)
    }

    /// The next life of the killed agent 2, at which the endpoint has registered again.
    async fn register_again(&self, b: &Agent) {
        Client::on_node(b)
            .await
            .offer(registration(&self.endpoint, "icmp-responder", &[]))
            .await
            .expect("registered again");
    }
}

/// The client's domain, and a domain of an agent with the registry and of others that share it, in this order: the registry's,
/// the others, the client's.
async fn behind_a_gate(others: &[u8]) -> World {
    let sharing = |number: &u8| {
        let (name, ip) = (format!("agent-{number}"), format!("192.0.2.{number}"));
        Setup::new(&name, "cluster-2.example", &ip).sharing_the_registry()
    };
    let setups = [endpoint_side()].into_iter();
    World::of(
        setups
            .chain(others.iter().map(sharing))
            .chain([client_side()]),
    )
    .await
}

fn segment<'a>(connection: &'a Connection, hop: &str) -> &'a PathSegment {
    let path = connection.path.as_ref().expect("a path");
    let mut segments = path.path_segments.iter();
    segments.find(|it| it.name == hop).expect("the hop")
}

fn lost(connection: &Connection, hop: &str) -> Option<String> {
    Some(
        LostHop::read(&segment(connection, hop).metrics)?
            .reason
            .to_string(),
    )
}

fn with_name(mut request: NetworkServiceRequest, client: &Client) -> NetworkServiceRequest {
    request.mechanism_preferences = vec![client.kernel("nsm-1")];
    request
}

fn state(agent: &Agent) -> State {
    agent.plane.connections()[0].connection().state()
}

/// The far agent is killed and started again: links, VNIs and the connection stay.
#[tokio::test]
async fn a_killed_agent_is_published_and_its_next_life_takes_over_what_stands() {
    let connected = Connected::new().await;
    let [a, b] = connected.world.agents();
    let (link, far_link) = (a.kernel().only(), b.kernel().only());
    let changes = (a.kernel().changes(), b.kernel().changes());
    let (mut watch, before) = connected.watched().await;
    assert_eq!(lost(&before, "agent-1"), None);
    let Connected {
        client,
        granted,
        endpoint,
        ..
    } = &connected;
    b.kill();
    let down = watch.one(Update).await;
    assert_eq!(down.state(), State::Down);
    let reason = lost(&down, "agent-1").expect("it is published");
    assert!(
        reason.contains(&b.url) && reason.contains("not heard"),
        "{reason}"
    );
    for hop in ["agent-2", "nse-1"] {
        assert_eq!(segment(&down, hop).metrics, segment(&before, hop).metrics);
    }
    assert!(!Published::read(&segment(&down, "agent-1").metrics).is_down());
    let shown = a
        .plane
        .down_reason(&a.plane.connections()[0])
        .expect("it is down");
    let shown = shown.to_string();
    assert!(
        shown.contains(&reason) && shown.contains("the path is good"),
        "{shown}"
    );

    // No agent answers; then the agent does not have the endpoint yet. Neither changes a link.
    let refused = client.refresh(granted).await.expect_err("nobody is there");
    assert_refusal(&refused, Code::Unavailable, &[&b.url]);
    let b = b.start_again().await;
    // The failed dial may be the answer once more before the next one.
    let refused = loop {
        let refused = client.refresh(granted).await.expect_err("not registered");
        if refused.code() != Code::Unavailable {
            break refused;
        }
    };
    assert_refusal(&refused, Code::NotFound, &["nse-1"]);
    assert_eq!(a.kernel().only(), link);
    assert_eq!((a.kernel().changes(), b.kernel().changes()), changes);
    assert_eq!(a.plane.holdings().vnis, 1);
    assert_eq!(state(a), State::Down);

    connected.register_again(&b).await;
    let again = client.refresh(granted).await.expect("it is back");
    assert_eq!(again.connection.state(), State::Up);
    let up = watch.one(Update).await;
    assert_eq!((up.state(), lost(&up, "agent-1")), (State::Up, None));
    assert_eq!(a.plane.down_reason(&a.plane.connections()[0]), None);
    assert_eq!(again.fact("nsm-vni"), granted.fact("nsm-vni"));
    assert_eq!(a.kernel().only().tunnel, link.tunnel);
    assert_eq!(b.kernel().only().tunnel, far_link.tunnel);
    assert_eq!(b.kernel().only().names, far_link.names);
    let ((ups, downs), (far_ups, far_downs)) = changes;
    assert_eq!(
        a.kernel().changes(),
        (ups + 1, downs),
        "nothing is replaced"
    );
    assert_eq!(b.kernel().changes(), (far_ups + 1, far_downs));
    assert_eq!((endpoint.standing().len(), endpoint.closes().len()), (1, 0));

    client.close(&again.connection).await.expect("closed");
    watch.one(Delete).await;
    drop(watch);
    for agent in [a, &b] {
        eventually((0, 0, 0, 0), || {
            let holdings = agent.plane.holdings();
            let links = agent.kernel().links().len();
            (
                holdings.connections,
                holdings.vnis,
                holdings.monitors,
                links,
            )
        })
        .await;
    }
    assert!(endpoint.standing().is_empty());
}

/// The registry lives on and forgets the endpoint of a killed agent: the refusal is Unavailable all the same, not NotFound.
#[tokio::test]
async fn a_killed_agent_is_away_although_the_registry_has_forgotten_its_endpoint() {
    let world = behind_a_gate(&[3]).await;
    let [b, c, a] = world.agents();
    world.endpoint(c, "nse-3", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    let link = a.kernel().only();
    eventually(1, || c.plane.holdings().monitors).await;
    c.kill();
    assert!(b.registry.endpoints.unregister("nse-3"), "it lapses");
    let refused = client.refresh(&granted).await.expect_err("it is away");
    assert_refusal(&refused, Code::Unavailable, &[&c.url]);
    assert_eq!(a.kernel().only(), link);
    // A client without a connection there gets the registry's answer.
    let refused = client.send(client.request_for(SERVICE)).await;
    let refused = refused.expect_err("nobody serves it");
    assert_eq!(refused.code(), Code::NotFound);
    client.close(&granted.connection).await.expect("closed");
}

/// A VNI that the next life of an agent has given away meanwhile is not taken back.
#[tokio::test]
async fn a_vni_that_another_has_meanwhile_is_replaced() {
    let connected = Connected::new().await;
    let [a, b] = connected.world.agents();
    let (client, granted) = (&connected.client, &connected.granted);
    let vni: u32 = granted.fact("nsm-vni").parse().expect("a VNI");
    b.kill();
    let b = b.start_again().await;
    connected.register_again(&b).await;
    b.kernel().forget();
    b.kernel().occupy(vni);
    let again = client.refresh(granted).await.expect("granted");
    assert_ne!(again.fact("nsm-vni"), granted.fact("nsm-vni"));
    assert_eq!(b.kernel().refused_vnis(), [vni]);
    assert_eq!(a.kernel().only().tunnel, b.kernel().only().tunnel);
    client.close(&again.connection).await.expect("closed");
}

/// A Request without an answer extends the connection as well: it ends with the token of the last Request.
#[tokio::test]
async fn a_refresh_in_vain_keeps_what_stands_alive() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let mut client = Client::on_node(a).await;
    client.lifetime = Some(Duration::from_secs(2));
    let kept = client.ask(SERVICE).await;
    let forgotten = client.ask(SERVICE).await;
    let mut watch = client.monitor().await;
    assert_eq!(watch.next().await.connections.len(), 2);
    b.kill();
    client.lifetime = Some(Duration::from_secs(600));
    let refused = client.refresh(&kept).await.expect_err("nobody is there");
    assert_eq!(refused.code(), Code::Unavailable);
    let ended = loop {
        let event = watch.next().await;
        if event.r#type() == Delete {
            break event.connections.into_values().next().expect("one");
        }
    };
    assert_eq!(ended.id, forgotten.agent_id());
    let left = a.plane.connections();
    assert_eq!((left.len(), left[0].id()), (1, kept.agent_id().as_str()));
    assert_eq!(a.kernel().links().len(), 1);
    client.close(&kept.connection).await.expect("closed");
}

/// The loss of the endpoint itself is the endpoint's: no hop that could be waited for is lost.
#[tokio::test]
async fn a_lost_endpoint_is_no_lost_hop() {
    let connected = Connected::new().await;
    let [a, b] = connected.world.agents();
    let endpoint = &connected.endpoint;
    let (mut watch, _) = connected.watched().await;
    eventually(1, || endpoint.monitors()).await;
    endpoint.kill();
    let down = watch.one(Update).await;
    assert_eq!(down.state(), State::Down);
    for hop in ["agent-1", "agent-2"] {
        assert_eq!(lost(&down, hop), None);
    }
    let shown = b.plane.down_reason(&b.plane.connections()[0]);
    assert!(shown.is_some_and(|shown| shown.to_string().contains(&endpoint.url)));
    // Its last state holds, although its agent is lost too.
    b.kill();
    eventually(1, || lost_peers(a)).await;
    assert_eq!(lost(a.plane.connections()[0].connection(), "agent-1"), None);
    let granted = &connected.granted.connection;
    connected.client.close(granted).await.expect("closed");
}

/// An event as the peer sends it.
fn update(connection: &Connection, state: State) -> ConnectionEvent {
    let mut shown = connection.clone();
    shown.path.as_mut().expect("a path").index = 2;
    shown.set_state(state);
    ConnectionEvent {
        r#type: Update.into(),
        connections: [("as they know it".to_owned(), shown)].into(),
    }
}

/// A stream that breaks while the peer lives on: the next Request through the peer opens another, which serves all connections.
#[tokio::test]
async fn a_peer_whose_stream_is_open_again_is_not_lost() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    // An endpoint behind it.
    peer.twist(|mut connection| {
        let path = connection.path.as_mut().expect("a path");
        path.path_segments.push(PathSegment {
            name: "nse".to_owned(),
            id: "behind".to_owned(),
            ..PathSegment::default()
        });
        Ok(connection)
    });
    let before = world.held();
    let client = Client::on_node(a).await;
    let asking = client.ask("svc@peer.example").await;
    let quiet = client.ask("svc@peer.example").await;
    let mut watch = client.monitor().await;
    watch.next().await;
    eventually(1, || peer.monitors()).await;
    peer.end_monitors();
    for down in watch.updates(2).await {
        assert_eq!(down.state(), State::Down);
        assert!(lost(&down, "agent-1").is_some());
    }
    let asking = client.refresh(&asking).await.expect("refreshed");
    let up = watch.one(Update).await;
    assert_eq!((up.state(), up.id), (State::Up, asking.agent_id()));
    eventually(1, || peer.monitors()).await;
    // DOWN by an event of the peer, whose stream is open.
    peer.tell(update(&quiet.connection, State::Down)).await;
    let down = watch.one(Update).await;
    assert_eq!((down.state(), &down.id), (State::Down, &quiet.agent_id()));
    assert_eq!(lost(&down, "agent-1"), None);
    peer.tell(update(&quiet.connection, State::Up)).await;
    assert_eq!(watch.one(Update).await.state(), State::Up);
    for granted in [asking, quiet] {
        client.close(&granted.connection).await.expect("closed");
    }
    drop(watch);
    world.settles(&before).await;
}

/// The client asks for another endpoint in the end: the old tunnel stands until the new one does, whichever agent is lost.
#[tokio::test]
async fn a_lost_agent_is_left_for_another_endpoint() {
    let world = behind_a_gate(&[3, 4]).await;
    let [_, c, d, a] = world.agents();
    world.endpoint(c, "nse-3", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client
        .send(with_name(client.request_for(SERVICE), &client))
        .await
        .expect("granted");
    let mut watch = client.watch().await;
    eventually(1, || c.plane.holdings().monitors).await;
    c.kill();
    let down = watch.one(Update).await;
    // The agent next to the lost one publishes the loss; the stream of ours is open.
    assert!(lost(&down, "agent-2").is_some_and(|reason| reason.contains(&c.url)));
    assert_eq!(lost(&down, "agent-1"), None);
    let shown = a
        .plane
        .down_reason(&a.plane.connections()[0])
        .expect("it is down");
    let shown = shown.to_string();
    assert!(shown.starts_with("agent-2 reports: "), "{shown}");
    // In vain as long as there is no other.
    let link = a.kernel().only();
    let changes = a.kernel().changes();
    let refused = client.send(client.reselect(&granted)).await;
    refused.expect_err("nobody else is there");
    assert_eq!((a.kernel().only(), a.kernel().changes()), (link, changes));

    let other = world.endpoint(d, "nse-4", "icmp-responder").await;
    let again = client
        .send(client.reselect(&granted))
        .await
        .expect("granted");
    assert_eq!(again.agent_id(), granted.agent_id());
    assert_eq!(
        again.connection.network_service_endpoint_name,
        "nse-4@cluster-2.example"
    );
    assert_eq!(state(a), State::Up);
    assert_eq!(a.kernel().only().tunnel, d.kernel().only().tunnel);
    assert_ne!(
        again.fact("nsm-vni"),
        granted.fact("nsm-vni"),
        "another server's choice"
    );
    assert_eq!(other.standing().len(), 1);
    client.close(&again.connection).await.expect("closed");
}

/// How many peers with connections have no monitor stream.
fn lost_peers(agent: &Agent) -> usize {
    let peers = agent.plane.peers().into_iter();
    peers.filter(|peer| !peer.is_monitored).count()
}
