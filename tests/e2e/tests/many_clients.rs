//! Many clients at once, and clients that vanish.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;
use nsm_e2e::{PATIENCE, REMOTE_SERVICE, Served, client_address};
use nsm_world::Cloud;

const CLIENTS: usize = 10;

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn ten_clients_at_once_leave_no_trace() -> Result<()> {
    let pair = Served::start("ten", Cloud::Aws, CLIENTS)?;

    // All start before any is waited for.
    let start = |n| {
        pair.near
            .connect(&pair.world, &pair.client_pod(n)?, REMOTE_SERVICE, |_| {})
            .map_err(Into::into)
    };
    let clients = (0..CLIENTS).map(start).collect::<Result<Vec<_>>>()?;
    let mut addresses = BTreeSet::new();
    for (n, client) in clients.iter().enumerate() {
        let connected = client.wait_for_event("connected", PATIENCE)?;
        addresses.insert(client_address(&connected)?);
        pair.assert_pings(n, &connected, 5)?;
    }
    assert_eq!(
        addresses.len(),
        CLIENTS,
        "each client has an address of its own: {addresses:?}"
    );
    let during = pair.footprint()?;
    // Two ends of a link for each, on each of two nodes.
    assert_eq!(during.links.len(), 4 * CLIENTS, "{during:?}");
    assert_eq!(during.slots, pair.before.slots + 2 * CLIENTS);

    clients
        .iter()
        .for_each(|client| client.process.signal(nsm_world::Signal::SIGTERM));
    for client in &clients {
        assert!(client.process.wait(PATIENCE)?.success());
    }
    pair.assert_as_before()
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_killed_client_is_closed_when_its_token_expires() -> Result<()> {
    let pair = Served::start("killed", Cloud::Packet, 1)?;
    let client = pair.near.connect(
        &pair.world,
        &pair.client_pod(0)?,
        REMOTE_SERVICE,
        |command| {
            command.args(["--max-token-lifetime", "3s"]);
        },
    )?;
    client.wait_for_event("connected", PATIENCE)?;
    // It lives beyond its first token as long as it refreshes.
    client.wait_for_event("refreshed", Duration::from_secs(10))?;
    assert_eq!(pair.footprint()?.links.len(), 4);
    client.process.kill9();
    pair.assert_as_before()
}
