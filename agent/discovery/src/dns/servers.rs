//! Which DNS servers are asked: the configured ones, or those of the system's resolv.conf(5), which is followed.
//!
//! The file changes when the node gets another lease or joins another network. It is read before each question: that costs microseconds
//! of the milliseconds that a question takes. A file that cannot be read, or has no server, may be one that is being written: the servers
//! stay as they were.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hickory_resolver::{config::ResolverConfig, system_conf::parse_resolv_conf};

use super::upstream::Upstream;

/// The port of DNS (RFC 1035 section 4.2).
const PORT: u16 = 53;

/// The servers as they are now.
pub(super) struct Servers {
    /// The file that is followed; none where the servers are configured.
    file: Option<PathBuf>,
    timeout: Duration,
    now: Mutex<Now>,
}

struct Now {
    /// What the file held.
    text: String,
    upstream: Arc<Upstream>,
}

impl Servers {
    /// The configured servers or, where there are none, those of `file`.
    pub(super) fn new(configured: &[SocketAddr], file: &Path, timeout: Duration) -> Self {
        if !configured.is_empty() {
            let upstream = Upstream::new(configured, String::new(), timeout);
            return Self {
                file: None,
                timeout,
                now: Mutex::new(Now {
                    text: String::new(),
                    upstream: Arc::new(upstream),
                }),
            };
        }
        let read = std::fs::read_to_string(file);
        let text = read.as_deref().unwrap_or_default().to_owned();
        let upstream = match read.map_err(|error| error.to_string()).and_then(parse) {
            Ok(servers) => Upstream::new(&servers, String::new(), timeout),
            Err(error) => Upstream::new(&[], format!("{}: {error}", file.display()), timeout),
        };
        Self {
            file: Some(file.to_owned()),
            timeout,
            now: Mutex::new(Now {
                text,
                upstream: Arc::new(upstream),
            }),
        }
    }

    /// The servers to ask now.
    pub(super) fn now(&self) -> Arc<Upstream> {
        let text = self.file.as_ref().map(std::fs::read_to_string);
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Ok(text)) = text
            && text != now.text
            && let Ok(servers) = parse(text.clone())
        {
            tracing::info!(?servers, "the system's DNS servers have changed");
            now.upstream = Arc::new(Upstream::new(&servers, String::new(), self.timeout));
            now.text = text;
        }
        Arc::clone(&now.upstream)
    }
}

/// The servers of a resolv.conf(5).
fn parse(text: String) -> Result<Vec<SocketAddr>, String> {
    let (config, _) = parse_resolv_conf(text).map_err(|error| error.to_string())?;
    Ok(addresses(&config))
}

fn addresses(config: &ResolverConfig) -> Vec<SocketAddr> {
    let servers = config.name_servers().iter();
    servers
        .map(|server| SocketAddr::new(server.ip, PORT))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_from_resolv_conf() {
        let text = "# nameserver 192.0.2.9\nsearch example\nnameserver 192.0.2.1 # first\n\
                    options ndots:5\n\tnameserver\t2001:db8::1\nnameserver nonsense\nnameserver\n";
        let wanted = ["192.0.2.1:53", "[2001:db8::1]:53"].map(|text| text.parse().unwrap());
        assert_eq!(parse(text.to_owned()).unwrap(), wanted);
        assert!(parse("search example\n".to_owned()).is_err());
    }

    #[test]
    fn a_file_that_changes_is_followed_and_one_that_is_being_written_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("resolv.conf");
        let timeout = Duration::from_secs(1);
        let servers = Servers::new(&[], &file, timeout);
        let asked = || servers.now().servers();
        assert_eq!(asked(), []);
        let one: SocketAddr = "192.0.2.1:53".parse().unwrap();
        let two: SocketAddr = "192.0.2.2:53".parse().unwrap();
        for (text, wanted) in [
            ("nameserver 192.0.2.1\n", [one]),
            ("", [one]),
            ("# nothing yet\n", [one]),
            ("nameserver 192.0.2.2\n", [two]),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(asked(), wanted, "{text:?}");
        }
        std::fs::remove_file(&file).unwrap();
        assert_eq!(asked(), [two]);
        std::fs::write(&file, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(asked(), [one]);
        let configured = Servers::new(&[two], &file, timeout);
        assert_eq!(configured.now().servers(), [two]);
    }
}
