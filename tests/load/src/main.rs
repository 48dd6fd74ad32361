//! A bounded load of Request and Close, through agents that run already, with the endpoint in this
//! process: what is measured is the agents and the wire, not a datapath.
//!
//! The client finds the endpoint through the first agent's registry, as an NSMgr does, and then
//! asks that agent's proxy. Every worker closes what it asked for before it asks again.

#![forbid(unsafe_code)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use clap::Parser;
use nsm_controlplane::{dial::dial, token::TokenSource};
use nsm_proto::{
    connection::{Connection, Mechanism, Path, PathSegment},
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
    registry::{
        NetworkServiceEndpoint, NetworkServiceEndpointQuery,
        network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    },
};
use serde::Serialize;
use tokio_stream::StreamExt as _;
use tonic::{Request, transport::Channel};

mod endpoint;

/// Requests before the measurement, so that every connection stands and every cache is warm.
const WARM_UP: u64 = 200;

#[derive(Debug, Parser)]
#[command(about, version)]
struct Args {
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
    /// Request and Close pairs to run.
    #[arg(long, default_value_t = 10_000)]
    pairs: u64,
    /// Pairs at work at one time.
    #[arg(long, default_value_t = 8)]
    in_flight: usize,
    /// Leave the connections open instead of closing them, and wait for a line on standard input
    /// at the end.
    #[arg(long)]
    keep_open: bool,
}

/// What was measured, printed as JSON.
#[derive(Debug, Serialize)]
struct Report {
    pairs: u64,
    in_flight: usize,
    failed: u64,
    seconds: f64,
    pairs_per_second: f64,
    request_p50_ms: f64,
    request_p99_ms: f64,
    close_p50_ms: f64,
    close_p99_ms: f64,
    pair_p50_ms: f64,
    pair_p99_ms: f64,
    endpoint_holds: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let tokens = Arc::new(TokenSource::hs256(
        "spiffe://load.example/client",
        b"load",
        Duration::from_secs(600),
    ));
    let endpoint = endpoint::start().await?;
    register(&args, &tokens, &endpoint.url).await?;
    let name = find(&args, &tokens).await?;
    let channel = dial(&args.proxy, Duration::from_secs(5)).await?;

    let load = Load {
        channel,
        tokens,
        service: format!("load@{}", args.domain),
        endpoint: name,
        next: AtomicU64::new(0),
        keep_open: args.keep_open,
    };
    let load = Arc::new(load);
    if !args.keep_open {
        run(&load, WARM_UP, args.in_flight).await;
    }
    let began = Instant::now();
    let mut samples = run(&load, args.pairs, args.in_flight).await;
    let seconds = began.elapsed().as_secs_f64();
    let report = Report {
        pairs: args.pairs,
        in_flight: args.in_flight,
        failed: samples.failed,
        seconds,
        pairs_per_second: (args.pairs - samples.failed) as f64 / seconds,
        request_p50_ms: quantile(&mut samples.requests, 0.5),
        request_p99_ms: quantile(&mut samples.requests, 0.99),
        close_p50_ms: quantile(&mut samples.closes, 0.5),
        close_p99_ms: quantile(&mut samples.closes, 0.99),
        pair_p50_ms: quantile(&mut samples.pairs, 0.5),
        pair_p99_ms: quantile(&mut samples.pairs, 0.99),
        endpoint_holds: endpoint.holds(),
    };
    println!("{}", serde_json::to_string(&report)?);
    if args.keep_open {
        std::io::stdin()
            .read_line(&mut String::new())
            .context("standard input")?;
    }
    Ok(())
}

async fn register(args: &Args, tokens: &TokenSource, url: &str) -> anyhow::Result<()> {
    let channel = dial(&args.endpoint_registry, Duration::from_secs(5)).await?;
    let mut request = Request::new(NetworkServiceEndpoint {
        name: "load-endpoint".to_owned(),
        network_service_names: vec!["load".to_owned()],
        url: url.to_owned(),
        ..NetworkServiceEndpoint::default()
    });
    tokens.apply(request.metadata_mut());
    NetworkServiceEndpointRegistryClient::new(channel)
        .register(request)
        .await
        .context("cannot register the endpoint")?;
    Ok(())
}

async fn find(args: &Args, tokens: &TokenSource) -> anyhow::Result<String> {
    let channel = dial(&args.registry, Duration::from_secs(5)).await?;
    let mut request = Request::new(NetworkServiceEndpointQuery {
        network_service_endpoint: Some(NetworkServiceEndpoint {
            network_service_names: vec![format!("load@{}", args.domain)],
            ..NetworkServiceEndpoint::default()
        }),
        watch: false,
    });
    tokens.apply(request.metadata_mut());
    let mut found = NetworkServiceEndpointRegistryClient::new(channel)
        .find(request)
        .await
        .context("cannot find the endpoint")?
        .into_inner();
    let answer = found.next().await.context("no endpoint was found")??;
    Ok(answer.network_service_endpoint.unwrap_or_default().name)
}

struct Load {
    channel: Channel,
    tokens: Arc<TokenSource>,
    service: String,
    endpoint: String,
    next: AtomicU64,
    keep_open: bool,
}

#[derive(Default)]
struct Samples {
    requests: Vec<f64>,
    closes: Vec<f64>,
    pairs: Vec<f64>,
    failed: u64,
}

async fn run(load: &Arc<Load>, pairs: u64, in_flight: usize) -> Samples {
    let left = Arc::new(AtomicU64::new(pairs));
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..in_flight {
        let (load, left) = (Arc::clone(load), Arc::clone(&left));
        workers.spawn(async move {
            let mut samples = Samples::default();
            while left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
                .is_ok()
            {
                if let Err(error) = load.pair(&mut samples).await {
                    if samples.failed == 0 {
                        eprintln!("{error:#}");
                    }
                    samples.failed += 1;
                }
            }
            samples
        });
    }
    let mut all = Samples::default();
    while let Some(Ok(samples)) = workers.join_next().await {
        all.requests.extend(samples.requests);
        all.closes.extend(samples.closes);
        all.pairs.extend(samples.pairs);
        all.failed += samples.failed;
    }
    all
}

impl Load {
    async fn pair(&self, samples: &mut Samples) -> anyhow::Result<()> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut client = NetworkServiceClient::new(self.channel.clone());
        let began = Instant::now();
        let connection = client
            .request(self.with_token(self.ask(number)))
            .await
            .context("Request")?
            .into_inner();
        let asked = Instant::now();
        samples.requests.push(ms(asked - began));
        if !self.keep_open {
            client
                .close(self.with_token(connection))
                .await
                .context("Close")?;
            samples.closes.push(ms(asked.elapsed()));
        }
        samples.pairs.push(ms(began.elapsed()));
        Ok(())
    }

    fn ask(&self, number: u64) -> NetworkServiceRequest {
        let id = format!("load-{number}");
        let (token, expires) = self.tokens.token(SystemTime::now());
        NetworkServiceRequest {
            connection: Some(Connection {
                id: id.clone(),
                network_service: self.service.clone(),
                network_service_endpoint_name: self.endpoint.clone(),
                path: Some(Path {
                    index: 0,
                    path_segments: vec![PathSegment {
                        name: "load-client".to_owned(),
                        id,
                        token,
                        expires: Some(expires.into()),
                        ..PathSegment::default()
                    }],
                }),
                ..Connection::default()
            }),
            mechanism_preferences: vec![Mechanism {
                cls: "REMOTE".to_owned(),
                r#type: "VXLAN".to_owned(),
                parameters: [("src_ip".to_owned(), "127.0.0.1".to_owned())].into(),
            }],
        }
    }

    fn with_token<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        self.tokens.apply(request.metadata_mut());
        request
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn quantile(samples: &mut [f64], q: f64) -> f64 {
    if samples.is_empty() {
        return 0.0;
    }
    samples.sort_by(f64::total_cmp);
    let at = ((samples.len() - 1) as f64 * q).round() as usize;
    samples[at]
}
