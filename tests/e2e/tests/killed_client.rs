//! Clients that are killed: what they had is the next one's.

use anyhow::{Result, ensure};
use nsm_e2e::{
    PATIENCE, Served, endpoint_address, nth_event,
    pings::{all_came_back, flows_on, link_index, pings},
};
use nsm_world::Cloud;

/// The next client for the same interface of the same pod finds the connection. Its link stays, and no packet is lost.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn the_next_client_takes_over_what_a_killed_one_had() -> Result<()> {
    let pair = Served::start("killed-client", Cloud::Packet, 1)?;
    let (first, connected) = pair.connect(0)?;
    let pod = pair.client_pod(0)?;
    let link = link_index(&pod)?;
    let pings = pings(&pair.world, &pod, &endpoint_address(&connected)?)?;
    flows_on(&pings, 5)?;
    first.process.kill9();

    let (second, again) = pair.connect(0)?;
    for fact in ["id", "endpoint", "vni", "src_addresses"] {
        ensure!(
            again["connection"][fact] == connected["connection"][fact],
            "another {fact}: {connected} {again}"
        );
    }
    flows_on(&pings, 5)?;
    pings.terminate(PATIENCE)?;
    all_came_back(&pings)?;
    ensure!(link == link_index(&pod)?, "another link");

    // One beside it gets nothing, as it has no right to the interface.
    let error = pair.refused(nsm_e2e::REMOTE_SERVICE, PATIENCE, |_| {})?;
    ensure!(error.contains("nsm-1"), "{error}");
    nth_event(&second, "connected", 1)?;
    pair.close([second])
}
