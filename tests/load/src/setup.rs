//! How long a client waits for a connection with a real link.
//!
//! The clock runs from the Request on the agent's socket to its answer. The agent answers when the links of both sides stand, so
//! that is what "ready" means. The socket is dialed once: a client does so at its start, not for each connection.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, ensure};
use clap::Args;
use nsm_controlplane::{api::server::facts, identity::token::TokenSource, transport::dial::dial};
use nsm_core::{
    mechanism::{INODE_URL, KERNEL, LOCAL, NAME, NETNS_INODE, VXLAN},
    net::NetnsUrl,
};
use nsm_proto::{
    connection::{Connection, Mechanism, Path, PathSegment},
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
};
use serde::Serialize;
use tonic::{Request, metadata::MetadataMap, transport::Channel};

use crate::{ms, quantile};

/// What `setup` can be told.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The agent's socket, as unix:///path.
    #[arg(long)]
    connect_to: String,
    /// The service, as service@domain.
    #[arg(long)]
    service: String,
    /// The pod's network namespace.
    #[arg(long)]
    netns: PathBuf,
    /// Connections after the first.
    #[arg(long, default_value_t = 50)]
    connections: u64,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The first connection: DNS is asked, and agents connect to each other.
    cold_ms: f64,
    /// The others, the first not among them.
    connections: u64,
    setup_p50_ms: f64,
    setup_p99_ms: f64,
    close_p50_ms: f64,
    close_p99_ms: f64,
}

/// Makes, times and closes connections; the first failure ends it.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let client = Client::dial(&arguments.connect_to, &arguments.service, &arguments.netns).await?;
    let (cold, _) = client.connection(0).await.context("the first connection")?;
    let (mut setups, mut closes) = (Vec::new(), Vec::new());
    for number in 1..=arguments.connections {
        let (setup, close) = client
            .connection(number)
            .await
            .with_context(|| format!("connection {number}"))?;
        setups.push(ms(setup));
        closes.push(ms(close));
    }
    Ok(Report {
        cold_ms: ms(cold),
        connections: arguments.connections,
        setup_p50_ms: quantile(&setups, 0.5),
        setup_p99_ms: quantile(&setups, 0.99),
        close_p50_ms: quantile(&closes, 0.5),
        close_p99_ms: quantile(&closes, 0.99),
    })
}

/// A client of one pod on an agent's socket.
pub(crate) struct Client {
    pub(crate) channel: Channel,
    tokens: TokenSource,
    service: String,
    netns_url: String,
    netns_inode: u64,
}

impl Client {
    /// Connects to an agent's socket; nothing is asked yet.
    pub(crate) async fn dial(
        connect_to: &str,
        service: &str,
        netns: &std::path::Path,
    ) -> anyhow::Result<Self> {
        let inode = fs::metadata(netns)
            .with_context(|| format!("open {}", netns.display()))?
            .ino();
        Ok(Self {
            channel: dial(&connect_to.parse()?, Duration::from_secs(5)).await?,
            tokens: TokenSource::hs256(
                "spiffe://load.example/client",
                b"load",
                Duration::from_secs(600),
            ),
            service: service.to_owned(),
            netns_url: NetnsUrl::File(netns.to_owned()).to_string(),
            netns_inode: inode,
        })
    }

    /// Makes and closes a connection; how long each took.
    async fn connection(&self, number: u64) -> anyhow::Result<(Duration, Duration)> {
        let mut client = NetworkServiceClient::new(self.channel.clone());
        let request = self.with_token(self.ask(number));
        let began = Instant::now();
        let answer = client.request(request).await.context("Request")?;
        let setup = began.elapsed();
        check(answer.metadata())?;
        let request = self.with_token(answer.into_inner());
        let began = Instant::now();
        client.close(request).await.context("Close")?;
        Ok((setup, began.elapsed()))
    }

    pub(crate) fn ask(&self, number: u64) -> NetworkServiceRequest {
        let id = format!("setup-{}-{number}", std::process::id());
        let token = self.tokens.token(SystemTime::now());
        let parameters = [
            (INODE_URL, self.netns_url.clone()),
            (NETNS_INODE, self.netns_inode.to_string()),
            (NAME, format!("nsm-{number}")),
        ];
        NetworkServiceRequest {
            connection: Some(Connection {
                id: id.clone(),
                network_service: self.service.clone(),
                path: Some(Path {
                    index: 0,
                    path_segments: vec![PathSegment {
                        name: "setup-client".to_owned(),
                        id,
                        token: token.text,
                        expires: Some(token.expires.into()),
                        ..PathSegment::default()
                    }],
                }),
                ..Connection::default()
            }),
            mechanism_preferences: vec![Mechanism {
                cls: LOCAL.to_owned(),
                r#type: KERNEL.to_owned(),
                parameters: parameters
                    .map(|(key, value)| (key.to_owned(), value))
                    .into(),
            }],
        }
    }

    pub(crate) fn with_token<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        self.tokens.apply(request.metadata_mut());
        request
    }
}

/// A time without a tunnel in it would be no time of an interdomain connection.
pub(crate) fn check(metadata: &MetadataMap) -> anyhow::Result<()> {
    let mechanism = metadata
        .get(facts::REMOTE_MECHANISM)
        .and_then(|value| value.to_str().ok());
    ensure!(
        mechanism == Some(VXLAN),
        "the mechanism behind the agent is {mechanism:?}, not {VXLAN}: the endpoint is not on another node"
    );
    Ok(())
}
