//! Who is at the end of a path is what each connection's own other end said: what another says of the same address is beside that.

use nsm_controlplane::ports::{ForwarderError, Prober as _};
use nsm_core::liveness::{Published, Verdict, sbfd::Discriminator};
use nsm_proto::connection::{Connection, State};

use crate::support::{Client, Endpoint, Granted, Path, World, client_side, eventually, mechanism};

const NEAR: &str = "192.0.2.1";

fn number(number: u32) -> Discriminator {
    Discriminator::new(number).expect("not 0")
}

/// The way to the peer as this hop says it.
fn outward(connection: &Connection, hop: &str) -> Option<Verdict> {
    let path = connection.path.as_ref().expect("a path");
    let segment = path.path_segments.iter().find(|it| it.name == hop);
    Published::read(&segment.expect("the hop").metrics).outward
}

/// Whatever this endpoint answers, its reflector has this discriminator.
fn names_itself<const DISCRIMINATOR: u32>(peer: &Endpoint) {
    peer.twist(|mut it| {
        let mechanism = it.mechanism.as_mut().expect("a mechanism");
        for (key, value) in [("sbfd_discriminator_dst", DISCRIMINATOR), ("sbfd_vni", 1)] {
            let parameters = &mut mechanism.parameters;
            parameters.insert(key.to_owned(), value.to_string());
        }
        Ok(it)
    });
}

#[tokio::test]
async fn anothers_claim_on_a_peers_address_takes_nothing_from_it() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client.ask("icmp-responder@cluster-2.example").await;
    let paths = b.kernel().paths();
    paths.is_nobodys(number(77));
    let stranger = Client::over_network(b).await;
    let claim = async |port: &str, discriminator: &str| -> Granted {
        let mut request = stranger.request_for("icmp-responder@elsewhere.example");
        request.mechanism_preferences = vec![mechanism(
            "REMOTE",
            "VXLAN",
            &[
                ("src_ip", NEAR),
                ("src_port", port),
                ("sbfd_discriminator_src", discriminator),
                ("sbfd_vni", "1"),
            ],
        )];
        stranger.send(request).await.expect("granted")
    };
    let claims = [claim("4789", "77").await, claim("4999", "77").await];
    // The peer's sessions stand, and so do its connections.
    paths.set(NEAR, Path::Up);
    let refreshed = client.refresh(&granted).await.expect("refreshed");
    assert_eq!(outward(&refreshed.connection, "agent-2"), Some(Verdict::Up));
    let known: Vec<_> = paths
        .paths()
        .into_iter()
        .map(|it| it.reflector.discriminator)
        .collect();
    let own = a.kernel().paths().reflector().discriminator;
    assert_eq!(known.iter().filter(|it| **it == own).count(), 1);
    assert_eq!(known.len(), 3);
    // Those who made the claims have what they claimed.
    for claim in &claims {
        assert_eq!(outward(&claim.connection, "agent-2"), Some(Verdict::Down));
        stranger.close(&claim.connection).await.expect("closed");
    }
    assert_eq!(paths.paths().len(), 1);
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

#[tokio::test]
async fn a_peer_with_another_name_is_watched_by_those_who_heard_it() {
    let world = World::of([client_side()]).await;
    let [a] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let before = world.held();
    let paths = a.kernel().paths();
    let watched = || {
        let mut all: Vec<_> = paths
            .paths()
            .into_iter()
            .map(|it| it.reflector.discriminator)
            .collect();
        all.sort_unstable();
        all
    };
    names_itself::<77>(&peer);
    let client = Client::on_node(a).await;
    let [first, second] = [
        client.ask("svc@peer.example").await,
        client.ask("svc@peer.example").await,
    ];
    assert_eq!(watched(), [number(77)]);

    // It has started anew: nobody has its old name any more.
    names_itself::<78>(&peer);
    paths.is_nobodys(number(77));
    let proofs = paths.proofs().len();
    let refreshed = client.refresh(&first).await.expect("refreshed");
    assert_eq!(watched(), [number(77), number(78)]);
    assert_eq!(paths.proofs().len(), proofs + 1, "it is known at once");
    assert_eq!(outward(&refreshed.connection, "agent-1"), Some(Verdict::Up));
    assert_eq!(refreshed.connection.state(), State::Up);
    client.refresh(&second).await.expect("refreshed");
    assert_eq!(watched(), [number(78)]);

    // A refresh that fails leaves what stood.
    names_itself::<79>(&peer);
    let refusal = ForwarderError::Kernel("no".to_owned());
    a.kernel().fail_next_up(refusal);
    client.refresh(&first).await.expect_err("no link");
    eventually(vec![number(78)], watched).await;

    for granted in [&first, &second] {
        client.close(&granted.connection).await.expect("closed");
    }
    world.settles(&before).await;
}
