//! One Binding transaction with a STUN server, by UDP.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use nsm_core::{
    address::public::stun::{self, StunError},
    text::port_number,
};
use tokio::{
    net::{UdpSocket, lookup_host},
    time::{Instant, timeout_at},
};

use super::LookupError;

/// The longest time for all of a transaction. A resolver whose first server is dead asks the second after 5 s, and then an answer is some
/// milliseconds away; where the name is known at once, all of [`stun::WAITS`] fit.
const TIMEOUT: Duration = Duration::from_secs(7);

/// A STUN server: `host` or `host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StunServer {
    /// Without the brackets of IPv6.
    host: String,
    port: u16,
}

impl StunServer {
    /// The address that our packets come from, as the server sees it.
    pub(super) async fn ask(&self, local: Option<IpAddr>) -> Result<IpAddr, LookupError> {
        let found = lookup_host((self.host.as_str(), self.port));
        self.transact(local, found)
            .await
            .map_err(|cause| LookupError::Stun {
                server: self.to_string(),
                cause,
            })
    }

    /// The transaction with the first fitting address that comes of `found`.
    pub(super) async fn transact<A: Iterator<Item = SocketAddr>>(
        &self,
        local: Option<IpAddr>,
        found: impl Future<Output = std::io::Result<A>>,
    ) -> Result<IpAddr, String> {
        let text = |error: std::io::Error| error.to_string();
        let local = local.unwrap_or(Ipv4Addr::UNSPECIFIED.into()).to_canonical();
        let end = Instant::now() + TIMEOUT;
        let server = timeout_at(end, found)
            .await
            .map_err(|_| {
                format!("its name is not resolved within {TIMEOUT:?}: does this node's DNS answer?")
            })?
            .map_err(text)?
            .find(|server| server.is_ipv4() == local.is_ipv4())
            .ok_or_else(|| format!("it has no address of the family of {local}"))?;
        // From the tunnels' own address, so that the NAT's mapping is that of the tunnels.
        let socket = UdpSocket::bind(SocketAddr::new(local, 0))
            .await
            .map_err(text)?;
        // Connected: the kernel then drops packets from other addresses.
        socket.connect(server).await.map_err(text)?;
        let id: stun::TransactionId = rand::random();
        let request = stun::binding_request(&id);
        let mut buffer = [0; stun::MAX_ANSWER];
        let started = Instant::now();
        let mut requests = 0;
        for wait in stun::WAITS {
            if Instant::now() >= end {
                break;
            }
            socket.send(&request).await.map_err(text)?;
            requests += 1;
            let until = (Instant::now() + wait).min(end);
            while let Ok(received) = timeout_at(until, socket.recv(&mut buffer)).await {
                let length = received.map_err(text)?;
                match stun::binding_answer(&buffer[..length], &id) {
                    Ok(mapped) => return Ok(mapped.ip().to_canonical()),
                    // Noise: the answer may still come.
                    Err(StunError::Malformed | StunError::WrongTransaction) => {}
                    Err(error) => return Err(error.to_string()),
                }
            }
        }
        Err(format!(
            "no answer to {requests} requests within {:.1?}: is UDP let out to it?",
            started.elapsed()
        ))
    }
}

impl FromStr for StunServer {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        const ALLOWED: &str =
            "a STUN server such as stun.example.org or 192.0.2.1:3478 (IPv6 in brackets)";
        let text = text.strip_prefix("stun:").unwrap_or(text);
        if let Ok(address) = text.parse::<SocketAddr>() {
            return match address.port() {
                0 => Err(ALLOWED),
                port => Ok(Self {
                    host: address.ip().to_string(),
                    port,
                }),
            };
        }
        let bare = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'))
            .unwrap_or(text);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Ok(Self {
                host: address.to_string(),
                port: stun::PORT,
            });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, port_number(port).ok_or(ALLOWED)?),
            None => (text, stun::PORT),
        };
        let is_name = !host.is_empty()
            && host
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
        if is_name {
            Ok(Self {
                host: host.to_owned(),
                port,
            })
        } else {
            Err(ALLOWED)
        }
    }
}

impl fmt::Display for StunServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}
