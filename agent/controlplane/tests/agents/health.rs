//! Paths: proved before a connection is granted, watched while it stands, and what its ends are told.

mod lost_path;

use nsm_controlplane::{liveness::Reachability, ports::Plan};
use nsm_core::liveness::{Published, Verdict};
use nsm_proto::{
    connection::{Connection, ConnectionEventType::*, State},
    networkservice::NetworkServiceRequest,
};
use tonic::Code;

use crate::support::{
    Agent, Client, Connected, Path, SERVICE, Setup, Watch, World, assert_refusal, client_side,
    endpoint_side, eventually, parameter,
};

const NEAR: &str = "192.0.2.1";
const FAR: &str = "192.0.2.2";
const THIRD: &str = "192.0.2.3";

/// Another node of the endpoint's domain.
fn third() -> Setup {
    Setup::new("agent-3", "cluster-2.example", THIRD)
}

/// Health as the hop of this name says it.
fn told(connection: &Connection, hop: &str) -> Published {
    let path = connection.path.as_ref().expect("a path");
    let segment = path.path_segments.iter().find(|it| it.name == hop);
    Published::read(&segment.expect("the hop").metrics)
}

fn mtu(agent: &Agent) -> u32 {
    match agent.kernel().only().plan {
        Plan::Vxlan { spec, .. } => spec.link.mtu,
        Plan::Pair { .. } => panic!("a tunnel"),
    }
}

fn remote(agent: &Agent) -> String {
    match agent.kernel().only().plan {
        Plan::Vxlan { spec, .. } => spec.remote.to_string(),
        Plan::Pair { .. } => panic!("a tunnel"),
    }
}

/// The next event that tells this state of every one of `count` connections, in however many messages.
async fn all_told(watch: &mut Watch, count: usize, state: State) -> Vec<Connection> {
    let found = watch.updates(count).await;
    for connection in &found {
        assert_eq!(connection.state(), state, "{connection:?}");
    }
    found
}

/// What a client asks for whose path is lost.
#[tokio::test]
async fn both_ends_know_each_others_reflector_and_the_clients_proves_the_path() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let (near, far) = (a.kernel().paths(), b.kernel().paths());
    let known = near.peer(FAR).expect("watched");
    assert_eq!(
        known.path.reflector,
        nsm_controlplane::ports::Prober::reflector(far)
    );
    assert_eq!((known.path.port, known.mtu), (4789, 1450));
    let known = far.peer(NEAR).expect("watched");
    assert_eq!(
        known.path.reflector,
        nsm_controlplane::ports::Prober::reflector(near)
    );
    assert_eq!(near.proofs(), [known_address(FAR)]);
    assert!(far.proofs().is_empty());
    for hop in ["agent-1", "agent-2"] {
        assert_eq!(told(&granted.connection, hop).outward, Some(Verdict::Up));
    }
    // One session for all connections, as long as there is one.
    let other = client.ask(SERVICE).await;
    client.refresh(granted).await.expect("refreshed");
    assert_eq!(near.proofs().len(), 2, "a refresh proves nothing again");
    assert_eq!(near.watched()[&known_address(FAR)].len(), 2);
    client.close(&granted.connection).await.expect("closed");
    assert_eq!(near.watched()[&known_address(FAR)].len(), 1);
    client.close(&other.connection).await.expect("closed");
    it.settles().await;
}

fn known_address(text: &str) -> std::net::IpAddr {
    text.parse().expect("an address")
}

#[tokio::test]
async fn an_unproved_path_is_refused_where_proof_is_required() {
    let near = client_side().reachability(Reachability::Require);
    let world = World::of([near, endpoint_side()]).await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    a.kernel().paths().set(FAR, Path::Down);
    let client = Client::on_node(a).await;
    let refused = client.refused(client.request_for(SERVICE)).await;
    assert_refusal(
        &refused,
        Code::Unavailable,
        &[
            FAR,
            "UDP 4789",
            "none was answered for 130 ms",
            "reachability: require",
        ],
    );
    eventually(1, || endpoint.closes().len()).await;
    world.settles(&before).await;
    // And granted as soon as it is good.
    a.kernel().paths().set(FAR, Path::Up);
    let granted = client.ask(SERVICE).await;
    // A refresh of what stands is no new path: it goes on, and is told to be down.
    a.kernel().paths().set(FAR, Path::Down);
    eventually(true, || {
        a.plane.connections()[0]
            .health()
            .is_some_and(|it| it.is_down())
    })
    .await;
    let again = client.refresh(&granted).await.expect("refreshed");
    assert!(told(&again.connection, "agent-1").is_down());
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

/// The session may end, or the prober, while a proof is waited for.
#[tokio::test]
async fn a_prober_without_an_answer_proves_nothing() {
    let require = client_side().reachability(Reachability::Require);
    for (near, is_granted) in [(client_side(), true), (require, false)] {
        let world = World::of([near, endpoint_side()]).await;
        let [a, b] = world.agents();
        world.endpoint(b, "nse-1", "icmp-responder").await;
        let before = world.held();
        a.kernel().paths().set(FAR, Path::Unanswerable);
        let client = Client::on_node(a).await;
        if is_granted {
            let granted = client.ask(SERVICE).await;
            client.close(&granted.connection).await.expect("closed");
        } else {
            let refused = client.refused(client.request_for(SERVICE)).await;
            assert_refusal(
                &refused,
                Code::Unavailable,
                &[FAR, "sends no probes", "reachability: require"],
            );
        }
        world.settles(&before).await;
    }
}

#[tokio::test]
async fn an_unproved_path_is_told_where_proof_is_preferred() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    a.kernel().paths().set(FAR, Path::Down);
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    assert_eq!(granted.connection.state(), State::Up);
    let health = told(&granted.connection, "agent-1");
    assert!(health.is_down());
    assert!(
        health
            .reason
            .is_some_and(|reason| reason.contains("UDP 4789"))
    );
    // Whoever listens is not told DOWN of what it was granted so, but of the next loss.
    let mut watch = client.monitor().await;
    assert_eq!(watch.one(InitialStateTransfer).await.state(), State::Up);
    a.kernel().paths().set(FAR, Path::Up);
    let up = watch.one(Update).await;
    assert_eq!(told(&up, "agent-1").outward, Some(Verdict::Up));
    a.kernel().paths().set(FAR, Path::Down);
    assert_eq!(watch.one(Update).await.state(), State::Down);
    client.close(&granted.connection).await.expect("closed");
    drop(watch);
    world.settles(&before).await;
}

#[tokio::test]
async fn a_peer_without_reflector_is_unverified() {
    let require = client_side().reachability(Reachability::Require);
    for (near, is_granted) in [(client_side(), true), (require, false)] {
        let world = World::of([near, endpoint_side().without_prober()]).await;
        let [a, b] = world.agents();
        world.endpoint(b, "nse-1", "icmp-responder").await;
        let before = world.held();
        let client = Client::on_node(a).await;
        if is_granted {
            let granted = client.ask(SERVICE).await;
            let health = told(&granted.connection, "agent-1");
            assert_eq!(health.outward, Some(Verdict::Unverified));
            assert!(
                health
                    .reason
                    .is_some_and(|it| it.contains("no S-BFD reflector"))
            );
            assert_eq!(told(&granted.connection, "agent-2"), Published::default());
            client.close(&granted.connection).await.expect("closed");
        } else {
            let refused = client.refused(client.request_for(SERVICE)).await;
            assert_refusal(&refused, Code::Unavailable, &["offers no S-BFD reflector"]);
        }
        assert!(a.kernel().paths().proofs().is_empty());
        world.settles(&before).await;
    }
}

#[tokio::test]
async fn a_policy_of_off_probes_nothing_and_offers_nothing() {
    let far = endpoint_side().reachability(Reachability::Off);
    let world = World::of([client_side().reachability(Reachability::Off), far]).await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    for hop in ["agent-1", "agent-2"] {
        assert_eq!(told(&granted.connection, hop), Published::default());
    }
    for agent in [a, b] {
        assert!(agent.kernel().watched().is_empty());
        assert!(agent.kernel().paths().proofs().is_empty());
    }
    drop(endpoint);
}

/// A prober that can take no more peers is no reason to refuse.
#[tokio::test]
async fn a_path_that_cannot_be_watched_is_granted_unverified() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    a.kernel().paths().refuse();
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    let health = told(&granted.connection, "agent-1");
    assert_eq!(health.outward, Some(Verdict::Unverified));
}

#[tokio::test]
async fn what_becomes_of_a_path_is_told_of_every_connection_on_it() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let mut granted = Vec::new();
    for _ in 0..40 {
        granted.push(client.ask(SERVICE).await);
    }
    let mut watch = client.monitor().await;
    let mut standing = 0;
    while standing < 40 {
        standing += watch.next().await.connections.len();
    }
    for _ in 0..2 {
        a.kernel().paths().set(FAR, Path::Down);
        for connection in all_told(&mut watch, 40, State::Down).await {
            let health = told(&connection, "agent-1");
            assert!(health.is_down());
            assert!(health.reason.is_some_and(|reason| reason.contains(FAR)));
        }
        a.kernel().paths().set(FAR, Path::Up);
        all_told(&mut watch, 40, State::Up).await;
    }
    // A path that nobody takes is nobody's business.
    a.kernel().paths().set(THIRD, Path::Down);
    for one in &granted {
        client.close(&one.connection).await.expect("closed");
    }
    drop(watch);
    world.settles(&before).await;
}

/// The far side's word and our own: a connection is UP when both say so.
#[tokio::test]
async fn the_far_side_tells_what_it_sees() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let mut watch = client.watch().await;
    b.kernel().paths().set(NEAR, Path::Down);
    let down = watch.one(Update).await;
    assert_eq!(down.state(), State::Down);
    assert!(told(&down, "agent-2").is_down() && !told(&down, "agent-1").is_down());
    a.kernel().paths().set(FAR, Path::Down);
    let down = watch.one(Update).await;
    assert!(told(&down, "agent-2").is_down() && told(&down, "agent-1").is_down());
    b.kernel().paths().set(NEAR, Path::Up);
    assert_eq!(
        watch.one(Update).await.state(),
        State::Down,
        "our own path is down"
    );
    a.kernel().paths().set(FAR, Path::Up);
    assert_eq!(watch.one(Update).await.state(), State::Up);
    client.close(&granted.connection).await.expect("closed");
}

/// The peer sees packets of our VNI and has no tunnel for them: it says so, and the connection is DOWN until it is asked for again.
#[tokio::test]
async fn a_vni_that_the_peer_lacks_is_told_to_who_sends_with_it() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let hit = client.ask(SERVICE).await;
    let spared = client.ask(SERVICE).await;
    let mut watch = client.monitor().await;
    watch.next().await;
    let (vni, _) = a
        .kernel()
        .links()
        .values()
        .next()
        .and_then(|it| it.tunnel)
        .expect("a tunnel");
    b.kernel().paths().see_foreign(NEAR, vni);
    let mut down = 0;
    // Both are told of, for the news is the peer's; one of them has that VNI.
    for connection in watch.updates(2).await {
        let health = told(&connection, "agent-1");
        if connection.state() == State::Down {
            down += 1;
            let words = format!("VNI {vni}");
            assert!(health.reason.is_some_and(|reason| reason.contains(&words)));
        }
    }
    assert_eq!(down, 1);
    // Seen again it is no news; asked for again it is mended.
    b.kernel().paths().see_foreign(NEAR, vni);
    for granted in [&hit, &spared] {
        let again = client.refresh(granted).await.expect("refreshed");
        assert_eq!(again.connection.state(), State::Up);
    }
    eventually(true, || {
        a.plane
            .connections()
            .iter()
            .all(|it| it.connection().state() == State::Up)
    })
    .await;
    for granted in [&hit, &spared] {
        client.close(&granted.connection).await.expect("closed");
    }
    drop(watch);
    world.settles(&before).await;
}

/// The last packets of a connection that was closed are nobody's fault; what goes on being sent without a tunnel is told until it ends.
#[tokio::test]
async fn a_closed_tunnels_last_packets_are_not_told() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let closed = client.ask(SERVICE).await;
    let vni: u32 = closed.fact("nsm-vni").parse().expect("a VNI");
    let granted = client.ask(SERVICE).await;
    client.close(&closed.connection).await.expect("closed");
    let mut watch = client.watch().await;
    // Events come in order: had the first been told, it would be heard of first.
    b.kernel().paths().see_foreign(NEAR, vni);
    let other = if vni == 8000 { 8002 } else { 8000 };
    b.kernel().paths().see_foreign(NEAR, other);
    let told_of = |connection: &Connection| {
        let foreign = told(connection, "agent-2").foreign;
        [vni, other].map(|it| foreign.contains(it.try_into().expect("a VNI")))
    };
    assert_eq!(told_of(&watch.one(Update).await), [false, true]);
    assert_eq!(told_of(&watch.one(Update).await), [false; 2], "it is over");
    client.close(&granted.connection).await.expect("closed");
    drop(watch);
    world.settles(&before).await;
}

#[tokio::test]
async fn the_mtu_follows_the_path_at_both_ends() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    assert_eq!((mtu(a), mtu(b)), (1450, 1450));
    let mut watch = client.watch().await;
    a.kernel().paths().set_mtu(FAR, 1230);
    // First that the path is narrow, then that the link is.
    let mut context = watch.one(Update).await.context.expect("a context");
    while context.mtu != 1230 {
        context = watch.one(Update).await.context.expect("a context");
    }
    assert_eq!(mtu(a), 1230);
    b.kernel().paths().set_mtu(NEAR, 1230);
    eventually(1230, || mtu(b)).await;
    // A refresh keeps what the path carries; a new connection has it from the start.
    let again = client.refresh(granted).await.expect("refreshed");
    assert_eq!(
        again.connection.context.as_ref().map(|it| it.mtu),
        Some(1230)
    );
    let other = client.ask(SERVICE).await;
    assert_eq!(
        other.connection.context.as_ref().map(|it| it.mtu),
        Some(1230)
    );
    client.close(&other.connection).await.expect("closed");
    eventually(1, || b.kernel().links().len()).await;
    // And it grows back to what was agreed, also after the client refreshed with less.
    let refreshed = client.refresh(&again).await.expect("refreshed");
    for (agent, peer) in [(b, NEAR), (a, FAR)] {
        agent.kernel().paths().set_mtu(peer, 1450);
        eventually(1450, || mtu(agent)).await;
    }
    client.close(&refreshed.connection).await.expect("closed");
    drop(watch);
    it.settles().await;
}
