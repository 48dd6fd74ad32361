//! The DNS server of a test world: authoritative for all names, with faults on demand and a log of every query.
//!
//! `nsm-world-dns --listen ADDRESS:PORT --zone FILE --log FILE` serves UDP and TCP, and prints `ready` when both are bound.
//!
//! The zone file is looked at for each query, so a test that replaces it needs no signal and no wait. Each query is a line
//! of JSON in the log, written before the answer leaves: a test that has its answer finds the query in the log.
#![forbid(unsafe_code)]

mod server;
mod zone;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use hickory_server::Server;
use tokio::net::{TcpListener, UdpSocket};

/// A TCP client that says nothing for so long is cut off.
const TCP_IDLE: Duration = Duration::from_secs(30);

/// Answers that may wait for a slow TCP client.
const TCP_BACKLOG: usize = 32;

struct Arguments {
    listen: SocketAddr,
    zone: PathBuf,
    log: PathBuf,
}

impl Arguments {
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let (mut listen, mut zone, mut log) = (None, None, None);
        while let Some(flag) = arguments.next() {
            let value = arguments
                .next()
                .with_context(|| format!("{flag} needs a value"))?;
            match flag.as_str() {
                "--listen" => {
                    let address = value
                        .parse()
                        .with_context(|| format!("--listen {value}: not ADDRESS:PORT"))?;
                    listen = Some(address);
                }
                "--zone" => zone = Some(value.into()),
                "--log" => log = Some(value.into()),
                _ => bail!(
                    "unknown argument {flag}; usage: --listen ADDRESS:PORT --zone FILE --log FILE"
                ),
            }
        }
        Ok(Self {
            listen: listen.context("--listen ADDRESS:PORT is missing")?,
            zone: zone.context("--zone FILE is missing")?,
            log: log.context("--log FILE is missing")?,
        })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse(std::env::args().skip(1))?;
    let handler = server::Handler::open(&arguments.zone, &arguments.log)?;
    let mut server = Server::new(handler);
    let udp = UdpSocket::bind(arguments.listen).await;
    server.register_socket(udp.with_context(|| format!("bind UDP {}", arguments.listen))?);
    let tcp = TcpListener::bind(arguments.listen).await;
    let tcp = tcp.with_context(|| format!("bind TCP {}", arguments.listen))?;
    server.register_listener(tcp, TCP_IDLE, TCP_BACKLOG);
    println!("ready");
    server.block_until_done().await.context("serve DNS")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Arguments> {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn arguments() {
        assert!(parse("--listen 192.0.2.53:53 --zone z --log l").is_ok());
        for bad in [
            "",
            "--listen nowhere --zone z --log l",
            "--zone",
            "--what x",
            "--listen 1.1.1.1:53 --zone z",
        ] {
            assert!(parse(bad).is_err(), "{bad:?} passed");
        }
    }
}
