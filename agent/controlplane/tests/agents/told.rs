//! What the agent at the other end of a tunnel says of the path, and that it comes to this node's prober.

use std::collections::BTreeMap;

use nsm_core::liveness::Verdict::{self, Down, Up};
use nsm_proto::connection::{
    Connection, ConnectionEvent,
    ConnectionEventType::{self, Delete, Update},
};

use crate::support::{
    Client, Connected, Path, SERVICE, Setup, World, client_side, endpoint_side, eventually,
};

const NEAR: &str = "192.0.2.1";
const FAR: &str = "192.0.2.2";
const NONE: [(Verdict, Verdict); 0] = [];

#[tokio::test]
async fn each_connection_brings_the_far_sides_word() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = [client.ask(SERVICE).await, client.ask(SERVICE).await];
    let words = || a.kernel().paths().words(FAR);
    // With the answer, before any event.
    assert_eq!(words(), [(Up, Up); 2]);
    for (path, word) in [
        (Path::DownOutwards, (Up, Down)),
        (Path::Down, (Down, Down)),
        (Path::Up, (Up, Up)),
    ] {
        b.kernel().paths().set(NEAR, path);
        eventually(vec![word; 2], words).await;
    }
    client.close(&granted[0].connection).await.expect("closed");
    assert_eq!(words(), [(Up, Up)]);
    // A refresh brings what is so by then.
    b.kernel().paths().set(NEAR, Path::DownOutwards);
    client.refresh(&granted[1]).await.expect("refreshed");
    assert_eq!(words(), [(Up, Down)]);
    // The server's end has its peer above and hears of it by Requests only.
    assert_eq!(b.kernel().paths().words(NEAR), NONE);
    client.close(&granted[1].connection).await.expect("closed");
    assert_eq!(words(), NONE);
    b.kernel().paths().set(NEAR, Path::Up);
    world.settles(&before).await;
}

#[tokio::test]
async fn a_word_ends_with_the_stream_that_brought_it() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let words = || a.kernel().paths().words(FAR);
    assert_eq!(words(), [(Up, Up)]);
    eventually(1, || b.plane.holdings().monitors).await;
    b.kill();
    eventually(NONE.to_vec(), words).await;
    client.close(&granted.connection).await.expect("closed");
}

#[tokio::test]
async fn a_peer_that_publishes_nothing_says_nothing() {
    let world = World::of([client_side(), endpoint_side().without_prober()]).await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    assert_eq!(a.kernel().paths().words(FAR), NONE);
    client.close(&granted.connection).await.expect("closed");
}

/// A gate of the endpoint's domain without tunnels of its own: the word is that of the node behind it, as long as the gate hears that.
#[tokio::test]
async fn a_hop_between_passes_the_word_on() {
    let gate = endpoint_side().without_forwarder();
    let third = Setup::new("agent-3", "cluster-2.example", "192.0.2.3");
    let world = World::of([gate, third.sharing_the_registry(), client_side()]).await;
    let [_, c, a] = world.agents();
    world.endpoint(c, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    let words = || a.kernel().paths().words("192.0.2.3");
    assert_eq!(words(), [(Up, Up)]);
    c.kernel().paths().set(NEAR, Path::DownOutwards);
    eventually(vec![(Up, Down)], words).await;
    c.kernel().paths().set(NEAR, Path::Up);
    eventually(vec![(Up, Up)], words).await;
    c.kill();
    eventually(NONE.to_vec(), words).await;
    client.close(&granted.connection).await.expect("closed");
}

/// A stranger's words are read as ours are, are withdrawn with its stream or its connection, and are none when they are no health.
#[tokio::test]
async fn a_strangers_word_is_read_and_withdrawn() {
    let world = World::of([client_side()]).await;
    let [a] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    peer.twist(|mut it| {
        let mechanism = it.mechanism.as_mut().expect("a mechanism");
        for (key, value) in [("sbfd_discriminator_dst", "77"), ("sbfd_vni", "1")] {
            mechanism
                .parameters
                .insert(key.to_owned(), value.to_owned());
        }
        Ok(it)
    });
    let client = Client::on_node(a).await;
    let mut granted = client.ask("svc@peer.example").await;
    let paths = a.kernel().paths();
    let remotes: Vec<_> = paths.watched().into_keys().collect();
    let [remote] = remotes[..] else {
        panic!("{remotes:?}");
    };
    let words = || paths.words(&remote.to_string());
    assert_eq!(words(), NONE);
    for _ in 0..2 {
        eventually(1, || peer.monitors()).await;
        for (state_in, expected) in [
            ("up", vec![(Up, Down)]),
            ("perhaps", vec![]),
            ("down", vec![(Down, Down)]),
        ] {
            peer.tell(says(&granted.connection, state_in, Update)).await;
            eventually(expected, words).await;
        }
        peer.end_monitors();
        eventually(NONE.to_vec(), words).await;
        granted = client.refresh(&granted).await.expect("refreshed");
    }
    eventually(1, || peer.monitors()).await;
    peer.tell(says(&granted.connection, "up", Update)).await;
    eventually(vec![(Up, Down)], words).await;
    peer.tell(says(&granted.connection, "up", Delete)).await;
    eventually(NONE.to_vec(), words).await;
    client.close(&granted.connection).await.expect("closed");
}

/// The last hop's event that its way in is so, and its way out is down.
fn says(connection: &Connection, state_in: &str, kind: ConnectionEventType) -> ConnectionEvent {
    let mut told = connection.clone();
    let path = told.path.as_mut().expect("a path");
    path.index = 2;
    path.path_segments[2].metrics = BTreeMap::from([
        ("sbfd_state_in".to_owned(), state_in.to_owned()),
        ("sbfd_state_out".to_owned(), "down".to_owned()),
    ]);
    ConnectionEvent {
        r#type: kind.into(),
        connections: [(told.id.clone(), told)].into(),
    }
}
