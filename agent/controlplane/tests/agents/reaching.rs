//! Several addresses of one domain, and answers of DNS that lead nowhere any more.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use nsm_discovery::dns::ResolverConfig;
use tonic::Code;

use crate::support::{
    Client, Endpoint, Silence, World, Zone, assert_refusal, client_side, eventually, offer,
    registration,
};

const DOMAIN: &str = "twin.example";
const SERVICE: &str = "svc@twin.example";

/// A domain of one endpoint, its registry and proxy on one port.
async fn gate(name: &str) -> Endpoint {
    let gate = Endpoint::domain(name).await;
    let mut entry = registration(&gate, "svc", &[]);
    entry.name = "nse".to_owned();
    let registry = gate.registry.as_ref().expect("a domain");
    offer(registry, entry);
    gate
}

fn port(url: &str) -> u16 {
    let port = url.rsplit(':').next().expect("a port");
    port.parse().expect("a port")
}

/// The domain at these ports of loopback, the first preferred.
fn zone_at(ports: &[u16]) -> Zone {
    let mut zone = Zone::default().a(&format!("host.{DOMAIN}"), [127, 0, 0, 1].into());
    for &port in ports {
        for service in ["registry", "nsmgr-proxy"] {
            let name = format!("{service}.nsm-system.{DOMAIN}");
            zone = zone.srv(&name, &format!("host.{DOMAIN}"), port);
        }
    }
    zone
}

/// Of two addresses the first takes no connection and refuses none. It is waited for a moment, once.
#[tokio::test]
async fn a_silent_address_costs_a_moment_and_is_remembered() {
    let dial_timeout = Duration::from_secs(8);
    let silent = Silence::begin();
    let live = gate("gate").await;
    let zone = zone_at(&[silent.port(), port(&live.url)]);
    let world = World::with_dns([client_side().dial_timeout(dial_timeout)], zone).await;
    let live = world.keep(live);
    let client = Client::on_node(world.agents::<1>()[0]).await;
    let before = world.held();
    for limit in [Duration::from_secs(4), Duration::from_secs(2)] {
        let began = Instant::now();
        let granted = client.ask(SERVICE).await;
        assert!(began.elapsed() < limit, "{:?}", began.elapsed());
        assert_eq!(live.standing().len(), 1);
        client.close(&granted.connection).await.expect("closed");
        world.settles(&before).await;
    }
}

/// Each address that cannot be reached is named, and none that was not tried.
#[tokio::test]
async fn every_address_is_blamed_for_itself() {
    let silent = Silence::begin();
    let zone = zone_at(&[silent.port(), 1]);
    let timeout = Duration::from_millis(600);
    let world = World::with_dns([client_side().dial_timeout(timeout)], zone).await;
    let client = Client::on_node(world.agents::<1>()[0]).await;
    let status = client.refused(client.request_for(SERVICE)).await;
    let silent = format!("127.0.0.1:{}", silent.port());
    assert_refusal(
        &status,
        Code::Unavailable,
        &[&silent, "600ms", "127.0.0.1:1:", "refused"],
    );
}

/// A domain that has moved is found before the old answer's TTL of a minute is over.
#[tokio::test]
async fn an_answer_that_leads_nowhere_is_asked_for_again() {
    let old = gate("old").await;
    let zone = zone_at(&[port(&old.url)]).shared();
    let dns: SocketAddr = zone.clone().serve().await;
    let world = World::of([client_side()]).await;
    let old = world.keep(old);
    let [a] = world.agents();
    a.resolve_by(ResolverConfig {
        servers: vec![dns],
        ..ResolverConfig::default()
    });
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    assert_eq!(old.standing().len(), 1);
    client.close(&granted.connection).await.expect("closed");

    old.kill();
    let new = world.keep(gate("new").await);
    zone.change(zone_at(&[port(&new.url)]));
    // An answer is not doubted in its first second.
    let found = async {
        loop {
            if let Ok(granted) = client.send(client.request_for(SERVICE)).await {
                break granted;
            }
        }
    };
    let granted = crate::support::within(found).await;
    assert_eq!(new.standing().len(), 1);
    client.close(&granted.connection).await.expect("closed");
    eventually(0, || new.standing().len()).await;
}
