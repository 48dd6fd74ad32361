//! Why a path is down: told when the kind of reason is new, and looked at when somebody asks.

use std::time::Duration;

use nsm_core::liveness::{Direction, Published};
use nsm_proto::connection::{Connection, ConnectionEventType::*, State};

use crate::support::{Connected, Path, eventually};

const NEAR: &str = "192.0.2.1";
const FAR: &str = "192.0.2.2";

fn reason(connection: &Connection, hop: &str) -> String {
    let path = connection.path.as_ref().expect("a path");
    let segment = path.path_segments.iter().find(|it| it.name == hop);
    let told = Published::read(&segment.expect("the hop").metrics);
    told.reason.unwrap_or_default()
}

/// What is learnt after the verdict names who is to blame: it is news here, and on the other side.
#[tokio::test]
async fn another_kind_of_reason_is_told() {
    let it = Connected::new().await;
    let ([a, b], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let mut watch = client.watch().await;
    for (agent, peer) in [(a, FAR), (b, NEAR)] {
        let name = if peer == FAR { "agent-1" } else { "agent-2" };
        for (path, words) in [
            (Path::Down, "none was answered"),
            (Path::Blocked, "firewall"),
        ] {
            agent.kernel().paths().set(peer, path);
            let told = watch.one(Update).await;
            assert_eq!(told.state(), State::Down);
            let reason = reason(&told, name);
            assert!(reason.contains(words), "{reason}");
        }
    }
    for (agent, peer) in [(b, NEAR), (a, FAR)] {
        agent.kernel().paths().set(peer, Path::Up);
        watch.one(Update).await;
    }
    client.close(&granted.connection).await.expect("closed");
    drop(watch);
    it.settles().await;
}

/// An hour of silence is no event, and no answer to who asks may be an hour old.
#[tokio::test]
async fn how_long_a_silence_lasts_is_told_to_who_asks() {
    let it = Connected::new().await;
    let ([a, _], client, granted) = (it.world.agents(), &it.client, &it.granted);
    let sentence = || {
        let connections = a.plane.connections();
        let health = a.plane.health_now(&connections[0]).expect("it is probed");
        health.sentence(Direction::Out)
    };
    a.kernel().paths().set(FAR, Path::Down);
    eventually(true, || sentence().contains("for 130 ms")).await;
    a.kernel()
        .paths()
        .silent_for(FAR, Duration::from_secs(3600));
    assert!(sentence().contains("for 3600000 ms"), "{}", sentence());
    client.close(&granted.connection).await.expect("closed");
}
