//! Agents and endpoints that die: what they held is gone, or theirs again, once they are back.

use anyhow::{Result, ensure};
use nsm_e2e::{PATIENCE, Pair, endpoint_address, ping};
use nsm_world::{Agent, Cloud, binary, wait_until};

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_killed_agent_comes_back_and_its_client_is_connected_again() -> Result<()> {
    let mut pair = Pair::start("killed-agent", Cloud::Aws, 1)?;
    let _endpoint = pair.endpoint()?;
    let before = pair.footprint()?;
    let (client, connected) = pair.connect(0)?;
    let node = pair.near.node().clone();
    pair.near.process.kill9();
    client.wait_for_event("down", PATIENCE)?;
    // The kernel carries what stands, whoever made it.
    let pod = pair.client_pod(0)?;
    assert_eq!(ping(&pod, &endpoint_address(&connected)?, 5, &[])?, 5);

    pair.near = Agent::start(&pair.world, &node, &binary("proxy-nsmgr")?, |_| {})?;
    pair.near.wait_ready()?;
    wait_until("the agent to know the connection again", PATIENCE, || {
        let known = |status: serde_json::Value| {
            status["connections"]
                .as_array()
                .is_some_and(|all| all.len() == 1)
        };
        pair.near.status().is_ok_and(known)
    })?;
    assert_eq!(ping(&pod, &endpoint_address(&connected)?, 5, &[])?, 5);
    ensure!(
        client.close(PATIENCE)?.success(),
        "the client did not end well"
    );
    pair.assert_clean(&before)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn an_agent_that_ends_takes_its_links_and_pins_along() -> Result<()> {
    let pair = Pair::start("ended-agent", Cloud::Packet, 1)?;
    let _endpoint = pair.endpoint()?;
    let (_client, _) = pair.connect(0)?;
    ensure!(
        pair.near.process.terminate(PATIENCE)?.success(),
        "the agent did not end well"
    );
    let pod = pair.client_pod(0)?;
    let links = pod.links()?;
    ensure!(links.iter().all(|link| link.name == "lo"), "{links:?}");
    let left = pair.world.leaks()?;
    let pins: Vec<_> = left
        .pins
        .iter()
        .filter(|pin| pin.starts_with(pair.near.node().pin_dir()))
        .collect();
    ensure!(pins.is_empty(), "{pins:?}");
    // It has said goodbye: the far agent closes its side too.
    wait_until("the far side to close", PATIENCE, || {
        pair.far
            .status()
            .is_ok_and(|status| status["connections"].as_array().is_none_or(Vec::is_empty))
    })?;
    pair.assert_quiet()
}
