//! What one source may hold of an agent, and that others still find room.

use std::{
    fs::File,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    sync::Arc,
    time::Duration,
};

use nsm_controlplane::transport::{
    dial::dial_with,
    unix::{Descriptors, Passed},
};
use nsm_core::identity::share::Limit;
use nsm_proto::{
    connection::MonitorScopeSelector,
    registry::{
        NetworkServiceEndpoint,
        network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    },
};
use tokio::net::UnixListener;
use tonic::{Code, Status};

use crate::support::{Client, Setup, World, assert_refusal, endpoint_side, eventually};

/// An agent that passes Requests on, whose callers over the network are strangers.
fn open_side() -> Setup {
    endpoint_side().without_forwarder().without_relays()
}

fn limit(all: usize, of_one: usize) -> Limit {
    Limit { all, of_one }
}

#[tokio::test]
async fn a_stranger_has_a_part_of_the_connections() {
    let mut setup = open_side();
    setup.limits.connections = limit(64, 4);
    let world = World::of([setup]).await;
    let [agent] = world.agents();
    world.endpoint(agent, "nse-1", "svc").await;
    let before = world.held();
    let stranger = Client::over_network(agent).await;
    let mut granted = Vec::new();
    for _ in 0..4 {
        granted.push(stranger.ask("svc").await);
    }
    let status = stranger.refused(stranger.request_for("svc")).await;
    let words = [
        "one source may hold 4 connections",
        "max_connections_per_source",
    ];
    assert_refusal(&status, Code::ResourceExhausted, &words);
    // What stands is refreshed, and others have their part.
    stranger.refresh(&granted[0]).await.expect("refreshed");
    let local = Client::on_node(agent).await;
    granted.push(local.ask("svc").await);
    local.close(&granted[4].connection).await.expect("closed");
    stranger
        .close(&granted[3].connection)
        .await
        .expect("closed");
    granted[3] = stranger.ask("svc").await;
    for it in &granted[..4] {
        stranger.close(&it.connection).await.expect("closed");
    }
    world.settles(&before).await;
    eventually(0, || agent.plane.budget().connections.taken()).await;
}

/// Connections are counted in bytes, too; one that stands is refreshed although nothing is left.
#[tokio::test]
async fn a_stranger_has_a_part_of_the_memory() {
    let mut setup = open_side();
    setup.limits.bytes = limit(1 << 20, 100 << 10);
    let world = World::of([setup]).await;
    let [agent] = world.agents();
    world.endpoint(agent, "nse-1", "svc").await;
    let before = agent.plane.budget().bytes.taken();
    let stranger = Client::over_network(agent).await;
    let large = || {
        let mut request = stranger.request_for("svc");
        let labels = &mut request.connection.as_mut().expect("one").labels;
        labels.insert("text".to_owned(), "x".repeat(12 << 10));
        request
    };
    let mut granted = Vec::new();
    let status: Status = loop {
        match stranger.send(large()).await {
            Ok(it) => granted.push(it),
            Err(status) => break status,
        }
    };
    assert_refusal(&status, Code::ResourceExhausted, &["max_bytes_per_source"]);
    assert!((4..8).contains(&granted.len()), "{}", granted.len());
    stranger.refresh(&granted[0]).await.expect("refreshed");
    // A small one does not grow beyond what is left.
    stranger
        .close(&granted[0].connection)
        .await
        .expect("closed");
    for it in &granted[1..] {
        stranger.close(&it.connection).await.expect("closed");
    }
    eventually(before, || agent.plane.budget().bytes.taken()).await;
}

#[tokio::test]
async fn a_stranger_has_a_part_of_the_streams() {
    let mut setup = open_side();
    setup.limits.streams = limit(64, 4);
    let world = World::of([setup]).await;
    let [agent] = world.agents();
    let stranger = Client::over_network(agent).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let all = MonitorScopeSelector::default();
        streams.push(stranger.monitor_selected(all).await);
    }
    let watches = [
        stranger.watch_endpoints("one").await,
        stranger.watch_endpoints("two").await,
    ];
    let status = stranger.find("svc").await.expect_err("one too many");
    let words = ["monitor and Find streams", "max_streams_per_source"];
    assert_refusal(&status, Code::ResourceExhausted, &words);
    Client::on_node(agent)
        .await
        .find("svc")
        .await
        .expect("found");
    drop((streams, watches));
    eventually(0, || agent.plane.budget().streams.taken()).await;
    stranger.find("svc").await.expect("found");
    eventually(0, || agent.plane.budget().bytes.taken()).await;
}

#[tokio::test]
async fn a_stranger_has_a_part_of_the_registry() {
    let mut setup = open_side();
    setup.limits.entries = limit(64, 4);
    let world = World::of([setup]).await;
    let [agent] = world.agents();
    let stranger = Client::over_network(agent).await;
    let entry = |number: usize| NetworkServiceEndpoint {
        name: format!("nse-{number}"),
        url: "tcp://192.0.2.9:5006".to_owned(),
        ..NetworkServiceEndpoint::default()
    };
    for number in 0..4 {
        stranger.register(entry(number)).await.expect("registered");
    }
    let status = stranger.register(entry(4)).await.expect_err("one too many");
    let words = ["registry entries", "max_entries_per_source"];
    assert_refusal(&status, Code::ResourceExhausted, &words);
    stranger.register(entry(0)).await.expect("a refresh");
    world.endpoint(agent, "nse-9", "svc").await;
    for number in 0..4 {
        stranger.unregister(entry(number)).await.expect("gone");
    }
    stranger
        .register(entry(4))
        .await
        .expect("there is room again");
}

/// A socket that is passed stays open as long as its endpoint is registered.
#[tokio::test]
async fn sockets_that_are_passed_count_as_open_files() {
    let mut setup = endpoint_side();
    setup.limits.clients = limit(12, 12);
    let world = World::of([setup]).await;
    let [agent] = world.agents();
    let descriptors = Arc::<Descriptors>::default();
    let url = agent.node_url.parse().expect("a URL");
    let dialled = dial_with(&url, &descriptors, None, Duration::from_secs(5)).await;
    let mut endpoints =
        NetworkServiceEndpointRegistryClient::new(dialled.expect("the agent").channel);
    let mut sockets = Vec::new();
    let status: Status = loop {
        assert!(sockets.len() < 50, "no limit");
        let path = agent.folder.path().join(format!("{}.sock", sockets.len()));
        sockets.push(UnixListener::bind(&path).expect("a socket"));
        let file = File::options()
            .read(true)
            .custom_flags(nix::libc::O_PATH)
            .open(&path)
            .expect("its file");
        let metadata = file.metadata().expect("its inode");
        descriptors.send(Passed::new(file.into()));
        let entry = NetworkServiceEndpoint {
            name: format!("nse-{}", sockets.len()),
            url: format!("inode://{}/{}", metadata.dev(), metadata.ino()),
            ..NetworkServiceEndpoint::default()
        };
        if let Err(status) = endpoints.register(entry).await {
            break status;
        }
    };
    let words = ["transport connections", "open files"];
    assert_refusal(&status, Code::ResourceExhausted, &words);
    // One of the twelve is this connection; each endpoint takes two.
    assert_eq!(sockets.len(), 6);
}
