//! What the health plane of one node costs, and how fast answers come: a star of nodes in namespaces of its own, as JSON on
//! standard output. Needs root.
//!
//!     health_cost [peers=50] [connections=10000] [seconds=20] [busy=0] [user-space]
//!
//! The node in the middle watches all peers, they watch it. Counted is the time of its two threads by the kernel's own account;
//! what a probe does inside the kernel until its answer is back, in the peer's namespace too, is on the account of the thread that
//! sent it, for all of this is one machine. `busy` processes spin meanwhile, each in a session of its own.

mod world;

use std::{
    fs,
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _},
    process, thread,
    time::{Duration, Instant},
};

use nsm_core::liveness::sbfd::{Change, State};
use nsm_dataplane::liveness::{Event, Peer, Report};
use world::{Busy, Failure, ip, netns, number, sandbox, spec, start, within};

struct Wanted {
    peers: usize,
    connections: usize,
    seconds: u64,
    busy: usize,
}

fn main() -> Result<(), Failure> {
    let wanted = Wanted {
        peers: number("peers", 50).clamp(1, 250),
        connections: number("connections", 10_000),
        seconds: number("seconds", 20) as u64,
        busy: number("busy", 0),
    };
    sandbox(measure(&wanted))
}

async fn measure(wanted: &Wanted) -> Result<(), Failure> {
    // The middle is node 0; its cables lead to all others.
    let middle = netns()?;
    let mut namespaces = Vec::new();
    for number in 1..=wanted.peers {
        let outer = netns()?;
        within(&middle, || {
            let path = format!("/proc/{}/fd/{}", process::id(), outer.as_fd().as_raw_fd());
            ip(&format!(
                "link add to{number} type veth peer name eth0 netns {path}"
            ))?;
            ip(&format!("addr add 10.1.{number}.254/24 dev to{number}"))?;
            ip(&format!("link set to{number} up"))
        })?;
        within(&outer, || {
            ip(&format!("addr add 10.1.{number}.1/24 dev eth0"))?;
            ip("link set eth0 up")
        })?;
        namespaces.push(outer);
    }
    let interfaces = (1..=wanted.peers).map(|number| format!("to{number}"));
    let before = threads()?;
    let mut centre = start(&middle, 0, interfaces.collect())?;
    let of_centre: Vec<String> = threads()?
        .into_iter()
        .filter(|thread| !before.contains(thread))
        .collect();
    let mut nodes = Vec::new();
    for (number, netns) in (1..).zip(&namespaces) {
        nodes.push(start(netns, number, vec!["eth0".to_owned()])?);
    }
    let mut guards: Vec<Peer> = Vec::new();
    for (number, node) in (1..).zip(&nodes) {
        let address = format!("10.1.{number}.254");
        guards.push(node.health.join(spec(&centre, address.parse()?)).await?);
    }
    for connection in 0..wanted.connections.max(nodes.len()) {
        let at = connection % nodes.len();
        let address: IpAddr = format!("10.1.{}.1", at + 1).parse()?;
        guards.push(centre.health.join(spec(&nodes[at], address)).await?);
    }
    for guard in &guards {
        guard.prove().await?;
    }

    let busy: Vec<Busy> = (0..wanted.busy)
        .map(|_| Busy::start(wanted.seconds + 60))
        .collect::<Result<_, _>>()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    while centre.events.try_recv().is_ok() {}
    let (start_ns, start) = (run_time(&of_centre)?, Instant::now());
    let probes_before = centre.health.reports().await?;
    let mut reflections = Vec::new();
    while start.elapsed() < Duration::from_secs(wanted.seconds) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        // On the other nodes, whose threads are not those that are counted.
        for guard in &guards[..nodes.len()] {
            reflections.extend(guard.report().await?.reflection);
        }
    }
    let spent = Duration::from_nanos(run_time(&of_centre)? - start_ns);
    let took = start.elapsed();
    let reports = centre.health.reports().await?;
    drop(busy);

    let mut alarms = 0;
    while let Ok(event) = centre.events.try_recv() {
        if let Event::Session {
            change: Change::State { to, .. },
            ..
        } = event
        {
            alarms += usize::from(to != State::Up);
        }
    }
    let sum = |reports: &[Report]| -> u64 { reports.iter().map(|report| report.probes).sum() };
    let probes = sum(&reports) - sum(&probes_before);
    let micros = |value: Option<Duration>| value.map_or(f64::NAN, |v| v.as_nanos() as f64 / 1e3);
    let mut p50: Vec<f64> = reports
        .iter()
        .map(|r| micros(r.statistics.rtt_p50))
        .collect();
    let mut p99: Vec<f64> = reports
        .iter()
        .map(|r| micros(r.statistics.rtt_p99))
        .collect();
    reflections.sort_unstable();
    let quantile = |share: f64| {
        let index = (reflections.len() as f64 * share).ceil() as usize;
        micros(reflections.get(index.max(1) - 1).copied())
    };
    p50.sort_by(f64::total_cmp);
    p99.sort_by(f64::total_cmp);
    println!(
        r#"{{"peers":{},"connections":{},"busy":{},"realtime":{},"seconds":{:.1},"cpu_percent":{:.2},"probes_per_second":{:.0},"us_per_probe":{:.1},"reflections":{},"reflection_p50_us":{:.1},"reflection_p99_us":{:.1},"rtt_p50_us":{:.1},"rtt_p99_us":{:.1},"rtt_p99_worst_peer_us":{:.1},"false_alarms":{alarms}}}"#,
        reports.len(),
        wanted.connections,
        wanted.busy,
        centre.health.has_realtime(),
        took.as_secs_f64(),
        100.0 * spent.as_secs_f64() / took.as_secs_f64(),
        probes as f64 / took.as_secs_f64(),
        spent.as_secs_f64() * 1e6 / probes as f64,
        reflections.len(),
        quantile(0.50),
        quantile(0.99),
        p50[p50.len() / 2],
        p99[p99.len() / 2],
        p99[p99.len() - 1],
    );
    drop(guards);
    for node in nodes {
        node.end().await?;
    }
    centre.end().await?;
    Ok(())
}

fn threads() -> Result<Vec<String>, Failure> {
    // A thread that was just started may not be listed under its name yet.
    thread::sleep(Duration::from_millis(20));
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/task")? {
        found.push(entry?.path().display().to_string());
    }
    Ok(found)
}

/// Nanoseconds on a processor (the first number of schedstat).
fn run_time(threads: &[String]) -> Result<u64, Failure> {
    let mut sum = 0;
    for thread in threads {
        let text = fs::read_to_string(format!("{thread}/schedstat"))?;
        let first = text.split_whitespace().next().ok_or("no schedstat")?;
        sum += first.parse::<u64>()?;
    }
    Ok(sum)
}
