//! What monitors are told, and what a broken stream means.

use nsm_proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType::*, MonitorScopeSelector, State,
};

use crate::support::{
    Client, Connected, Endpoint, SERVICE, World, eventually, names, registration,
};

/// An event as the one who holds the connection at `index` of its path tells it.
fn update(connection: &Connection, index: u32, state: State) -> ConnectionEvent {
    let mut told = connection.clone();
    told.path.as_mut().expect("a path").index = index;
    told.set_state(state);
    ConnectionEvent {
        r#type: Update.into(),
        connections: [("as they know it".to_owned(), told)].into(),
    }
}

#[tokio::test]
async fn a_connection_is_told_from_its_first_to_its_last_moment() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let stranger = Client::on_node(a).await;
    let mut mine = client.monitor().await;
    let mut others = stranger.monitor().await;
    for watch in [&mut mine, &mut others] {
        let first = watch.next().await;
        assert_eq!(first.r#type(), InitialStateTransfer);
        assert!(first.connections.is_empty(), "{first:?}");
    }

    let granted = client.ask(SERVICE).await;
    let told = mine.one(Update).await;
    assert_eq!(told.id, granted.agent_id());
    assert_eq!(told.state(), State::Up);
    assert_eq!(told.network_service, SERVICE);
    assert_eq!(told.mechanism, granted.connection.mechanism);
    assert_eq!(told.path.as_ref().expect("a path").index, 1);

    let mut by_service = client
        .monitor_selected(MonitorScopeSelector {
            network_services: vec![SERVICE.to_owned()],
            ..MonitorScopeSelector::default()
        })
        .await;
    assert_eq!(by_service.one(InitialStateTransfer).await, told);
    let mut by_other = client
        .monitor_selected(MonitorScopeSelector {
            network_services: vec!["other".to_owned()],
            ..MonitorScopeSelector::default()
        })
        .await;
    assert!(by_other.next().await.connections.is_empty());

    client.refresh(&granted).await.expect("refreshed");
    assert_eq!(mine.one(Update).await.id, told.id);
    client.close(&granted.connection).await.expect("closed");
    assert_eq!(mine.one(Delete).await.id, told.id);
    assert_eq!(by_service.one(Update).await.id, told.id);
    assert_eq!(by_service.one(Delete).await.id, told.id);

    // Who never matched has heard of nothing but the next connection of its own.
    let own = stranger.ask(SERVICE).await;
    assert_eq!(others.one(Update).await.id, own.agent_id());
    stranger.close(&own.connection).await.expect("closed");
    drop((mine, others, by_service, by_other));
    world.settles(&before).await;
}

#[tokio::test]
async fn a_broken_stream_is_down_all_the_way_up_until_a_refresh() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let mut granted = client.ask(SERVICE).await;
    let mut watch = client.monitor().await;
    assert_eq!(watch.one(InitialStateTransfer).await.state(), State::Up);
    for _ in 0..2 {
        eventually((1, 1), || {
            (endpoint.monitors(), b.plane.holdings().monitors)
        })
        .await;
        endpoint.end_monitors();
        let told = watch.one(Update).await;
        assert_eq!((told.state(), told.id), (State::Down, granted.agent_id()));
        // Its links stand: traffic may still pass.
        assert_eq!(a.kernel().only().tunnel, b.kernel().only().tunnel);

        granted = client.refresh(&granted).await.expect("refreshed");
        assert_eq!(granted.connection.state(), State::Up);
        assert_eq!(watch.one(Update).await.state(), State::Up);
    }
    endpoint.kill();
    assert_eq!(watch.one(Update).await.state(), State::Down);
    // The endpoint cannot hear of it; everyone else is free of it at once.
    client.close(&granted.connection).await.expect("closed");
    assert_eq!(watch.one(Delete).await.state(), State::Down);
    drop(watch);
    eventually(0, || a.kernel().links().len() + b.kernel().links().len()).await;
    eventually(before.clone(), || {
        // What the dead endpoint believes does not count.
        for id in endpoint.standing() {
            endpoint.forget(&id);
        }
        world.held()
    })
    .await;
}

#[tokio::test]
async fn a_dead_agent_is_down_and_its_connections_close_without_it() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let mut watch = client.watch().await;
    eventually(1, || b.plane.holdings().monitors).await;
    b.kill();
    assert_eq!(watch.one(Update).await.state(), State::Down);
    let refused = client.refresh(granted).await.expect_err("nobody is there");
    assert!(refused.message().contains(&b.url), "{refused:?}");
    client.close(&granted.connection).await.expect("closed");
    watch.one(Delete).await;
    drop(watch);
    eventually((0, 0, 0), || {
        let holdings = a.plane.holdings();
        (holdings.connections, holdings.vnis, holdings.monitors)
    })
    .await;
    assert!(a.kernel().links().is_empty());
    assert_eq!(it.endpoint.closes().len(), 0);
}

#[tokio::test]
async fn an_endpoint_without_monitors_is_served_all_the_same() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let plain = Endpoint::on_node(b.folder.path(), "plain", false).await;
    let plain = world.keep(plain);
    Client::on_node(b)
        .await
        .offer(registration(&plain, "icmp-responder", &[]))
        .await
        .expect("registered");
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    let mut watch = client.monitor().await;
    assert_eq!(watch.one(InitialStateTransfer).await.state(), State::Up);
    client.refresh(&granted).await.expect("refreshed");
    assert_eq!(watch.one(Update).await.state(), State::Up);
    client.close(&granted.connection).await.expect("closed");
    watch.one(Delete).await;
    drop(watch);
    world.settles(&before).await;
}

#[tokio::test]
async fn what_an_endpoint_tells_reaches_the_client() {
    let it = Connected::new().await;
    let ([_, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let mut watch = client.watch().await;
    eventually((1, 1), || {
        (it.endpoint.monitors(), b.plane.holdings().monitors)
    })
    .await;
    for state in [State::Down, State::Up, State::RefreshRequested] {
        it.endpoint
            .tell(update(&granted.connection, 3, state))
            .await;
        assert_eq!(watch.one(Update).await.state(), state);
    }
    let mut gone = update(&granted.connection, 3, State::Up);
    gone.set_type(Delete);
    it.endpoint.tell(gone).await;
    assert_eq!(watch.one(Update).await.state(), State::Down);
    client.close(&granted.connection).await.expect("closed");
    watch.one(Delete).await;
    drop(watch);
    it.settles().await;
}

/// A peer speaks for its own connections only.
#[tokio::test]
async fn a_peer_cannot_speak_of_the_connections_of_another() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let liar = world.foreign_domain("liar.example", "trap").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let honest = client.ask(SERVICE).await;
    let trapped = client.ask("trap@liar.example").await;
    let mut watch = client.monitor().await;
    watch.next().await;
    eventually(1, || liar.monitors()).await;
    liar.tell(update(&honest.connection, 2, State::Down)).await;
    // Nonsense is passed over.
    let mut nonsense = update(&trapped.connection, 9, State::Down);
    liar.tell(nonsense.clone()).await;
    for told in nonsense.connections.values_mut() {
        told.path = None;
    }
    liar.tell(nonsense).await;
    liar.tell(update(&trapped.connection, 2, State::Down)).await;
    let told = watch.one(Update).await;
    assert_eq!((told.state(), told.id), (State::Down, trapped.agent_id()));
    for granted in [honest, trapped] {
        client.close(&granted.connection).await.expect("closed");
    }
    drop(watch);
    world.settles(&before).await;
}

/// A peer may say what is below us on the path, and nothing of what is above.
#[tokio::test]
async fn a_peer_cannot_rewrite_who_came_before() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client.ask("svc@peer.example").await;
    let mut watch = client.watch().await;
    eventually(1, || peer.monitors()).await;
    let mut event = update(&granted.connection, 2, State::Up);
    for told in event.connections.values_mut() {
        let segments = &mut told.path.as_mut().expect("a path").path_segments;
        segments[0].name = "somebody".to_owned();
        segments[0].id = "else".to_owned();
        segments[2].id = "another".to_owned();
        segments.resize_with(200, Default::default);
    }
    peer.tell(event.clone()).await;
    for told in event.connections.values_mut() {
        let segments = &mut told.path.as_mut().expect("a path").path_segments;
        segments.truncate(4);
        segments[3].name = "nse".to_owned();
    }
    peer.tell(event).await;
    let told = watch.one(Update).await;
    let path = told.path.as_ref().expect("a path");
    let ours = granted.connection.path.as_ref().expect("a path");
    assert_eq!(path.path_segments[..2], ours.path_segments[..2]);
    assert_eq!(path.path_segments[2].id, "another");
    assert_eq!(names(&told), [client.name(), "agent-1", "stranger", "nse"]);
    client.close(&granted.connection).await.expect("closed");
    watch.one(Delete).await;
    drop(watch);
    eventually(true, || {
        // It does not know the ids it made up.
        for id in peer.standing() {
            peer.forget(&id);
        }
        world.held() == before
    })
    .await;
}

#[tokio::test]
async fn a_client_that_opens_many_streams_and_vanishes_leaves_none() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let before = world.held();
    for over_network in [false, true] {
        let client = if over_network {
            Client::over_network(a).await
        } else {
            Client::on_node(a).await
        };
        let mut streams = Vec::new();
        for _ in 0..200 {
            streams.push(client.monitor().await);
        }
        assert_eq!(a.plane.holdings().monitors, 200);
        drop(client);
        drop(streams);
        world.settles(&before).await;
    }
}

/// The reader of a full window of events hears of what has changed meanwhile when it goes on, and of nothing twice.
#[tokio::test]
async fn a_monitor_that_does_not_read_is_told_what_is_new_when_it_does() {
    const FLOOD: usize = 4000;
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client.ask("svc@peer.example").await;
    let mut lazy = client.monitor().await;
    eventually((1, 1), || (peer.monitors(), a.plane.holdings().monitors)).await;
    for round in 0..FLOOD {
        let state = [State::Down, State::Up][round % 2];
        peer.tell(update(&granted.connection, 2, state)).await;
    }
    client.close(&granted.connection).await.expect("closed");
    let mut told = 0;
    loop {
        let event = lazy.next().await;
        assert!(event.connections.contains_key(&granted.agent_id()));
        if event.r#type() == Delete {
            break;
        }
        told += 1;
    }
    assert!(told < FLOOD, "{told}");
    drop(lazy);
    world.settles(&before).await;
}

/// The loss of a peer that comes while a Request is at work is told when the Request fails.
#[tokio::test]
async fn a_loss_during_a_refresh_is_told() {
    let it = Connected::new().await;
    let ([_, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let mut watch = client.watch().await;
    eventually((1, 1), || {
        (it.endpoint.monitors(), b.plane.holdings().monitors)
    })
    .await;
    it.endpoint.hold(true);
    let asked = it.endpoint.requests().len();
    let (refused, ()) = tokio::join!(client.refresh(granted), async {
        eventually(asked + 1, || it.endpoint.requests().len()).await;
        it.endpoint.end_monitors();
        eventually(0, || it.endpoint.monitors()).await;
        it.endpoint
            .twist(|_| Err(tonic::Status::unavailable("going")));
        it.endpoint.hold(false);
    });
    refused.expect_err("the endpoint is going");
    assert_eq!(watch.one(Update).await.state(), State::Down);
    it.endpoint.mend();
    client.close(&granted.connection).await.expect("closed");
    // The refusal and the loss are two causes of one state.
    loop {
        let event = watch.next().await;
        let down = |it: &Connection| it.state() == State::Down;
        assert!(event.connections.values().all(down), "{event:?}");
        if event.r#type() == Delete {
            break;
        }
    }
    drop(watch);
    it.settles().await;
}

/// News of the path that come after it do not hide it.
#[tokio::test]
async fn a_loss_during_a_refresh_is_told_whatever_comes_of_the_path() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let spared = client.ask(SERVICE).await;
    let mut watch = client.monitor().await;
    watch.next().await;
    eventually((1, 1), || {
        (it.endpoint.monitors(), b.plane.holdings().monitors)
    })
    .await;
    it.endpoint.hold(true);
    let asked = it.endpoint.requests().len();
    let (refused, ()) = tokio::join!(client.refresh(granted), async {
        eventually(asked + 1, || it.endpoint.requests().len()).await;
        it.endpoint.end_monitors();
        // Both sides know of the loss: the connection that is not at work has told it.
        assert_eq!(watch.one(Update).await.state(), State::Down);
        for (agent, peer) in [(b, "192.0.2.1"), (a, "192.0.2.2")] {
            agent.kernel().paths().set_mtu(peer, 1400);
            eventually(Some(1400), || {
                let connections = agent.plane.connections();
                let mtus = connections.iter().map(|it| it.health()?.path_mtu);
                mtus.max().flatten()
            })
            .await;
        }
        it.endpoint
            .twist(|_| Err(tonic::Status::unavailable("going")));
        it.endpoint.hold(false);
    });
    refused.expect_err("the endpoint is going");
    let id = granted.agent_id();
    eventually(State::Down, || {
        let connections = a.plane.connections();
        let one = connections.iter().find(|it| it.id() == id);
        one.expect("it stands").connection().state()
    })
    .await;
    it.endpoint.mend();
    for one in [granted, &spared] {
        client.close(&one.connection).await.expect("closed");
    }
    drop(watch);
    it.settles().await;
}
