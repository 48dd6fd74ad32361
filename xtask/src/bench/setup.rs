//! Set-up time of an interdomain connection: client, two agents, endpoint and DNS, all real, on one machine.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::{
    Found,
    processes::run_json,
    programs::Programs,
    report::{Bar::AtMost, Row},
    scene::Domains,
};

const P50_MS: f64 = 5.0;

/// Fifty take a second or so, even where each takes ten times what it should.
const DEADLINE: Duration = Duration::from_secs(60);

/// What `nsm-load setup` says.
#[derive(Debug, Deserialize)]
struct Measured {
    cold_ms: f64,
    connections: u64,
    setup_p50_ms: f64,
    setup_p99_ms: f64,
    close_p50_ms: f64,
    close_p99_ms: f64,
}

pub(super) fn measure(programs: &Programs, quick: bool) -> Result<Found> {
    let connections: u32 = if quick { 5 } else { 50 };
    let domains = Domains::build(programs)?;
    let mut command = domains.client_agent.node().command(&programs.load)?;
    command
        .args(["setup", "--connect-to", &domains.client_agent.nsmgr_url()])
        .args(["--service", &Domains::service(), "--netns"])
        .arg(domains.client_pod.netns())
        .args(["--connections", &connections.to_string()]);
    let measured: Measured = run_json(&domains.world, "setup", command, DEADLINE)
        .with_context(|| domains.world.logs())?;
    for agent in [&domains.client_agent, &domains.endpoint_agent] {
        let hook = agent.status()?["bpf"]["hook"].clone();
        ensure!(
            hook.as_str()
                .is_some_and(|hook| !hook.is_empty() && hook != "none"),
            "no BPF program is attached on {}: the time would be of less than a connection",
            agent.node().name()
        );
    }
    let questions = domains.world.dns().queries()?.len();
    Ok(Found {
        rows: vec![
            Row::new("set-up p50", measured.setup_p50_ms, "ms").bar(AtMost(P50_MS)),
            Row::new("set-up p99", measured.setup_p99_ms, "ms"),
            Row::new("set-up, the first (cold)", measured.cold_ms, "ms"),
            Row::new("close p50", measured.close_p50_ms, "ms"),
            Row::new("close p99", measured.close_p99_ms, "ms"),
        ],
        notes: vec![
            format!(
                "{} connections one after the other, from the Request on the agent's socket to its answer, when the links of both sides stand; each is closed before the next",
                measured.connections
            ),
            format!(
                "the first asks DNS and connects the agents; the others find both done ({questions} DNS questions in all)"
            ),
        ],
    })
}
