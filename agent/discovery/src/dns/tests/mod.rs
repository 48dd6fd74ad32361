//! The resolver against DNS servers on loopback.

mod aliases;
mod caching;
mod configured;
mod failures;
mod published;
mod server;
mod servers;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use hickory_resolver::proto::{op::ResponseCode, rr::RecordType};
use hickory_server::net::xfer::Protocol;
use tokio::net::{TcpListener, UdpSocket};

use self::server::{DnsServer, Fault, Zone};
use super::*;

const X: &str = "cluster-2.example";
const REGISTRY: &str = "registry.nsm-system.cluster-2.example";
const PROXY: &str = "nsmgr-proxy.nsm-system.cluster-2.example";

fn domain(text: &str) -> Domain {
    text.parse().unwrap()
}

fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn config(servers: &[SocketAddr]) -> ResolverConfig {
    ResolverConfig {
        servers: servers.to_vec(),
        ..ResolverConfig::default()
    }
}

fn resolver(server: &DnsServer) -> Resolver {
    Resolver::new(config(&[server.address]))
}

/// Lets the resolver's time pass, and only its.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}
