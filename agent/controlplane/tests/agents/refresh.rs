//! A refresh that is refused: the connection stands on, and its monitors get that it is DOWN, so that clients heal.

use nsm_core::liveness::LostHop;
use nsm_proto::{
    connection::{Connection, ConnectionEventType::*, State},
    networkservice::NetworkServiceRequest,
};
use tonic::Status;

use crate::support::{Client, Connected, Granted, SERVICE, Twist, World, eventually};

/// What NSM's heal sends: endpoint and mechanism cleared.
fn reselect(client: &Client, granted: &Granted) -> NetworkServiceRequest {
    let mut connection = granted.connection.clone();
    connection.set_state(State::ReselectRequested);
    connection.network_service_endpoint_name.clear();
    connection.mechanism = None;
    NetworkServiceRequest {
        connection: Some(connection),
        mechanism_preferences: vec![client.kernel("nsm-1")],
    }
}

fn reason(connection: &Connection, hop: &str) -> Option<String> {
    let path = connection.path.as_ref().expect("a path");
    let mut segments = path.path_segments.iter();
    let segment = segments.find(|it| it.name == hop).expect("the hop");
    Some(LostHop::read(&segment.metrics)?.reason.to_string())
}

#[tokio::test]
async fn a_refused_refresh_is_down_for_the_monitors_until_one_succeeds() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let mut watch = client.watch().await;
    eventually(1, || it.endpoint.monitors()).await;
    let links = (a.kernel().links(), b.kernel().links());
    let refusals: [Twist; 2] = [
        |_| Err(Status::permission_denied("not you")),
        |_| Err(Status::unavailable("not now")),
    ];
    for refusal in refusals {
        it.endpoint.twist(refusal);
        client.refresh(granted).await.expect_err("refused");
        let down = watch.one(Update).await;
        assert_eq!(
            (down.state(), down.id.clone()),
            (State::Down, granted.agent_id())
        );
        let why = reason(&down, "agent-1").expect("it is published");
        assert!(why.contains("refused Request"), "{why}");
        let shown = a.plane.down_reason(&a.plane.connections()[0]);
        let shown = shown.expect("it is down").to_string();
        assert!(
            shown.contains(&why) && shown.contains("the path is good"),
            "{shown}"
        );
        // A second refusal is no news.
        client.refresh(granted).await.expect_err("refused");
        assert_eq!((a.kernel().links(), b.kernel().links()), links);
        it.endpoint.mend();
        client.refresh(granted).await.expect("refreshed");
        let up = watch.one(Update).await;
        assert_eq!((up.state(), reason(&up, "agent-1")), (State::Up, None));
    }
    client.close(&granted.connection).await.expect("closed");
    drop(watch);
    it.settles().await;
}

/// What the caller may not do is no fact about the connection.
#[tokio::test]
async fn a_strangers_request_is_no_refused_refresh() {
    let it = Connected::new().await;
    let ([a, _], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let stranger = Client::over_network(a).await;
    stranger.refresh(granted).await.expect_err("not its own");
    assert_eq!(a.plane.connections()[0].connection().state(), State::Up);
    client.close(&granted.connection).await.expect("closed");
}

/// Healing after a refusal asks for another endpoint. What stands is closed when another one stands, and not before.
#[tokio::test]
async fn what_was_refused_a_refresh_stands_until_another_endpoint_is_found() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let one = world.endpoint(b, "one", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    let links = (a.kernel().links(), b.kernel().links());
    one.twist(|_| Err(Status::unavailable("not now")));
    client.refresh(&granted).await.expect_err("refused");
    let nobody = client.send(reselect(&client, &granted)).await;
    nobody.expect_err("there is no other");
    assert_eq!((a.kernel().links(), b.kernel().links()), links);
    assert_eq!(one.standing().len(), 1);

    let two = world.endpoint(b, "two", "icmp-responder").await;
    let again = client.send(reselect(&client, &granted)).await;
    let again = again.expect("granted");
    eventually((0, 1), || (one.standing().len(), two.standing().len())).await;
    client.close(&again.connection).await.expect("closed");
    eventually((0, 0), || {
        let links = [a, b].map(|agent| agent.kernel().links().len());
        (
            links.into_iter().sum(),
            one.standing().len() + two.standing().len(),
        )
    })
    .await;
}
