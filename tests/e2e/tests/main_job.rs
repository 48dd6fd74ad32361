//! A client in one domain consumes a service of another, in both cloud shapes.

use anyhow::Result;
use nsm_e2e::{PATIENCE, Served, endpoint_address, ping};
use nsm_world::Cloud;

fn client_reaches_endpoint(name: &str, cloud: Cloud) -> Result<()> {
    let pair = Served::start(name, cloud, 1)?;
    let (client, connected) = pair.connect(0)?;

    let pod = pair.client_pod(0)?;
    let address = endpoint_address(&connected)?;
    assert_eq!(ping(&pod, &address, 20, &[])?, 20);
    // The largest packet that the MTU allows, and one byte more, both unfragmented.
    let mtu = connected["connection"]["mtu"].as_u64().unwrap_or_default();
    let payload = |mtu: u64| (mtu - 28).to_string();
    assert_eq!(
        ping(&pod, &address, 3, &["-M", "do", "-s", &payload(mtu)])?,
        3,
        "MTU {mtu}"
    );
    assert_eq!(
        ping(&pod, &address, 1, &["-M", "do", "-s", &payload(mtu + 1)])?,
        0,
        "MTU {mtu}"
    );

    // Two ends of a link at each side. The tunnel runs between public addresses, from the one that the node has.
    let during = pair.footprint()?;
    assert_eq!(
        (during.links.len(), during.slots),
        (4, pair.before.slots + 2),
        "{during:?}"
    );
    let (near, far) = (pair.near.node(), pair.far.node());
    let tunnel = &pair.near.status()?["connections"][0]["tunnel"];
    assert_eq!(tunnel["local"], near.private_ip().to_string());
    assert_eq!(tunnel["remote"], far.public_ip().to_string());
    assert!(
        tunnel["counters"]["tx_packets"].as_u64() >= Some(20),
        "{tunnel}"
    );
    assert!(
        tunnel["counters"]["rx_packets"].as_u64() >= Some(20),
        "{tunnel}"
    );
    // The kernel showed the way, and most of the rest took the fast path, there and back.
    for agent in [&pair.near, &pair.far] {
        let frames = &agent.status()?["bpf"]["frames"];
        let count = |name: &str| frames[name].as_u64().unwrap_or_default();
        assert!(count("fast_out") > 10 && count("fast_in") > 10, "{frames}");
    }
    // One address, asked for once.
    assert_eq!(pair.world.dns().asked("cluster-2.example", "A")?, 1);

    pair.close([client])?;
    assert!(pair.endpoint.stop(PATIENCE)?.success());
    pair.assert_nothing_left()
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn with_public_addresses_on_the_nodes() -> Result<()> {
    client_reaches_endpoint("packet", Cloud::Packet)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn with_private_addresses_behind_nat() -> Result<()> {
    client_reaches_endpoint("aws", Cloud::Aws)
}
