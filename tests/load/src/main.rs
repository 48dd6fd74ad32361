//! Loads of NSM v1 calls through agents that run already, bounded and measured; each prints JSON, one object a line.
//!
//! `pairs` and `hold` bring an endpoint of their own and ask an agent's proxy, as an NSMgr does: what they measure is agents and
//! wire, not a datapath. `setup` and `watch` are clients like any other, on the node's socket, and get real links.

#![forbid(unsafe_code)]

mod endpoint;
mod proxied;
mod setup;
mod watch;

use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

#[derive(Debug, Parser)]
#[command(about, version)]
enum Command {
    /// Request and Close, again and again, so many at one time.
    Pairs {
        #[command(flatten)]
        target: Target,
        /// Request and Close pairs to run.
        #[arg(long, default_value_t = 10_000)]
        pairs: u64,
        /// Pairs to run before the measurement, so that every connection stands and every cache is warm.
        #[arg(long, default_value_t = 200)]
        warm_up: u64,
        /// Pairs at work at one time.
        #[arg(long, default_value_t = 8)]
        in_flight: usize,
    },
    /// Requests without a Close: says what it holds, and holds it until SIGTERM.
    Hold {
        #[command(flatten)]
        target: Target,
        /// Connections to open.
        #[arg(long, default_value_t = 10_000)]
        connections: u64,
    },
    /// Connections of a pod, one after the other, each made, timed and closed.
    Setup(setup::Arguments),
    /// One connection of a pod, held until SIGTERM: a line for each thing that the agent's monitor tells of it.
    Watch(watch::Arguments),
}

/// The agents of `pairs` and `hold`.
#[derive(Debug, Args)]
struct Target {
    /// Registry of the client's agent, as tcp://address:port.
    #[arg(long)]
    registry: String,
    /// Proxy of the client's agent.
    #[arg(long)]
    proxy: String,
    /// Registry of the endpoint's agent, where the endpoint is registered.
    #[arg(long)]
    endpoint_registry: String,
    /// The endpoint's domain as the client names it, such as 127.0.0.1:5005.
    #[arg(long)]
    domain: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Pairs {
            target,
            pairs,
            warm_up,
            in_flight,
        } => print(&proxied::pairs(&target, pairs, warm_up, in_flight).await?),
        Command::Hold {
            target,
            connections,
        } => {
            let mut terminate = signal(SignalKind::terminate()).context("listen to SIGTERM")?;
            let (report, held) = proxied::hold(&target, connections).await?;
            print(&report)?;
            terminate.recv().await;
            drop(held);
            Ok(())
        }
        Command::Setup(arguments) => print(&setup::run(&arguments).await?),
        Command::Watch(arguments) => watch::run(&arguments).await,
    }
}

/// Milliseconds.
fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The quantile, or 0 where nothing was measured: the report says beside it how many failed.
fn quantile(samples: &[f64], share: f64) -> f64 {
    nsm_stats::quantile(samples, share).unwrap_or_default()
}

fn print(report: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(report)?);
    Ok(())
}
