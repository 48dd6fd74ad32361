//! Requests and Closes through two agents, to the endpoint in this process.
//!
//! The client finds the endpoint through the first agent's registry, as an NSMgr does, and then asks that agent's proxy.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use nsm_controlplane::{identity::token::TokenSource, transport::dial::dial};
use nsm_proto::{
    connection::{Connection, Mechanism, Path, PathSegment},
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
    registry::{
        NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
        network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
        network_service_registry_client::NetworkServiceRegistryClient,
    },
};
use serde::Serialize;
use tokio_stream::StreamExt as _;
use tonic::{Request, transport::Channel};

use crate::{Target, endpoint, ms, quantile};

const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// How many Requests are under way while connections are opened to be held.
const OPENING_IN_FLIGHT: usize = 8;

/// What `pairs` measured.
#[derive(Debug, Serialize)]
pub(crate) struct Pairs {
    pairs: u64,
    warm_up: u64,
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

/// What `hold` holds.
#[derive(Debug, Serialize)]
pub(crate) struct Hold {
    connections: u64,
    failed: u64,
    seconds: f64,
    request_p50_ms: f64,
    request_p99_ms: f64,
    endpoint_holds: u64,
}

/// Runs Request and Close pairs.
pub(crate) async fn pairs(
    target: &Target,
    pairs: u64,
    warm_up: u64,
    in_flight: usize,
) -> anyhow::Result<Pairs> {
    let load = Arc::new(Load::prepare(target, true).await?);
    run(&load, warm_up, in_flight).await;
    let began = Instant::now();
    let samples = run(&load, pairs, in_flight).await;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Pairs {
        pairs,
        warm_up,
        in_flight,
        failed: samples.failed,
        seconds,
        pairs_per_second: (pairs - samples.failed) as f64 / seconds,
        request_p50_ms: quantile(&samples.requests, 0.5),
        request_p99_ms: quantile(&samples.requests, 0.99),
        close_p50_ms: quantile(&samples.closes, 0.5),
        close_p99_ms: quantile(&samples.closes, 0.99),
        pair_p50_ms: quantile(&samples.pairs, 0.5),
        pair_p99_ms: quantile(&samples.pairs, 0.99),
        endpoint_holds: load.opposite.holds(),
    })
}

/// Opens connections, which stay open as long as the second value lives.
pub(crate) async fn hold(target: &Target, connections: u64) -> anyhow::Result<(Hold, Arc<Load>)> {
    let load = Arc::new(Load::prepare(target, false).await?);
    let began = Instant::now();
    let samples = run(&load, connections, OPENING_IN_FLIGHT).await;
    let report = Hold {
        connections,
        failed: samples.failed,
        seconds: began.elapsed().as_secs_f64(),
        request_p50_ms: quantile(&samples.requests, 0.5),
        request_p99_ms: quantile(&samples.requests, 0.99),
        endpoint_holds: load.opposite.holds(),
    };
    Ok((report, load))
}

/// What all Requests of a run share.
pub(crate) struct Load {
    channel: Channel,
    tokens: Arc<TokenSource>,
    service: String,
    endpoint: String,
    opposite: endpoint::Endpoint,
    next: AtomicU64,
    close: bool,
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
    while let Some(samples) = workers.join_next().await {
        let samples = samples.expect("a worker does not panic and is not aborted");
        all.requests.extend(samples.requests);
        all.closes.extend(samples.closes);
        all.pairs.extend(samples.pairs);
        all.failed += samples.failed;
    }
    all
}

impl Load {
    /// Starts and registers the endpoint, finds it, and connects to the proxy.
    async fn prepare(target: &Target, close: bool) -> anyhow::Result<Self> {
        let tokens = Arc::new(TokenSource::hs256(
            "spiffe://load.example/client",
            b"load",
            Duration::from_secs(600),
        ));
        let opposite = endpoint::start().await?;
        register(target, &tokens, &opposite.url).await?;
        Ok(Self {
            endpoint: find(target, &tokens).await?,
            channel: dial(&target.proxy.parse()?, DIAL_TIMEOUT).await?,
            tokens,
            service: format!("load@{}", target.domain),
            opposite,
            next: AtomicU64::new(0),
            close,
        })
    }

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
        if self.close {
            client
                .close(self.with_token(connection))
                .await
                .context("Close")?;
            samples.closes.push(ms(asked.elapsed()));
            samples.pairs.push(ms(began.elapsed()));
        }
        Ok(())
    }

    fn ask(&self, number: u64) -> NetworkServiceRequest {
        // Another run's connections may still be open in the agents.
        let id = format!("load-{}-{number}", std::process::id());
        let token = self.tokens.token(SystemTime::now());
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
                        token: token.text,
                        expires: Some(token.expires.into()),
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

async fn register(target: &Target, tokens: &TokenSource, url: &str) -> anyhow::Result<()> {
    let channel = dial(&target.endpoint_registry.parse()?, DIAL_TIMEOUT).await?;
    let mut request = Request::new(NetworkService {
        name: "load".to_owned(),
        ..NetworkService::default()
    });
    tokens.apply(request.metadata_mut());
    NetworkServiceRegistryClient::new(channel.clone())
        .register(request)
        .await
        .context("cannot register the network service")?;
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

async fn find(target: &Target, tokens: &TokenSource) -> anyhow::Result<String> {
    let channel = dial(&target.registry.parse()?, DIAL_TIMEOUT).await?;
    let mut request = Request::new(NetworkServiceEndpointQuery {
        network_service_endpoint: Some(NetworkServiceEndpoint {
            network_service_names: vec![format!("load@{}", target.domain)],
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
