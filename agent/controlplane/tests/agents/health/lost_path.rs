//! A path that is lost: another endpoint is taken, or the tunnel stays.

use std::sync::Arc;

use super::*;
use crate::support::Endpoint;

/// A domain of two agents with an endpoint each, and the client's; the endpoints with the addresses of their tunnels.
async fn with_two_endpoints() -> (World, [(Arc<Endpoint>, &'static str); 2]) {
    let world = World::of([
        endpoint_side(),
        third().sharing_the_registry(),
        client_side(),
    ])
    .await;
    let [b, c, _] = world.agents();
    let endpoints = [
        (world.endpoint(b, "nse-1", "icmp-responder").await, FAR),
        (world.endpoint(c, "nse-2", "icmp-responder").await, THIRD),
    ];
    (world, endpoints)
}

#[tokio::test]
async fn an_endpoint_whose_path_is_proved_comes_first() {
    let (world, _) = with_two_endpoints().await;
    let [_, _, a] = world.agents();
    let before = world.held();
    a.kernel().paths().set(FAR, Path::Down);
    let client = Client::on_node(a).await;
    for _ in 0..3 {
        let granted = client.ask(SERVICE).await;
        assert_eq!(remote(a), THIRD);
        client.close(&granted.connection).await.expect("closed");
        world.settles(&before).await;
    }
    // Where none is good, any will do.
    a.kernel().paths().set(THIRD, Path::Down);
    let granted = client.ask(SERVICE).await;
    assert!(told(&granted.connection, "agent-1").is_down());
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

/// The old tunnel stands until the new one does, and nobody waits for the old one's Close.
#[tokio::test]
async fn a_lost_path_is_left_for_another_endpoint() {
    let (world, endpoints) = with_two_endpoints().await;
    let [_, _, a] = world.agents();
    let before = world.held();
    let client = Client::on_node(a).await;
    let mut granted = client.ask(SERVICE).await;
    for turn in 0..4 {
        let old = remote(a);
        let mut watch = client.watch().await;
        a.kernel().paths().set(&old, Path::Down);
        assert_eq!(watch.one(Update).await.state(), State::Down);
        let (ups, downs) = a.kernel().changes();
        let again = client
            .send(client.reselect(&granted))
            .await
            .expect("granted");
        assert_eq!(again.agent_id(), granted.agent_id());
        assert_ne!(remote(a), old);
        // The pod's link stays, and the tunnel behind it is another; but at first the client asks for another name as well.
        let renamed = usize::from(turn == 0);
        assert_eq!(a.kernel().changes(), (ups + 1, downs + renamed));
        assert!(!told(&again.connection, "agent-1").is_down());
        // The other endpoint alone has it.
        for (endpoint, at) in &endpoints {
            let standing = usize::from(*at != old);
            eventually(standing, || endpoint.standing().len()).await;
        }
        assert_eq!(a.kernel().watched().len(), 1);
        a.kernel().paths().set(&old, Path::Up);
        granted = again;
    }
    assert_eq!(parameter(&granted.connection, "name"), "nsm-1");
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

/// The far side may notice the loss before we do: its word counts as ours.
#[tokio::test]
async fn a_loss_that_the_far_side_told_keeps_its_tunnel_until_another_stands() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client
        .send(with_name(client.request_for(SERVICE), &client))
        .await
        .expect("granted");
    let (_, downs) = a.kernel().changes();
    b.kernel().paths().set(NEAR, Path::Down);
    eventually(State::Down, || {
        a.plane.connections()[0].connection().state()
    })
    .await;
    let again = client
        .send(client.reselect(&granted))
        .await
        .expect("granted");
    assert_eq!(a.kernel().changes().1, downs, "the tunnel was taken down");
    assert_eq!(endpoint.closes().len(), 0);
    client.close(&again.connection).await.expect("closed");
    world.settles(&before).await;
}

/// With no other endpoint the lost one is asked again: its tunnel stays.
#[tokio::test]
async fn a_lost_path_without_alternative_keeps_its_tunnel() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client
        .send(with_name(client.request_for(SERVICE), &client))
        .await
        .expect("granted");
    let link = a.kernel().only();
    a.kernel().paths().set(FAR, Path::Down);
    eventually(State::Down, || {
        a.plane.connections()[0].connection().state()
    })
    .await;
    let again = client
        .send(client.reselect(&granted))
        .await
        .expect("granted");
    assert!(told(&again.connection, "agent-1").is_down());
    assert_eq!(a.kernel().only(), link);
    assert_eq!(endpoint.closes().len(), 0);
    client.close(&again.connection).await.expect("closed");
    world.settles(&before).await;
}

/// A proxy that granted another endpoint in vain has the connection no more: it is taken back there, and DOWN
/// whatever becomes of the path.
#[tokio::test]
async fn a_reselect_in_vain_at_the_same_proxy_is_taken_back() {
    let near = client_side().reachability(Reachability::Require);
    let world = World::of([near, endpoint_side()]).await;
    let [a, b] = world.agents();
    let endpoints = [
        world.endpoint(b, "nse-1", "icmp-responder").await,
        world.endpoint(b, "nse-2", "icmp-responder").await,
    ];
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    let state = || a.plane.connections()[0].connection().state();
    a.kernel().paths().set(FAR, Path::Down);
    eventually(State::Down, state).await;
    let refused = client.send(client.reselect(&granted)).await;
    refused.expect_err("no path is proved");
    for endpoint in &endpoints {
        eventually(0, || endpoint.standing().len()).await;
    }
    // The endpoints are closed at the same time as what stands here.
    let is_gone = || b.plane.connections().is_empty() && b.kernel().links().is_empty();
    eventually(true, is_gone).await;
    a.kernel().paths().set(FAR, Path::Up);
    eventually(false, || {
        let connections = a.plane.connections();
        connections[0].health().is_none_or(|it| it.is_down())
    })
    .await;
    assert_eq!(state(), State::Down, "its tunnel has no other end");
    let again = client.refresh(&granted).await.expect("mended");
    assert_eq!(state(), State::Up);
    assert_eq!(a.kernel().only().tunnel, b.kernel().only().tunnel);
    client.close(&again.connection).await.expect("closed");
    world.settles(&before).await;
}

fn with_name(mut request: NetworkServiceRequest, client: &Client) -> NetworkServiceRequest {
    request.mechanism_preferences = vec![client.kernel("nsm-1")];
    request
}
