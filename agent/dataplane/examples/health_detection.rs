//! How soon a silent drop is detected: two nodes and a router in namespaces of their own, as JSON on standard output. Needs root.
//!
//!     health_detection [times=50] [busy=0] [user-space]
//!
//! The router stops forwarding what comes from one node or the other, in turn, without an ICMP message. `verdict` is when the
//! prober detects it, `told` when a task of an ordinary thread receives the event. `busy` processes spin meanwhile.

mod world;

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    process,
    time::Duration,
};

use nsm_core::{
    clock::Monotonic,
    liveness::sbfd::{Change, State},
};
use nsm_dataplane::{bpf::now, liveness::Event, netns::Netns};
use world::{Busy, Failure, Node, ip, netns, number, sandbox, spec, start, within};

fn main() -> Result<(), Failure> {
    sandbox(measure())
}

async fn measure() -> Result<(), Failure> {
    let (times, busy) = (number("times", 50), number("busy", 0));
    let router = netns()?;
    let namespaces = [netns()?, netns()?];
    within(&router, || {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        for (side, node) in (1..).zip(&namespaces) {
            let path = format!("/proc/{}/fd/{}", process::id(), node.as_fd().as_raw_fd());
            ip(&format!(
                "link add to{side} type veth peer name eth0 netns {path}"
            ))?;
            ip(&format!("addr add 10.{side}.0.254/24 dev to{side}"))?;
            ip(&format!("link set to{side} up"))?;
        }
        Ok(())
    })?;
    let mut nodes = Vec::new();
    for (side, netns) in (1..).zip(&namespaces) {
        within(netns, || {
            ip(&format!("addr add 10.{side}.0.1/24 dev eth0"))?;
            ip("link set eth0 up")?;
            ip(&format!("route add default via 10.{side}.0.254"))
        })?;
        nodes.push(start(netns, side, vec!["eth0".to_owned()])?);
    }
    let to_one = nodes[1]
        .health
        .join(spec(&nodes[0], "10.1.0.1".parse()?))
        .await?;
    let to_two = nodes[0]
        .health
        .join(spec(&nodes[1], "10.2.0.1".parse()?))
        .await?;
    to_one.prove().await?;
    to_two.prove().await?;
    let spinning: Vec<Busy> = (0..busy)
        .map(|_| Busy::start(times as u64 * 3 + 60))
        .collect::<Result<_, _>>()?;

    let (mut verdicts, mut told) = (Vec::new(), Vec::new());
    for time in 0..times {
        for node in &mut nodes {
            settle(node, true).await;
        }
        // At any moment between two probes.
        tokio::time::sleep(Duration::from_micros(
            500_000 + (time as u64 * 7_919) % 50_000,
        ))
        .await;
        let side = 1 + time % 2;
        let fault = now();
        forward(&router, side, false)?;
        // The node that is cut off and the other: a session goes both ways, so both must see it.
        for node in &mut nodes {
            let at = settle(node, false).await;
            verdicts.push(at.since(fault));
            told.push(now().since(fault));
        }
        forward(&router, side, true)?;
    }
    drop(spinning);
    let (verdict, told) = (quantiles(verdicts), quantiles(told));
    println!(
        r#"{{"faults":{times},"busy":{busy},"realtime":{},"verdict_ms":{verdict},"told_ms":{told}}}"#,
        nodes[0].health.has_realtime(),
    );
    drop((to_one, to_two));
    for node in nodes {
        node.end().await?;
    }
    Ok(())
}

/// Whether the router forwards what comes from a side. Off, it drops that without an ICMP message.
fn forward(router: &Netns, side: usize, on: bool) -> Result<(), Failure> {
    within(router, || {
        let path = format!("/proc/sys/net/ipv4/conf/to{side}/forwarding");
        Ok(fs::write(path, if on { "1" } else { "0" })?)
    })
}

/// Waits for the node's session to be up or down: since when it is.
async fn settle(node: &mut Node, up: bool) -> Monotonic {
    loop {
        if let Ok(reports) = node.health.reports().await
            && let [report] = reports.as_slice()
            && report.snapshot.state == (if up { State::Up } else { State::Down })
        {
            return report.snapshot.since;
        }
        let Some(event) = node.events.recv().await else {
            continue;
        };
        if let Event::Session {
            change: Change::State { at, to, .. },
            ..
        } = event
            && (to == State::Up) == up
        {
            return at;
        }
    }
}

fn quantiles(mut values: Vec<Duration>) -> String {
    values.sort_unstable();
    let at = |share: f64| {
        let index = (values.len() as f64 * share).ceil() as usize;
        values[index.clamp(1, values.len()) - 1].as_secs_f64() * 1e3
    };
    format!(
        r#"{{"p50":{:.1},"p99":{:.1},"max":{:.1}}}"#,
        at(0.5),
        at(0.99),
        at(1.0)
    )
}
