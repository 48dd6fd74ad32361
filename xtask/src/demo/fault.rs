//! `cargo xtask demo --fault KIND`: a fault on the way while a ping runs, and when and how the client's agent reports it.

use std::{
    str::FromStr,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use nsm_world::{Agent, Fault, FaultGuard, Process, Signal, World, wait_until};
use serde_json::Value;

mod clock;
mod forget;

use self::clock::rfc3339;
pub(crate) use self::forget::forget_tunnel;
use super::{
    Scene,
    report::{FaultReport, Ping},
    transcript::Transcript,
};

/// The port of tunnels.
const VXLAN_PORT: u16 = 4789;

/// The longest underlay packet that passes an `mtu` fault.
const NARROW: u16 = 1280;

/// An inner packet of the ping that passes before an `mtu` fault, and then no longer: ICMP data, bytes.
const WIDE_PING: &str = "1350";

/// `status` shows a lost path within a fraction of a second; on a machine that builds at the same time, within some seconds.
const TOLD_DEADLINE: Duration = Duration::from_secs(10);

/// A search for the path's MTU waits seconds for its timers (RFC 8899 section 5.1.1), and a loss shows in the statistics of a minute.
const SLOWLY_TOLD_DEADLINE: Duration = Duration::from_secs(90);

/// When the fault is gone, the sessions find out by slow probes, and the agents may ask for the connection again.
const RECOVERED_DEADLINE: Duration = Duration::from_secs(30);

/// The path is watched before anything is broken.
const WATCHED_DEADLINE: Duration = Duration::from_secs(20);

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing passes, in either direction.
    Blackhole,
    /// Nothing passes from the client's node.
    OneWay,
    /// Packets above [`NARROW`] bytes vanish, in both directions and without a word.
    Mtu,
    /// The endpoint's node has lost its end of the tunnel, and gets packets of a VNI that is no tunnel there.
    VniMismatch,
    /// The client's node itself does not let tunnel packets in.
    Firewall4789,
    /// Only replies to what the client's node sent reach it.
    NatRepliesOnly,
    /// Packets are lost at random, this share of a hundred in each direction.
    Loss(u8),
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "blackhole" => Self::Blackhole,
            "one-way" => Self::OneWay,
            "mtu" => Self::Mtu,
            "vni-mismatch" => Self::VniMismatch,
            "firewall-4789" => Self::Firewall4789,
            "nat-replies-only" => Self::NatRepliesOnly,
            _ => {
                let percent = text
                    .strip_prefix("loss=")
                    .and_then(|text| text.parse().ok());
                match percent {
                    Some(percent @ 1..=50) => Self::Loss(percent),
                    _ => {
                        return Err("blackhole, one-way, mtu, vni-mismatch, firewall-4789, nat-replies-only or loss=PERCENT (1 to 50)".to_owned());
                    }
                }
            }
        })
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Blackhole => f.write_str("blackhole"),
            Self::OneWay => f.write_str("one-way"),
            Self::Mtu => f.write_str("mtu"),
            Self::VniMismatch => f.write_str("vni-mismatch"),
            Self::Firewall4789 => f.write_str("firewall-4789"),
            Self::NatRepliesOnly => f.write_str("nat-replies-only"),
            Self::Loss(percent) => write!(f, "loss={percent}"),
        }
    }
}

impl Kind {
    /// For people.
    fn words(self) -> String {
        match self {
            Self::Blackhole => "everything between the nodes is lost".to_owned(),
            Self::OneWay => "tunnel packets from node-1 to node-2 are lost".to_owned(),
            Self::Mtu => format!("packets above {NARROW} bytes are lost without a word"),
            Self::VniMismatch => "node-2 has the tunnel's VNI no more".to_owned(),
            Self::Firewall4789 => format!("node-1's own firewall drops UDP {VXLAN_PORT}"),
            Self::NatRepliesOnly => "only replies reach node-1".to_owned(),
            Self::Loss(percent) => {
                format!("{percent} of 100 packets are lost in each direction")
            }
        }
    }

    fn inject(self, world: &World, near: &Agent, far: &Agent, vni: u64) -> Result<Vec<FaultGuard>> {
        let (near, far) = (near.node(), far.node());
        let out = |fault| world.inject(near, far, fault);
        let both = |fault| -> Result<Vec<FaultGuard>> {
            Ok(vec![out(fault)?, world.inject(far, near, fault)?])
        };
        let port = VXLAN_PORT;
        match self {
            Self::Blackhole => both(Fault::DropAll),
            Self::OneWay => Ok(vec![out(Fault::BlockUdp { port })?]),
            Self::Mtu => both(Fault::MtuBlackHole { max: NARROW }),
            Self::VniMismatch => {
                forget_tunnel(far, vni)?;
                Ok(Vec::new())
            }
            Self::Firewall4789 => Ok(vec![world.close_port(near, port)?]),
            Self::NatRepliesOnly => Ok(vec![world.inject(
                far,
                near,
                Fault::RepliesOnly { port },
            )?]),
            Self::Loss(percent) => both(Fault::Loss {
                per_mille: u16::from(percent) * 10,
            }),
        }
    }

    fn deadline(self) -> Duration {
        match self {
            Self::Mtu | Self::Loss(_) => SLOWLY_TOLD_DEADLINE,
            _ => TOLD_DEADLINE,
        }
    }

    /// Whether a status shows this fault, and not just any.
    fn is_shown(self, health: &Health, before: &Health) -> bool {
        match self {
            // Nothing of the peer comes in; only the peer has evidence of our own packets.
            Self::Blackhole => health.inward.is_down(),
            Self::OneWay => health.out.is_down(),
            Self::VniMismatch => health.out.is_down() && health.out.reason.contains("VNI"),
            Self::NatRepliesOnly => health.inward.is_down(),
            Self::Firewall4789 => {
                health.inward.is_down() && health.inward.reason.contains("firewall")
            }
            Self::Mtu => match (before.path_mtu, health.path_mtu) {
                (Some(before), Some(now)) => now < before && now < u64::from(NARROW),
                _ => false,
            },
            // Of round trips twice as many are lost; half of that is more than chance.
            Self::Loss(percent) => health
                .loss
                .is_some_and(|loss| loss * 100.0 >= percent.into()),
        }
    }

    /// The direction in which `status` shows the fault, and why.
    fn account(self, health: &Health) -> (&'static str, String) {
        match self {
            Self::Mtu => (
                "both",
                format!(
                    "the path carries inner packets of {} bytes",
                    health.path_mtu.unwrap_or_default()
                ),
            ),
            Self::Loss(_) => (
                "both",
                format!(
                    "{:.1} % of probes stay unanswered",
                    health.loss.unwrap_or_default() * 100.0
                ),
            ),
            _ => match (health.inward.is_down(), health.out.is_down()) {
                (true, true) => (
                    "both",
                    format!("{}; {}", health.out.reason, health.inward.reason),
                ),
                (false, true) => ("out", health.out.reason.clone()),
                _ => ("in", health.inward.reason.clone()),
            },
        }
    }
}

/// Breaks the way while a ping runs, waits until the client's agent reports it, and repairs the path.
pub(super) fn show(
    kind: Kind,
    scene: &Scene,
    address: &str,
    transcript: &mut Transcript,
) -> Result<FaultReport> {
    let near = &scene.client_agent;
    let mut before = None;
    wait_until("both ways to be proved", WATCHED_DEADLINE, || {
        before = near.status().ok().as_ref().and_then(Health::of);
        before.as_ref().is_some_and(|health| {
            // The sign of a narrow path is its MTU: the search finds it after both directions are up.
            health.is_up() && (kind != Kind::Mtu || health.path_mtu.is_some())
        })
    })
    .with_context(|| format!("the agent's status before the fault: {before:?}"))?;
    let before = before.context("the agent reports no health of the path")?;
    let ping = start_ping(kind, scene, address)?;

    let injected_at = rfc3339(SystemTime::now());
    let start = Instant::now();
    let guards = kind.inject(&scene.world, near, &scene.endpoint_agent, before.vni)?;
    transcript.step(&format!("fault {kind}: {}", kind.words()));
    let (health, detected_ms) = wait_shown(kind, near, &before, start)?;
    let (direction, reason) = kind.account(&health);
    transcript.step(&format!(
        "shown after {detected_ms:.0} ms: {} ({direction}): {reason}",
        health.state
    ));
    for agent in [near, &scene.endpoint_agent] {
        transcript.text(&agent.status_table()?);
    }

    drop(guards);
    let mended = Instant::now();
    transcript.step(match kind {
        Kind::VniMismatch => "the client's next Request mends it",
        _ => "the fault is gone",
    });
    wait_until("both ways to be up again", RECOVERED_DEADLINE, || {
        let health = near.status().ok().as_ref().and_then(Health::of);
        health.is_some_and(|health| health.is_up())
    })?;
    let recovered_ms = milliseconds(mended.elapsed());
    let ping = end_ping(&ping)?;
    transcript.step(&format!(
        "both ways are up again after {recovered_ms:.0} ms; {} of {} pings were answered meanwhile",
        ping.received, ping.sent
    ));
    Ok(FaultReport {
        kind: kind.to_string(),
        injected_at,
        detected_ms,
        state: health.state,
        direction,
        reason,
        recovered_ms,
        ping,
    })
}

fn wait_shown(kind: Kind, near: &Agent, before: &Health, start: Instant) -> Result<(Health, f64)> {
    let mut last = None;
    loop {
        let health = near.status().ok().as_ref().and_then(Health::of);
        let elapsed = start.elapsed();
        if let Some(health) = health {
            if kind.is_shown(&health, before) {
                return Ok((health, milliseconds(elapsed)));
            }
            last = Some(health);
        }
        if elapsed > kind.deadline() {
            bail!(
                "the agent did not report {kind} within {:?}; it reports {last:?}",
                kind.deadline()
            );
        }
    }
}

/// To a tenth: a `status` is no more exact.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e4).round() / 10.0
}

fn start_ping(kind: Kind, scene: &Scene, address: &str) -> Result<Process> {
    let mut command = scene.client_pod.command("ping")?;
    command.args(["-i", "0.05", "-W", "1"]);
    if kind == Kind::Mtu {
        command.args(["-s", WIDE_PING]);
    }
    command.arg(address);
    let ping = scene.world.spawn("ping", command)?;
    ping.wait_for_line("time=", WATCHED_DEADLINE)?;
    Ok(ping)
}

/// The result, which ping prints on SIGINT.
fn end_ping(ping: &Process) -> Result<Ping> {
    ping.signal(Signal::SIGINT);
    ping.wait(TOLD_DEADLINE)?;
    let printed = ping.stdout();
    Ping::parse(&printed)
        .with_context(|| format!("ping printed neither sent nor received: {printed}"))
}

/// The health of a connection's path as `status --json` has it.
#[derive(Debug, Clone, PartialEq)]
struct Health {
    state: String,
    inward: Way,
    out: Way,
    path_mtu: Option<u64>,
    loss: Option<f64>,
    /// Of the tunnel that takes the path now.
    vni: u64,
}

#[derive(Debug, Clone, PartialEq)]
struct Way {
    state: String,
    reason: String,
}

impl Way {
    fn of(way: &Value) -> Self {
        let text = |key: &str| way[key].as_str().unwrap_or_default().to_owned();
        Self {
            state: text("state"),
            reason: text("reason"),
        }
    }

    fn is_down(&self) -> bool {
        self.state == "down"
    }
}

impl Health {
    /// That of the first connection: the demo has one.
    fn of(status: &Value) -> Option<Self> {
        let connection = &status["connections"][0];
        let health = &connection["health"];
        Some(Self {
            state: health["state"].as_str()?.to_owned(),
            inward: Way::of(&health["in"]),
            out: Way::of(&health["out"]),
            path_mtu: health["path_mtu"].as_u64(),
            loss: health["loss"].as_f64(),
            vni: connection["tunnel"]["vni"].as_u64()?,
        })
    }

    fn is_up(&self) -> bool {
        self.state == "up"
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn kinds_are_read_and_shown() {
        for text in [
            "blackhole",
            "one-way",
            "mtu",
            "vni-mismatch",
            "firewall-4789",
            "nat-replies-only",
            "loss=30",
        ] {
            assert_eq!(text.parse::<Kind>().unwrap().to_string(), text);
        }
        for text in ["", "loss", "loss=0", "loss=51", "loss=x", "firewall"] {
            assert!(text.parse::<Kind>().is_err(), "{text}");
        }
    }

    #[test]
    fn each_fault_is_shown_by_its_own_signs() {
        let status = |state: &str, out: [&str; 2], inward: [&str; 2], mtu: u64, loss: f64| {
            let way = |[state, reason]: [&str; 2]| json!({"state": state, "reason": reason});
            let health = json!({"state": state, "out": way(out), "in": way(inward),
                "path_mtu": mtu, "loss": loss});
            let tunnel = json!({"vni": 7});
            let connection = json!({"health": health, "tunnel": tunnel});
            Health::of(&json!({ "connections": [connection] })).unwrap()
        };
        let up = ["up", "answered"];
        let before = status("up", up, up, 1450, 0.0);
        let out = status("down", ["down", "unanswered"], up, 1450, 0.0);
        let vni = status("down", ["down", "sees VNI 7"], up, 1450, 0.0);
        let inward = status("down", ["unknown", ""], ["down", "firewall"], 1450, 0.0);
        let narrow = status("up", up, up, 1230, 0.0);
        let lossy = status("up", up, up, 1450, 0.5);
        let all = [&before, &out, &vni, &inward, &narrow, &lossy];
        for (kind, expected, direction) in [
            ("blackhole", vec![&inward], "in"),
            ("one-way", vec![&out, &vni], "out"),
            ("vni-mismatch", vec![&vni], "out"),
            ("firewall-4789", vec![&inward], "in"),
            ("nat-replies-only", vec![&inward], "in"),
            ("mtu", vec![&narrow], "both"),
            ("loss=30", vec![&lossy], "both"),
        ] {
            let kind: Kind = kind.parse().unwrap();
            let found: Vec<_> = all
                .into_iter()
                .filter(|health| kind.is_shown(health, &before))
                .collect();
            assert_eq!(found, expected, "{kind}");
            assert_eq!(kind.account(expected[0]).0, direction, "{kind}");
        }
        assert_eq!(Health::of(&json!({"connections": []})), None);
        assert_eq!(
            Health::of(&json!({"connections": [{"health": null}]})),
            None
        );
    }
}
