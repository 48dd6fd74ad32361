//! UDP ports of tunnels that the other node chooses: only configured ones are opened, each with its first tunnel.

use std::{collections::BTreeSet, process::Command};

use anyhow::{Result, ensure};
use nsm_e2e::{PATIENCE, Pair, close, map_entries, started};
use nsm_world::{Agent, Cloud};
use serde_json::Value;

/// The far node's port.
const OTHER: &str = "8472";

/// The words of the bitmap of ports at which an agent's BPF programs look for tunnels, but for those without any.
fn ports(agent: &Agent) -> Result<BTreeSet<String>> {
    let words = map_entries(&agent.node().pin_dir().join("PORTS"))?;
    let is_set = |word: &&Value| {
        let bytes = word["value"].as_array();
        bytes.is_some_and(|bytes| bytes.iter().any(|byte| byte != "0x00"))
    };
    let set = words.iter().filter(is_set);
    Ok(set
        .map(|word| format!("{}: {}", word["key"], word["value"]))
        .collect())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_configured_port_is_opened_with_its_first_tunnel() -> Result<()> {
    let world = Pair::world("ports", Cloud::Packet, 2)?;
    let with = |port: &'static str, peers: &'static str| {
        move |command: &mut Command| {
            command.args(["--tunnel-port", port, "--tunnel-peer-ports", peers]);
        }
    };
    let pair = Pair {
        near: started(&world, "node-1", with("4789", OTHER))?,
        far: started(&world, "node-2", with(OTHER, "4789"))?,
        world,
    };
    let endpoint = pair.endpoint()?;
    let before = ports(&pair.near)?;
    let (first, connected) = pair.connect(0)?;
    pair.assert_pings(0, &connected, 3)?;
    let (second, _) = pair.connect(1)?;
    let during = ports(&pair.near)?;
    ensure!(
        during.len() == before.len() + 1,
        "{before:?}, then {during:?}"
    );
    // Its device stays: what comes without a tunnel is dropped there.
    close(&first)?;
    close(&second)?;
    ensure!(ports(&pair.near)? == during, "{:?}", ports(&pair.near));
    ensure!(endpoint.stop(PATIENCE)?.success(), "the endpoint failed");
    pair.assert_nothing_left()
}
