//! Set-up time of an interdomain connection: client, two agents, endpoint and DNS, all real, on one machine.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nsm_stats::p99_name;
use serde::Deserialize;

use super::{
    Setting,
    processes::run_json,
    report::{Bar::AtMost, Row},
    scene::Domains,
    sink::Sink,
};

const P50_MS: f64 = 5.0;

/// Two hundred take some ten seconds or so, even where each takes ten times what it should.
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

pub(super) fn measure(setting: &Setting<'_>, sink: &Sink) -> Result<()> {
    // A 99th percentile takes a hundred.
    let connections: u32 = setting.size.pick(200, 5, 40);
    let programs = setting.built.world()?;
    sink.step("two domains");
    let domains = Domains::build(&programs)?;
    for agent in [&domains.client_agent, &domains.endpoint_agent] {
        let hook = agent.status()?["bpf"]["hook"].clone();
        ensure!(
            hook.as_str()
                .is_some_and(|hook| !hook.is_empty() && hook != "none"),
            "no BPF program is attached on {}: the time would be of less than a connection",
            agent.node().name()
        );
    }
    let mut command = domains.client_agent.node().command(&programs.load)?;
    command
        .args(["setup", "--connect-to", &domains.client_agent.nsmgr_url()])
        .args(["--service", &Domains::service(), "--netns"])
        .arg(domains.client_pod.netns())
        .args(["--connections", &connections.to_string()]);
    sink.step("connections");
    let measured: Measured = run_json(&domains.world, "setup", command, DEADLINE)
        .with_context(|| domains.world.logs())?;
    let n = measured.connections;
    let row =
        |what: &str, quantile: &str, value| Row::new(format!("{what} {quantile}"), value, "ms", n);
    let p99 = p99_name(n);
    sink.rows([
        row("set-up", "p50", measured.setup_p50_ms).bar(AtMost(P50_MS)),
        row("set-up", p99, measured.setup_p99_ms),
        Row::new("set-up, the first (cold)", measured.cold_ms, "ms", 1),
        row("close", "p50", measured.close_p50_ms),
        row("close", p99, measured.close_p99_ms),
    ]);
    sink.note(format!(
        "{n} connections one after the other, from the Request on the agent's socket to its answer, when the links of both sides stand; each is closed before the next",
    ));
    let questions = domains.world.dns().queries()?.len();
    sink.note(format!(
        "the first asks DNS and connects the agents; the others find both done ({questions} DNS questions in all)"
    ));
    Ok(())
}
