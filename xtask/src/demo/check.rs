//! The demo as a test: without a fault it shows what it claims, with one the agent reports this fault and no other.
//!
//! Faults are shown by a process of their own, as people run it: what is judged is the JSON that it prints.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum as _;
use serde_json::Value;

use super::{Arguments, CloudShape, run_on};
use crate::{
    cargo::{Programs, THIS_PROGRAM},
    steps::Steps,
};

/// How a fault must be reported.
#[derive(Debug)]
struct Expected {
    kind: &'static str,
    /// Of both ways together.
    state: &'static str,
    direction: &'static str,
    /// What the reason must name for an operator to find the cause.
    words: &'static [&'static str],
}

const FAULTS: [Expected; 6] = [
    Expected {
        kind: "blackhole",
        state: "down",
        direction: "in",
        words: &["nothing from the peer arrived", "UDP 4789"],
    },
    Expected {
        kind: "one-way",
        state: "down",
        direction: "out",
        words: &["none was answered", "UDP 4789", "into the peer"],
    },
    Expected {
        kind: "vni-mismatch",
        state: "down",
        direction: "out",
        words: &["VNI", "has no tunnel for it", "disagree"],
    },
    Expected {
        kind: "firewall-4789",
        state: "down",
        direction: "in",
        words: &[
            "reached this node's network card",
            "UDP 4789",
            "firewall (INPUT)",
        ],
    },
    Expected {
        kind: "nat-replies-only",
        state: "down",
        direction: "in",
        words: &["UDP 4789", "as new flows and not only as replies"],
    },
    Expected {
        kind: "mtu",
        state: "up",
        direction: "both",
        // The fault lets 1,280 bytes through, VXLAN takes 50 of them, and a search begins at 1,200.
        words: &["inner packets of 12"],
    },
];

/// Runs the demo with programs that are built already.
pub(crate) fn check(cloud: &str, programs: &Programs) -> Result<()> {
    let cloud = CloudShape::from_str(cloud, true).map_err(anyhow::Error::msg)?;
    run_on(
        &Arguments {
            cloud,
            keep: false,
            fault: None,
            json: true,
        },
        programs,
    )
    .map(drop)
}

/// Shows each fault, and checks how it was reported; each is a step.
pub(crate) fn check_faults(steps: &mut Steps, programs: &Programs) -> Result<()> {
    for expected in &FAULTS {
        let name = format!("the demo, --fault {}", expected.kind);
        steps.run(&name, || expected.check(programs))?;
    }
    Ok(())
}

impl Expected {
    fn check(&self, programs: &Programs) -> Result<()> {
        let kind = self.kind;
        let mut command = Command::new(THIS_PROGRAM);
        command.args(["demo", "--json", "--fault", kind]);
        programs.name_to(&mut command);
        let output = command
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("start the demo")?;
        ensure!(
            output.status.success(),
            "the demo of {kind} failed ({})",
            output.status
        );
        let report = serde_json::from_slice(&output.stdout).with_context(|| {
            let printed = String::from_utf8_lossy(&output.stdout);
            format!("the demo of {kind} printed {printed:?}, which is no JSON")
        })?;
        self.judge(&report)
    }

    fn judge(&self, report: &Value) -> Result<()> {
        let reported = &report["fault"];
        for (key, wanted) in [
            ("kind", self.kind),
            ("state", self.state),
            ("direction", self.direction),
        ] {
            ensure!(
                reported[key] == wanted,
                "{}: the {key} should be {wanted}: {reported}",
                self.kind
            );
        }
        let reason = reported["reason"].as_str().unwrap_or_default();
        for word in self.words {
            ensure!(
                reason.contains(word),
                "{}: the reason lacks {word:?}: {reported}",
                self.kind
            );
        }
        for what in ["links", "pins", "netns", "processes"] {
            let left = &report["leaked"][what];
            ensure!(left == 0, "{}: {left} {what} are left behind", self.kind);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_wrong_in_a_story_is_found() {
        let good = json!({
            "fault": {"kind": "one-way", "state": "down", "direction": "out", "reason": "5 probes left and none was answered for 110 \
                ms: see whether UDP 4789 is let through on the way and into the peer"},
            "leaked": {"links": 0, "pins": 0, "netns": 0, "processes": 0}});
        let expected = FAULTS.iter().find(|it| it.kind == "one-way").unwrap();
        expected.judge(&good).unwrap();
        for (pointer, wrong) in [
            ("/fault/kind", json!("blackhole")),
            ("/fault/state", json!("up")),
            ("/fault/direction", json!("in")),
            ("/fault/reason", json!("no answer")),
            ("/fault", json!(null)),
            ("/leaked/pins", json!(1)),
            ("/leaked", json!({})),
        ] {
            let mut report = good.clone();
            *report.pointer_mut(pointer).unwrap() = wrong;
            assert!(expected.judge(&report).is_err(), "{report}");
        }
    }
}
