//! A prober that starts after connections were made: what stands is watched from then on, and not from its next refresh.

use nsm_core::liveness::{Published, Verdict};
use nsm_proto::connection::{ConnectionEventType::*, State};

use crate::support::{Client, Path, SERVICE, World, client_side, endpoint_side, eventually};

const FAR: &str = "192.0.2.2";

#[tokio::test]
async fn what_was_made_before_is_watched_as_soon_as_there_is_a_prober() {
    let world = World::of([client_side().probing_late(), endpoint_side()]).await;
    let [a, b] = world.agents();
    let _endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    assert!(a.kernel().watched().is_empty());
    let mut watch = client.watch().await;

    a.kernel().start_probing();
    let following = tokio::spawn(a.plane.clone().watch_paths());
    let outward = |connection: &nsm_proto::connection::Connection| {
        let path = connection.path.as_ref().expect("a path");
        let own = path.path_segments.iter().find(|it| it.name == "agent-1");
        Published::read(&own.expect("our hop").metrics).outward
    };
    let update = watch.one(Update).await;
    assert_eq!(outward(&update), Some(Verdict::Up), "{update:?}");
    eventually(1, || a.kernel().watched().len()).await;
    a.kernel().paths().set(FAR, Path::Down);
    let update = watch.one(Update).await;
    assert_eq!(update.state(), State::Down);
    a.kernel().paths().set(FAR, Path::Up);
    assert_eq!(watch.one(Update).await.state(), State::Up);

    client.close(&granted.connection).await.expect("closed");
    drop(watch);
    following.abort();
    world.settles(&before).await;
}
