//! Whose a connection, a registration and a monitor is: what one caller made, no other reaches.

use nsm_proto::{
    connection::{Connection, MonitorScopeSelector},
    networkservice::NetworkServiceRequest,
    registry::NetworkServiceEndpoint,
};
use tonic::{Code, Status};

use crate::support::{Client, Connected, World, apart, assert_refusal, eventually, registration};

fn again(connection: &Connection) -> NetworkServiceRequest {
    NetworkServiceRequest {
        connection: Some(connection.clone()),
        mechanism_preferences: Vec::new(),
    }
}

fn assert_anothers(status: &Status) {
    assert_refusal(status, Code::PermissionDenied, &["made by another"]);
}

/// The connections in the initial state of a monitor that selects everything.
async fn seen_by(client: &Client) -> Vec<String> {
    let mut watch = client
        .monitor_selected(MonitorScopeSelector::default())
        .await;
    watch.next().await.connections.into_keys().collect()
}

/// `thief` shows the whole path of a connection of another, and gets nothing by it.
async fn reaches_nothing(thief: &Client, connection: &Connection) {
    assert_anothers(&thief.refused(again(connection)).await);
    let mut other = again(connection);
    other.mechanism_preferences = vec![thief.kernel("stolen")];
    other.connection.as_mut().expect("one").mechanism = None;
    assert_anothers(&thief.refused(other).await);
    let close = thief.close(connection).await;
    assert_anothers(&close.expect_err("another's"));
    assert_eq!(seen_by(thief).await, Vec::<String>::new());
}

#[tokio::test]
async fn the_network_reaches_nothing_that_a_process_of_the_node_made() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let stranger = Client::over_network(a).await;
    let mut events = stranger
        .monitor_selected(MonitorScopeSelector::default())
        .await;
    assert!(events.next().await.connections.is_empty());
    reaches_nothing(&stranger, &granted.connection).await;

    // It stands, and whoever made it goes on.
    assert_eq!(seen_by(client).await, [granted.agent_id()]);
    let granted = client.refresh(granted).await.expect("refreshed");
    client.close(&granted.connection).await.expect("closed");
    // Neither the refresh nor the end was an event for the stranger: what comes next is of another connection, over the network.
    it.world.endpoint(a, "nse-2", "other").await;
    let far = Client::on_node(b).await;
    let last = far.ask("other@cluster-1.example").await;
    let path = last.connection.path.as_ref().expect("a path");
    let event = events.next().await;
    let ids: Vec<_> = event.connections.into_keys().collect();
    assert_eq!(ids, [path.path_segments[2].id.as_str()]);
    far.close(&last.connection).await.expect("closed");
    drop(events);
    for agent in [a, b] {
        eventually(0, || agent.plane.holdings().connections).await;
    }
}

#[tokio::test]
async fn a_process_of_the_node_reaches_nothing_that_came_over_the_network() {
    let it = Connected::new().await;
    let ([_, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    // At the second agent the same connection came from the first.
    let local = Client::on_node(b).await;
    let mut view = granted.connection.clone();
    let path = view.path.as_mut().expect("a path");
    path.index = 1;
    view.id.clone_from(&path.path_segments[1].id);
    reaches_nothing(&local, &view).await;
    // Over the network, too, the path of the client is what counts.
    let stranger = Client::over_network(b).await;
    let mut forged = view.clone();
    let path = forged.path.as_mut().expect("a path");
    "guessed".clone_into(&mut path.path_segments[0].id);
    assert_anothers(&stranger.refused(again(&forged)).await);
    assert_anothers(&stranger.close(&forged).await.expect_err("another's"));

    client.close(&granted.connection).await.expect("closed");
    it.settles().await;
}

#[tokio::test]
#[ignore = "needs root: makes a network namespace"]
async fn another_pod_reaches_nothing_of_the_same_user() {
    let it = Connected::new().await;
    let ([a, _], granted) = (it.world.agents(), &it.granted);
    let (url, connection) = (a.node_url.clone(), granted.connection.clone());
    apart(async move {
        let neighbour = Client::at(&url).await;
        reaches_nothing(&neighbour, &connection).await;
    })
    .await;
    // Another process of the same pod is the same owner.
    let later = Client::on_node(a).await;
    let refreshed = later.refresh(granted).await.expect("refreshed");
    later.close(&refreshed.connection).await.expect("closed");
    it.settles().await;
}

#[tokio::test]
async fn an_endpoints_name_is_not_had_by_another_kind_of_socket() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let endpoint = world.endpoint(a, "nse-1", "svc").await;
    let peer = world.foreign_domain("peer.example", "other").await;
    let (local, remote) = (Client::on_node(a).await, Client::over_network(a).await);
    let entry = |name: &str, url: &str| NetworkServiceEndpoint {
        name: name.to_owned(),
        url: url.to_owned(),
        ..registration(&endpoint, "svc", &[])
    };
    let refused = |outcome: Result<(), Status>| {
        let status = outcome.expect_err("another's");
        assert_refusal(&status, Code::PermissionDenied, &["another name"]);
    };
    let stolen = entry("nse-1", &peer.url);
    refused(remote.register(stolen.clone()).await.map(drop));
    refused(remote.unregister(stolen).await);
    assert_eq!(local.find("svc").await.expect("found").len(), 1);
    let granted = local.ask("svc").await;
    local.close(&granted.connection).await.expect("closed");

    let theirs = entry("nse-2", &peer.url);
    remote.register(theirs.clone()).await.expect("free");
    let stolen = entry("nse-2", &endpoint.url);
    refused(local.register(stolen.clone()).await.map(drop));
    refused(local.unregister(stolen).await);
    remote.register(theirs.clone()).await.expect("its own");
    remote.unregister(theirs).await.expect("its own");
}
