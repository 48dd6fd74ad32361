//! Many connections through one peer.

use std::collections::BTreeSet;

use nsm_proto::connection::{ConnectionEventType::*, State};

use crate::support::{
    Client, SERVICE, Setup, Watch, Wire, World, client_side, endpoint_side, eventually,
};

/// What the peer says of all of them is much more than one message may be.
#[tokio::test]
async fn a_thousand_connections_come_back_with_the_first_refresh() {
    // More than a monitor may lag behind, were each an event.
    const MANY: usize = 1100;
    let room = |setup: Setup| setup.max_connections(MANY);
    let world = World::of([room(client_side()), room(endpoint_side())]).await;
    let [a, b] = world.agents();
    let wire = Wire::to(b.address).await;
    b.plane.set_public_url(Some(wire.url.clone()));
    world.publish("cluster-2.example", &wire.url);
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    for _ in 1..MANY {
        client.ask(SERVICE).await;
    }
    let up = || {
        let connections = a.plane.connections();
        let up = connections
            .iter()
            .filter(|it| it.connection().state() == State::Up);
        up.count()
    };
    assert_eq!(up(), MANY);
    eventually(1, || b.plane.holdings().monitors).await;
    let mut follower = client.monitor().await;
    wire.cut();
    eventually(0, up).await;
    // Who follows all of them from hop to hop is not cut off by the news.
    heard_of(&mut follower, MANY, State::Down).await;
    client.refresh(&granted).await.expect("refreshed");
    eventually(MANY, up).await;
    heard_of(&mut follower, MANY, State::Up).await;

    // Who asks for all of them hears of all of them.
    let mut watch = client.monitor().await;
    let first = watch.next().await;
    assert_eq!(first.r#type(), InitialStateTransfer);
    let mut told = first.connections;
    while told.len() < MANY {
        let event = watch.next().await;
        assert_eq!(event.r#type(), Update);
        told.extend(event.connections);
    }
    assert!(told.values().all(|it| it.state() == State::Up));
}

/// Reads until so many connections have been told in this state.
async fn heard_of(follower: &mut Watch, count: usize, state: State) {
    let mut heard = BTreeSet::new();
    while heard.len() < count {
        let told = follower.next().await.connections;
        let told = told.into_iter().filter(|(_, it)| it.state() == state);
        heard.extend(told.map(|(id, _)| id));
    }
}
