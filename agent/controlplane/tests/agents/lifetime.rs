//! Refresh, expiry, Close and drain: how connections end, whoever is still there.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use nsm_controlplane::ports::ForwarderError;
use nsm_proto::{
    connection::{ConnectionEventType::*, State},
    networkservice::NetworkServiceRequest,
};
use tonic::Code;

use crate::support::{
    Client, Connected, SERVICE, World, assert_refusal, client_side, endpoint_side, eventually,
    peers, stamp, taken, within,
};

#[tokio::test]
async fn a_connection_ends_with_the_clients_token() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let mut client = Client::on_node(a).await;
    client.lifetime = Some(Duration::from_millis(300));
    let kept = client.ask(SERVICE).await;
    let mut watch = client.watch().await;
    let forgotten = client.ask(SERVICE).await;
    assert_eq!(watch.one(Update).await.id, forgotten.agent_id());
    // Refreshed with a longer token: the first deadline counts no more.
    client.lifetime = Some(Duration::from_secs(600));
    client.refresh(&kept).await.expect("refreshed");
    assert_eq!(watch.one(Update).await.id, kept.agent_id());

    assert_eq!(watch.one(Delete).await.id, forgotten.agent_id());

    eventually(1, || endpoint.closes().len()).await;
    eventually(1, || a.kernel().links().len()).await;
    eventually(1, || b.kernel().links().len()).await;
    assert_eq!(a.plane.connections()[0].id(), kept.agent_id());
    client.close(&kept.connection).await.expect("closed");
    drop(watch);
    world.settles(&before).await;
}

#[tokio::test]
async fn the_endpoints_side_ends_by_itself_when_the_clients_agent_dies() {
    let lifetime = Duration::from_millis(700);
    let world = World::of([client_side().token_lifetime(lifetime), endpoint_side()]).await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    assert_eq!(b.kernel().links().len(), 1);
    a.kill();
    eventually(0, || {
        let holdings = b.plane.holdings();
        holdings.connections + holdings.vnis + holdings.monitors + b.kernel().links().len()
    })
    .await;
    assert!(endpoint.standing().is_empty());
    drop(granted);
}

/// Links are deleted slowly: the next hop is told meanwhile, and the answer waits for both.
#[tokio::test]
async fn the_next_hop_hears_of_a_close_while_the_link_is_deleted() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let kept = a.kernel().keep_links().await;
    let closing = client.close(&granted.connection);
    let told = async {
        eventually(1, || it.endpoint.closes().len()).await;
        eventually(0, || b.kernel().links().len()).await;
        assert_eq!(a.kernel().links().len(), 1);
        drop(kept);
    };
    let (closed, ()) = within(futures_util::future::join(closing, told)).await;
    closed.expect("closed");
    assert!(a.kernel().links().is_empty());
    it.settles().await;
}

/// The client's process died between Request and answer: what it asked for stands until its token
/// ends, and not longer.
#[tokio::test]
async fn a_client_that_vanishes_in_the_middle_leaves_nothing() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let mut client = Client::on_node(a).await;
    client.lifetime = Some(Duration::from_millis(500));
    endpoint.hold(true);
    let request = client.request_for(SERVICE);
    let calling = tokio::spawn(async move { client.send(request).await });
    eventually(1, || endpoint.requests().len()).await;
    calling.abort();
    assert!(calling.await.expect_err("aborted").is_cancelled());
    endpoint.hold(false);
    eventually(1, || endpoint.closes().len()).await;
    world.settles(&before).await;
}

#[tokio::test]
async fn two_requests_at_once_make_one_connection() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let request = client.request_for(SERVICE);
    let (one, two) = tokio::join!(client.send(request.clone()), client.send(request));
    let (one, two) = (one.expect("granted"), two.expect("granted"));
    assert_eq!(one.agent_id(), two.agent_id());
    assert_eq!(one.connection.context, two.connection.context);
    assert_eq!(a.kernel().only().tunnel, b.kernel().only().tunnel);
    assert_eq!(endpoint.standing().len(), 1);
    client.close(&one.connection).await.expect("closed");
    world.settles(&before).await;
    // Closed already, or never opened: fine.
    client.close(&one.connection).await.expect("closed");
    let unknown = client.request_for(SERVICE).connection.expect("one");
    client.close(&unknown).await.expect("closed");
    assert_eq!(endpoint.closes().len(), 1);
    world.settles(&before).await;
}

/// One event at a time; who cannot wait for its turn is told.
#[tokio::test]
async fn an_event_waits_for_the_one_before_no_longer_than_it_can() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let request = client.request_for(SERVICE);
    let mut closing = request.connection.clone().expect("a connection");
    let path = closing.path.as_mut().expect("a path");
    path.path_segments[0].expires = Some(stamp(SystemTime::now() + Duration::from_secs(60)));
    endpoint.hold(true);
    let (granted, ()) = tokio::join!(client.send(request), async {
        eventually(1, || endpoint.requests().len()).await;
        let busy = client.close_within(&closing, Duration::from_millis(20));
        let busy = busy.await.expect_err("a Request is at work");
        // Whichever of the agent's two clocks is ahead.
        let codes = [Code::DeadlineExceeded, Code::Cancelled];
        assert!(codes.contains(&busy.code()), "{busy:?}");
        let patient = client.close_within(&closing, Duration::from_secs(10));
        tokio::pin!(patient);
        tokio::select! {
            biased;
            _ = &mut patient => panic!("a Request is at work"),
            () = tokio::task::yield_now() => endpoint.hold(false),
        }
        within(patient).await.expect("closed");
    });
    granted.expect("granted, and closed after that");
    world.settles(&before).await;
}

/// A Request that comes again after silence is not undone by the Close for the first.
#[tokio::test]
async fn undoing_is_over_before_the_next_request_goes_out() {
    let timeout = Duration::from_millis(300);
    let world = World::of([client_side().request_timeout(timeout), endpoint_side()]).await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let request = client.request_for("svc@peer.example");
    peer.hold(true);
    let status = client.refused(request.clone()).await;
    assert_refusal(&status, Code::DeadlineExceeded, &["did not answer"]);
    let (granted, ()) = tokio::join!(client.send(request), async {
        // The first is still being undone: its turn is held, with nothing established.
        eventually(2, || a.plane.holdings().connections + peer.requests().len()).await;
        peer.hold(false);
    });
    let granted = granted.expect("granted");
    assert_eq!(peer.standing().len(), 1);
    assert_eq!(peer.closes().len(), 1);
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

/// Everything at once, on few connections, with callers that go away and endpoints that fail.
#[tokio::test]
async fn a_storm_of_events_leaves_nothing() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let one = world.endpoint(b, "one", "icmp-responder").await;
    let two = world.endpoint(b, "two", "icmp-responder").await;
    let before = world.held();
    let client = Arc::new(Client::on_node(a).await);
    let requests: Vec<_> = (0..6).map(|_| client.request_for(SERVICE)).collect();
    let mut storm = tokio::task::JoinSet::new();
    for round in 0..160_usize {
        let (client, request) = (Arc::clone(&client), requests[round % 6].clone());
        let calling = storm.spawn(async move {
            if round % 4 == 3 {
                let connection = request.connection.expect("a connection");
                client.close(&connection).await.expect("closed");
            } else if let Ok(granted) = client.send(request).await {
                let _ = client.refresh(&granted).await;
            }
        });
        match round % 20 {
            5 => calling.abort(),
            7 => one.end_monitors(),
            9 => two.twist(|_| Err(tonic::Status::unavailable("not now"))),
            11 => b
                .kernel()
                .fail_next_up(ForwarderError::Kernel("busy".to_owned())),
            13 => a.kernel().fail_next_up(taken(9)),
            15 => two.mend(),
            17 => tokio::task::yield_now().await,
            _ => {}
        }
        if storm.len() > 40 {
            let _ = within(storm.join_next()).await;
        }
    }
    while let Some(ended) = within(storm.join_next()).await {
        assert!(ended.is_ok() || ended.is_err_and(|error| error.is_cancelled()));
    }
    two.mend();
    // Whatever stands now works, and can be closed.
    for request in requests {
        let granted = client.send(request).await.expect("granted");
        client.close(&granted.connection).await.expect("closed");
    }
    world.settles(&before).await;
}

#[tokio::test]
async fn a_close_is_quick_when_the_peer_is_gone_or_silent() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let silent = world.foreign_domain("silent.example", "svc").await;
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let to_dead = client.ask(SERVICE).await;
    let to_silent = client.ask("svc@silent.example").await;
    b.kill();
    silent.hold(true);
    let began = Instant::now();
    let (dead, quiet) = tokio::join!(
        client.close(&to_dead.connection),
        client.close(&to_silent.connection)
    );
    dead.expect("closed");
    quiet.expect("closed");
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    eventually(0, || {
        let holdings = a.plane.holdings();
        holdings.connections + holdings.vnis + a.kernel().links().len()
    })
    .await;
    assert_eq!(peers(a), []);
}

#[tokio::test]
async fn reselect_closes_the_old_before_it_asks_for_the_new() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoints = [
        world.endpoint(b, "one", "icmp-responder").await,
        world.endpoint(b, "two", "icmp-responder").await,
    ];
    let before = world.held();
    let client = Client::on_node(a).await;
    let mut granted = client.ask(SERVICE).await;
    for round in 1..=2 {
        // What NSM's heal sends: endpoint and mechanism cleared.
        let mut connection = granted.connection.clone();
        connection.set_state(State::ReselectRequested);
        connection.network_service_endpoint_name.clear();
        connection.mechanism = None;
        let again = client
            .send(NetworkServiceRequest {
                connection: Some(connection),
                mechanism_preferences: vec![client.kernel("nsm-1")],
            })
            .await
            .expect("granted");
        assert_eq!(again.connection.state(), State::Up);
        assert_eq!(again.agent_id(), granted.agent_id());
        let closes: usize = endpoints.iter().map(|it| it.closes().len()).sum();
        assert_eq!(closes, round);
        let standing: usize = endpoints.iter().map(|it| it.standing().len()).sum();
        assert_eq!(standing, 1);
        assert_eq!(a.kernel().only().tunnel, b.kernel().only().tunnel);
        granted = again;
    }
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

/// Whoever is still at work when the drain begins is waited for.
#[tokio::test]
async fn a_drain_closes_everything() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let watch = client.monitor().await;
    let mut granted = Vec::new();
    for _ in 0..3 {
        granted.push(client.ask(SERVICE).await);
    }
    endpoint.hold(true);
    let late = client.request_for(SERVICE);
    let asked = endpoint.requests().len();
    let (late, ()) = tokio::join!(client.send(late), async {
        eventually(asked + 1, || endpoint.requests().len()).await;
        let drain = a.plane.drain(Duration::from_secs(10));
        tokio::pin!(drain);
        tokio::select! {
            () = &mut drain => panic!("a Request is still at work"),
            // The plane refuses whoever is new from its first moment on.
            refused = refused_newcomer(&client) => {
                assert_refusal(&refused, Code::Unavailable, &["shutting down"]);
            }
        }
        endpoint.hold(false);
        within(drain).await;
    });
    // It was told that it stands, or that the agent goes: it does not stand in any case.
    if let Err(status) = late {
        assert_refusal(&status, Code::Unavailable, &["shutting down"]);
    }
    let holdings = a.plane.holdings();
    assert_eq!(
        (holdings.connections, holdings.vnis, holdings.monitors),
        (0, 0, 0)
    );
    assert!(a.kernel().links().is_empty());
    eventually(0, || b.kernel().links().len() + endpoint.standing().len()).await;
    let deleted = watch
        .rest()
        .await
        .iter()
        .filter(|event| event.r#type() == Delete)
        .count();
    assert!(deleted >= 3, "{deleted}");
    // A refresh of what was drained does not bring it back.
    let refused = client.refresh(&granted[0]).await.expect_err("drained");
    assert_refusal(&refused, Code::Unavailable, &["shutting down"]);
    client.close(&granted[0].connection).await.expect("closed");
}

async fn refused_newcomer(client: &Client) -> tonic::Status {
    client
        .send(client.request_for(SERVICE))
        .await
        .expect_err("the agent drains")
}
