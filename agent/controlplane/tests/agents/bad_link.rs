//! Links of pods that somebody else changes: repaired, or DOWN with the reason where the client sees it.

use nsm_controlplane::ports::ForwarderError;
use nsm_core::liveness::BadLink;
use nsm_proto::connection::{Connection, ConnectionEventType::*, State};

use crate::support::{Connected, Watch, eventually};

/// How often a change is undone before the link is left alone.
const REPAIRS: usize = 3;

/// What the hop of this name publishes of its link.
fn published(connection: &Connection, hop: &str) -> Option<BadLink> {
    let path = connection.path.as_ref().expect("a path");
    let segment = path.path_segments.iter().find(|it| it.name == hop);
    BadLink::read(&segment.expect("the hop").metrics)
}

async fn told(watch: &mut Watch, hop: &str, state: State) -> Option<BadLink> {
    let connection = watch.one(Update).await;
    assert_eq!(connection.state(), state, "{connection:?}");
    published(&connection, hop)
}

/// At the client's node and at the endpoint's: a few times it is repaired and nobody is bothered, then it is DOWN until it is right.
#[tokio::test]
async fn a_link_that_is_undone_again_and_again_is_down_until_it_is_right() {
    let it = Connected::new().await;
    for (agent, hop) in it
        .world
        .agents::<2>()
        .into_iter()
        .zip(["agent-1", "agent-2"])
    {
        let mut watch = it.client.watch().await;
        for repairs in 1..=REPAIRS {
            agent.kernel().change_links(Some("it is down"));
            eventually(repairs, || agent.kernel().repairs()).await;
        }
        agent.kernel().change_links(Some("it is down"));
        let bad = told(&mut watch, hop, State::Down).await.expect("bad");
        for words in ["it is down", "undone again"] {
            assert!(bad.reason.contains(words), "{bad:?}");
        }
        let connections = agent.plane.connections();
        let why = agent.plane.down_reason(&connections[0]).expect("DOWN");
        assert_eq!(why.to_string(), *bad.reason);
        assert_eq!(agent.kernel().repairs(), REPAIRS);
        agent.kernel().change_links(None);
        assert_eq!(told(&mut watch, hop, State::Up).await, None);
    }
    it.client
        .close(&it.granted.connection)
        .await
        .expect("closed");
    it.settles().await;
}

/// What cannot be repaired is DOWN, and the next Request that succeeds makes it UP.
#[tokio::test]
async fn a_request_makes_a_bad_link_right() {
    let it = Connected::new().await;
    let [a, _] = it.world.agents();
    let mut watch = it.client.watch().await;
    for _ in 0..2 {
        let refusal = ForwarderError::Kernel("no memory for a link".to_owned());
        a.kernel().refuse_links(refusal);
    }
    let bad = told(&mut watch, "agent-1", State::Down).await.expect("bad");
    assert!(bad.reason.contains("log of its agent"), "{bad:?}");
    let granted = it.client.refresh(&it.granted).await.expect("refreshed");
    assert_eq!(published(&granted.connection, "agent-1"), None);
    let connections = a.plane.connections();
    assert_eq!(connections[0].connection().state(), State::Up);
    it.client.close(&granted.connection).await.expect("closed");
    drop(watch);
    it.settles().await;
}

/// The client's pod: both sides close. The endpoint's: its side closes, which the client's monitor gets as an event.
#[tokio::test]
async fn the_connection_of_a_pod_that_is_gone_is_closed() {
    let gone = || ForwarderError::Gone("no network namespace at /run/netns/pod".to_owned());
    let it = Connected::new().await;
    let [a, b] = it.world.agents();
    let mut watch = it.client.watch().await;
    a.kernel().refuse_links(gone());
    watch.one(Delete).await;
    eventually(1, || it.endpoint.closes().len()).await;
    drop(watch);
    it.settles().await;

    let granted = it.client.ask("icmp-responder@cluster-2.example").await;
    let mut watch = it.client.watch().await;
    eventually(1, || b.plane.holdings().monitors).await;
    b.kernel().refuse_links(gone());
    told(&mut watch, "agent-1", State::Down).await;
    eventually(2, || it.endpoint.closes().len()).await;
    drop(watch);
    it.client.close(&granted.connection).await.expect("closed");
    it.settles().await;
}
