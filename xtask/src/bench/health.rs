//! How soon a cut path is reported as down, how often a whole one is, and what the sessions cost that watch the paths.
//!
//! A client holds a connection between two real agents and notes when the agent's monitor says DOWN, by the clock that this program
//! reads before it cuts the path: the time includes nft's own, the sessions' verdict, the control plane, and the stream to the
//! client. UDP to the tunnels' port is dropped between the nodes, in one direction at a time and without an ICMP error, so that the
//! control plane goes on and reports nothing by itself.

use std::{process::Command, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use nsm_stats::{max, median, p99_name, quantile};
use nsm_world::{Fault, FaultGuard, Process, World, wait_until};
use serde_json::Value;

use super::{
    Setting, Size,
    processes::run_json,
    programs::Programs,
    report::{Bar::AtMost, Row},
    scene::Domains,
    sessions,
    sink::Sink,
};
use crate::demo::forget_tunnel;

const DETECTED_P99_MS: f64 = 200.0;

/// A VNI that the peer lacks is seen by the peer, whose agent looks a few times a second and then reports it.
const VNI_DETECTED_MS: f64 = 2000.0;

/// The port of tunnels.
const PORT: u16 = 4789;

/// Busy processes, each in a session of its own, twice as many as the CPUs of the machine that the bar is for.
const BUSY: usize = 4;

/// Of a thousand packets, in each direction.
const LOSS_PER_MILLE: u16 = 50;

const CONNECT_DEADLINE: Duration = Duration::from_secs(30);

/// Fifty times the bar: what takes longer counts as not detected.
const DETECTION_DEADLINE: Duration = Duration::from_secs(10);

/// A session that is down probes once a second.
const UP_DEADLINE: Duration = Duration::from_secs(30);

/// Between one cut and the next, so that each meets a path that has been good for a while.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) fn measure(setting: &Setting<'_>, sink: &Sink) -> Result<()> {
    if setting.size == Size::Pair {
        // A cut takes seconds and its time scatters widely; what sessions cost can be paired.
        return sessions::prober(setting, BUSY, sink);
    }
    let programs = setting.built.world()?;
    let (rounds, minutes) = match setting.size {
        Size::Quick => (5, 0.1),
        _ => (50, setting.minutes),
    };
    sessions::throughput(setting, &programs, sink)?;
    sessions::prober(setting, BUSY, sink)?;

    sink.step("two domains");
    let domains = Domains::build(&programs)?;
    let watch = Watch::start(&domains, &programs)?;
    all_cuts(&domains, &watch, rounds, sink)?;
    false_alarms(&domains, &watch, minutes, sink)?;
    watch.end()?;

    let rounds_of_vni = rounds.div_ceil(5);
    sink.step(format!("{rounds_of_vni} lost tunnels"));
    let times = lost_tunnels(&domains, &programs, rounds_of_vni)?;
    let worst = max(&times).context("no tunnel was lost")?;
    let what = "DOWN received, VNI lost at the peer, worst";
    sink.row(Row::new(what, worst, "ms", times.len() as u64).bar(AtMost(VNI_DETECTED_MS)));
    sink.note(format!(
        "{rounds_of_vni} connections whose tunnel vanished at the endpoint's node while a ping ran"
    ));
    Ok(())
}

/// Cuts in each direction, on an idle and on a busy machine.
fn all_cuts(domains: &Domains, watch: &Watch, rounds: usize, sink: &Sink) -> Result<()> {
    for busy in [0, BUSY] {
        let _busy = keep_busy(&domains.world, busy)?;
        for direction in [Direction::Out, Direction::In] {
            let what = format!("DOWN received, way {} cut, {busy} busy", direction.name());
            sink.step(format!("{rounds} times {what}"));
            let times =
                cuts(domains, watch, direction, rounds).with_context(|| domains.world.logs())?;
            let n = times.len() as u64;
            let p99 = quantile(&times, 0.99).context("nothing was cut")?;
            let p50 = median(&times).context("nothing was cut")?;
            let row =
                |quantile: &str, value| Row::new(format!("{what}, {quantile}"), value, "ms", n);
            sink.row(row(p99_name(n), p99).bar(AtMost(DETECTED_P99_MS)));
            sink.row(row("p50", p50));
        }
    }
    sink.note(format!(
        "{rounds} cuts a row, from before nft was started to the UPDATE with state DOWN at the client"
    ));
    Ok(())
}

/// Seen from the client's node.
#[derive(Debug, Clone, Copy)]
enum Direction {
    Out,
    In,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::In => "in",
        }
    }

    fn inject(self, domains: &Domains, fault: Fault) -> Result<FaultGuard> {
        let (near, far) = (domains.client_agent.node(), domains.endpoint_agent.node());
        let (from, to) = match self {
            Self::Out => (near, far),
            Self::In => (far, near),
        };
        Ok(domains.world.inject(from, to, fault)?)
    }
}

/// Cuts the path again and again; milliseconds until the DOWN of each was received.
fn cuts(domains: &Domains, watch: &Watch, direction: Direction, rounds: usize) -> Result<Vec<f64>> {
    let mut times = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let before = watch.lines().len();
        let cut_at = monotonic_ns()?;
        let cut = direction.inject(domains, Fault::BlockUdp { port: PORT })?;
        let at = watch
            .wait(before, "DOWN", DETECTION_DEADLINE, is_down)
            .with_context(|| format!("cut {round} of the way {}", direction.name()))?;
        times.push(at.saturating_sub(cut_at) as f64 / 1e6);
        let before = watch.lines().len();
        cut.heal();
        watch.wait(before, "UP", UP_DEADLINE, is_up)?;
        thread::sleep(PAUSE);
    }
    Ok(times)
}

fn false_alarms(domains: &Domains, watch: &Watch, minutes: f64, sink: &Sink) -> Result<()> {
    let duration = Duration::from_secs_f64(minutes * 60.0);
    let during = |what: &str, load: &dyn Fn() -> Result<()>| -> Result<()> {
        sink.step(format!("{minutes} minutes of {what}"));
        let from = watch.lines().len();
        load()?;
        let alarms = watch
            .lines()
            .iter()
            .skip(from)
            .filter(|line| is_down(line))
            .count();
        let what_row = format!("false alarms, {what}");
        sink.row(Row::new(what_row, alarms as f64, "", 1).bar(AtMost(0.0)));
        // A watch that has ended would show no alarm either: a cut must still be seen.
        cuts(domains, watch, Direction::Out, 1)
            .with_context(|| format!("a cut after the minutes of {what}"))?;
        Ok(())
    };
    during("idle", &|| {
        thread::sleep(duration);
        Ok(())
    })?;
    during("saturated and busy", &|| saturate(domains, watch, duration))?;
    during("5 % loss", &|| {
        let loss = Fault::Loss {
            per_mille: LOSS_PER_MILLE,
        };
        let _out = Direction::Out.inject(domains, loss)?;
        let _in = Direction::In.inject(domains, loss)?;
        thread::sleep(duration);
        Ok(())
    })?;
    sink.note(format!(
        "false alarms are DOWNs received while the path was not cut, within {minutes} minutes each; at loss each direction loses \
         {LOSS_PER_MILLE} of 1000 packets at random, of round trips nearly twice as many"
    ));
    Ok(())
}

/// Lets the endpoint's node lose its end of one tunnel after another; milliseconds until the client received the DOWN of each.
fn lost_tunnels(domains: &Domains, programs: &Programs, rounds: usize) -> Result<Vec<f64>> {
    let mut times = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let watch = Watch::start(domains, programs)?;
        let status = domains.client_agent.status()?;
        let vni = status["connections"][0]["tunnel"]["vni"].as_u64();
        let vni =
            vni.with_context(|| format!("no VNI in the status of the client's agent: {status}"))?;
        let mut ping = domains.client_pod.command("ping")?;
        ping.args(["-i", "0.05", &watch.address]);
        let ping = domains.world.spawn("ping", ping)?;
        ping.wait_for_line("time=", CONNECT_DEADLINE)?;
        let before = watch.lines().len();
        let lost_at = monotonic_ns()?;
        forget_tunnel(domains.endpoint_agent.node(), vni)?;
        let at = watch
            .wait(before, "DOWN for its VNI", DETECTION_DEADLINE, |line| {
                let reason = line["metrics"]["sbfd_reason"].as_str();
                is_down(line) && reason.is_some_and(|reason| reason.contains("VNI"))
            })
            .with_context(|| format!("lost tunnel {round}"))?;
        times.push(at.saturating_sub(lost_at) as f64 / 1e6);
        watch.end()?;
    }
    Ok(times)
}

/// As much TCP as goes, beside busy processes.
fn saturate(domains: &Domains, watch: &Watch, duration: Duration) -> Result<()> {
    let world = &domains.world;
    let _busy = keep_busy(world, BUSY)?;
    let mut server = domains.endpoint_pod.command("iperf3")?;
    server.args(["--server", "--forceflush"]);
    let server = world.spawn("iperf3-server", server)?;
    server.wait_for_line("Server listening", CONNECT_DEADLINE)?;
    let mut client = domains.client_pod.command("iperf3")?;
    client
        .args(["--json", "--client", &watch.address])
        .args(["--time", &duration.as_secs().max(1).to_string()]);
    let output: Value = run_json(world, "iperf3", client, duration + CONNECT_DEADLINE)?;
    let rate = output["end"]["sum_received"]["bits_per_second"].as_f64();
    ensure!(
        rate > Some(0.0),
        "nothing went through the tunnel: {}",
        output["end"]
    );
    Ok(())
}

fn keep_busy(world: &World, count: usize) -> Result<Vec<Process>> {
    let spawn = |number| {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        Ok(world.spawn_apart(&format!("busy-{number}"), command)?)
    };
    (0..count).map(spawn).collect()
}

/// `nsm-load watch`: a client that holds its connection and notes the events that it receives.
struct Watch {
    process: Process,
    /// The endpoint's, in the tunnel.
    address: String,
}

impl Watch {
    fn start(domains: &Domains, programs: &Programs) -> Result<Self> {
        let agent = &domains.client_agent;
        let mut command = agent.node().command(&programs.load)?;
        command
            .args(["watch", "--connect-to", &agent.nsmgr_url()])
            .args(["--service", &Domains::service(), "--netns"])
            .arg(domains.client_pod.netns());
        let process = domains.world.spawn("watch", command)?;
        let address = process.wait_for("the connection", CONNECT_DEADLINE, |line| {
            let line: Value = serde_json::from_str(line).ok()?;
            let address = line["dst_addresses"][0].as_str()?;
            Some(address.split('/').next()?.to_owned())
        })?;
        let watch = Self { process, address };
        watch
            .wait(0, "UP with both ways proved", UP_DEADLINE, is_up)
            .with_context(|| domains.world.logs())?;
        Ok(watch)
    }

    /// Closes its connection.
    fn end(self) -> Result<()> {
        let status = self.process.terminate(CONNECT_DEADLINE)?;
        ensure!(
            status.success(),
            "the client did not end well: {}",
            self.process.stderr()
        );
        Ok(())
    }

    /// All events.
    fn lines(&self) -> Vec<Value> {
        let text = self.process.stdout();
        // The last line may not be whole yet.
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// When the first line behind `from` came that `is`.
    fn wait(
        &self,
        from: usize,
        what: &str,
        deadline: Duration,
        is: impl Fn(&Value) -> bool,
    ) -> Result<u64> {
        let mut at = None;
        wait_until(format!("{what} at the client's monitor"), deadline, || {
            let lines = self.lines();
            let found = lines.iter().skip(from).find(|line| is(line));
            at = found.and_then(|line| line["at_ns"].as_u64());
            at.is_some()
        })
        .with_context(|| format!("the last event was {:?}", self.lines().last()))?;
        at.context("a line without its time")
    }
}

fn is_down(line: &Value) -> bool {
    line["state"] == "DOWN"
}

fn is_up(line: &Value) -> bool {
    let ways = ["sbfd_state_in", "sbfd_state_out"];
    line["state"] == "UP" && ways.iter().all(|way| line["metrics"][way] == "up")
}

fn monotonic_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("read the clock")?;
    let nanos = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
    Ok(u64::try_from(nanos)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_are_understood() {
        let line = |state: &str, inward: &str, out: &str| {
            json!({"at_ns": 7, "event": "update", "state": state,
                "metrics": {"sbfd_state_in": inward, "sbfd_state_out": out}})
        };
        assert!(is_down(&line("DOWN", "down", "unknown")));
        assert!(!is_down(&line("UP", "up", "up")));
        assert!(is_up(&line("UP", "up", "up")));
        for not_up in [
            line("DOWN", "up", "up"),
            line("UP", "up", "unknown"),
            json!({"state": "UP", "metrics": {}}),
        ] {
            assert!(!is_up(&not_up), "{not_up}");
        }
    }
}
