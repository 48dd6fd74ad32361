//! Pings that go on while something is done to a connection.

use anyhow::{Context as _, Result, ensure};
use nsm_world::{Pod, Process, World, wait_until};
use serde_json::Value;

use crate::PATIENCE;

/// Pings an address from a pod, twenty times a second, until the process ends; some are answered already.
///
/// # Errors
/// When none is.
pub fn pings(world: &World, pod: &Pod, address: &str) -> Result<Process> {
    let mut command = pod.command("ping")?;
    command.args(["-i", "0.05", address]);
    let pings = world.spawn("pings", command)?;
    flows_on(&pings, 5)?;
    Ok(pings)
}

/// The numbers of the pings that were answered, in the order of the answers.
#[must_use]
pub fn answered(pings: &Process) -> Vec<u64> {
    let text = pings.stdout();
    let number = |line: &str| {
        let (_, after) = line.split_once("icmp_seq=")?;
        after.split(' ').next()?.parse().ok()
    };
    text.lines().filter_map(number).collect()
}

/// Waits until `count` more pings are answered.
///
/// # Errors
/// When they are not in [`PATIENCE`], with what was answered.
pub fn flows_on(pings: &Process, count: usize) -> Result<()> {
    let before = answered(pings).len();
    wait_until("traffic to go on", PATIENCE, || {
        answered(pings).len() >= before + count
    })
    .with_context(|| pings.stdout())
}

/// Checks that every ping until now came back, once and in order.
///
/// # Errors
/// With the answers.
pub fn all_came_back(pings: &Process) -> Result<()> {
    let numbers = answered(pings);
    let is_whole = numbers.iter().copied().eq(1..=numbers.len() as u64);
    ensure!(is_whole, "{}", pings.stdout());
    Ok(())
}

/// The kernel's index of the only link of a connection in a pod: another link has another.
///
/// # Errors
/// When there is none.
pub fn link_index(pod: &Pod) -> Result<u64> {
    let mut command = pod.command("ip")?;
    let output = command.args(["-json", "-details", "link"]).output()?;
    let links: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let link = links
        .iter()
        .find(|link| link["linkinfo"]["info_kind"] == "veth");
    let index = link.and_then(|link| link["ifindex"].as_u64());
    index.with_context(|| format!("no link in {}: {links:#?}", pod.name()))
}
