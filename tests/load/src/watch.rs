//! One connection, held and never healed, and what its agent's monitor tells of it, with the time.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use nix::time::{ClockId, clock_gettime};
use nsm_proto::{
    connection::{
        Connection, ConnectionEventType, MonitorScopeSelector, PathSegment,
        monitor_connection_client::MonitorConnectionClient,
    },
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    print,
    setup::{Client, check},
};

/// How often the connection is refreshed: well before the agents' shortest usual token, of ten minutes, ends.
const REFRESH: Duration = Duration::from_secs(120);

/// What `watch` can be told.
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
}

/// One line of what happens.
#[derive(Debug, Serialize)]
struct Line<'a> {
    /// CLOCK_MONOTONIC when it was received, nanoseconds.
    at_ns: u64,
    /// "connected", "initial", "update" or "delete".
    event: &'static str,
    /// "UP", "DOWN", ...
    state: &'a str,
    /// Addresses of the endpoint.
    dst_addresses: &'a [String],
    /// What the agent's own segment of the path says of it.
    metrics: BTreeMap<&'a str, &'a str>,
}

/// Tells until SIGTERM, then closes the connection.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen to SIGTERM")?;
    let client = Client::dial(&arguments.connect_to, &arguments.service, &arguments.netns).await?;
    let mut service = NetworkServiceClient::new(client.channel.clone());
    let ask = client.ask(0);
    let id = ask.connection.as_ref().map(|it| it.id.clone());
    let answer = service
        .request(client.with_token(ask.clone()))
        .await
        .context("Request")?;
    check(answer.metadata())?;
    let mut connection = answer.into_inner();
    tell("connected", &connection)?;

    let selector = MonitorScopeSelector {
        path_segments: vec![PathSegment {
            id: id.unwrap_or_default(),
            ..PathSegment::default()
        }],
        ..MonitorScopeSelector::default()
    };
    let mut events = MonitorConnectionClient::new(client.channel.clone())
        .monitor_connections(client.with_token(selector))
        .await
        .context("MonitorConnections")?
        .into_inner();
    let mut refresh = tokio::time::interval_at(tokio::time::Instant::now() + REFRESH, REFRESH);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = refresh.tick() => {
                let again = NetworkServiceRequest {
                    connection: Some(connection.clone()),
                    mechanism_preferences: ask.mechanism_preferences.clone(),
                };
                let answer = service.request(client.with_token(again)).await.context("refresh")?;
                connection = answer.into_inner();
            }
            event = events.message() => {
                let Some(event) = event.context("the monitor's stream")? else {
                    bail!("the monitor's stream has ended");
                };
                let kind = match event.r#type() {
                    ConnectionEventType::InitialStateTransfer => "initial",
                    ConnectionEventType::Update => "update",
                    ConnectionEventType::Delete => "delete",
                };
                for connection in event.connections.values() {
                    tell(kind, connection)?;
                }
            }
        }
    }
    service
        .close(client.with_token(connection))
        .await
        .context("Close")?;
    Ok(())
}

fn tell(event: &'static str, connection: &Connection) -> anyhow::Result<()> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("read the clock")?;
    let seconds = u64::try_from(now.tv_sec()).unwrap_or_default();
    let nanos = u64::try_from(now.tv_nsec()).unwrap_or_default();
    let segments = connection.path.iter().flat_map(|path| &path.path_segments);
    // The client's own segment comes first, the agent's second.
    let agent = segments.clone().nth(1);
    let context = connection.context.as_ref();
    let ip = context.and_then(|context| context.ip_context.as_ref());
    print(&Line {
        at_ns: seconds * 1_000_000_000 + nanos,
        event,
        state: connection.state().as_str_name(),
        dst_addresses: ip.map_or(&[][..], |ip| &ip.dst_ip_addrs),
        metrics: agent
            .iter()
            .flat_map(|segment| &segment.metrics)
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect(),
    })
}
