//! A node that loses its end of a tunnel behind its agent's back.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use nsm_world::Node;
use serde_json::Value;

/// Deletes what the BPF maps hold of the VNI. (A deleted link is made again by the agent, and its tunnel with it.)
pub(crate) fn forget_tunnel(node: &Node, vni: u64) -> Result<()> {
    let tunnels = node.pin_dir().join("TUNNELS");
    let known: Vec<Value> = dump(&tunnels)?
        .into_iter()
        .filter(|entry| entry["formatted"]["key"]["vni"] == vni)
        .collect();
    ensure!(!known.is_empty(), "BPF on {} has no VNI {vni}", node.name());
    for entry in &known {
        bpftool("delete", &tunnels, &[("key", bytes(&entry["key"])?)])?;
    }
    // The programs remember what they looked up until this number is another.
    let generation = node.pin_dir().join("GENERATION");
    for entry in dump(&generation)? {
        let mut value = bytes(&entry["value"])?;
        let first = value.first_mut().context("a value without bytes")?;
        *first = format!(
            "{:#04x}",
            entry["formatted"]["value"].as_u64().unwrap_or(0) as u8 ^ 0x80
        );
        bpftool(
            "update",
            &generation,
            &[("key", bytes(&entry["key"])?), ("value", value)],
        )?;
    }
    Ok(())
}

/// A pinned map's entries.
fn dump(pin: &Path) -> Result<Vec<Value>> {
    let text = bpftool("dump", pin, &[])?;
    serde_json::from_str(&text).with_context(|| format!("the dump of {} is no list", pin.display()))
}

/// The bytes of a key or value in a dump, as bpftool takes them.
fn bytes(dumped: &Value) -> Result<Vec<String>> {
    serde_json::from_value(dumped.clone()).with_context(|| format!("{dumped} is no list of bytes"))
}

fn bpftool(verb: &str, pin: &Path, arguments: &[(&str, Vec<String>)]) -> Result<String> {
    let mut command = Command::new("bpftool");
    command
        .args(["--json", "map"])
        .arg(verb)
        .arg("pinned")
        .arg(pin);
    for (name, bytes) in arguments {
        command.args([name, "hex"]).args(bytes);
    }
    run(&mut command)
}

/// Runs a command to its end; what it printed.
fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
