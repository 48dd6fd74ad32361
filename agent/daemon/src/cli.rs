//! The command line.
//!
//! An argument that is wrong by itself (a name, a label, a prefix, a duration) is refused here with
//! the usage (exit code 2); what depends on the machine (a namespace that is not there, an agent
//! that does not run) is a failure of the command (exit code 1).

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use nsm_controlplane::identity::pem::PemFiles;
use nsm_core::{
    identity::TrustDomain,
    link::admission::DEFAULT_ROUTE_LABEL,
    net::{IfName, PeerUrl},
    nsm::name::InterdomainName,
};

use crate::config::{ConfigFlags, IdentitySource, parse_duration};

/// Where a local agent serves clients by default.
const DEFAULT_CONNECT_TO: &str = "unix:///var/lib/networkservicemesh/nsm.io.sock";

/// Where a local agent answers `status` by default.
const DEFAULT_ADMIN: &str = "unix:///run/proxy-nsmgr/admin.sock";

const EXIT_CODES: &str = "Exit codes: 0 all went well, 1 it failed (the reason is on standard error), 2 the command line is wrong.";

/// Connects pods of one Network Service Mesh domain with the services of another.
#[derive(Debug, Parser)]
#[command(name = "proxy-nsmgr", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs the agent of this node
    #[command(after_help = AGENT_HELP)]
    Agent(Box<AgentArgs>),
    /// Connects a network namespace to a service and keeps it connected
    #[command(after_help = CONNECT_HELP)]
    Connect(ConnectArgs),
    /// Offers a service out of a network namespace
    #[command(after_help = ENDPOINT_HELP)]
    Endpoint(EndpointArgs),
    /// Shows the connections, tunnels, counters and peers of the agent on this node
    #[command(after_help = STATUS_HELP)]
    Status(StatusArgs),
    /// Closes all connections of the agent on this node, on both sides, removes what it made, and ends it
    #[command(after_help = DRAIN_HELP)]
    Drain(DrainArgs),
    /// Shows who the agent on this node is in mutual TLS, and whom it believes
    #[command(after_help = IDENTITY_HELP)]
    Identity(StatusArgs),
    /// Asks an agent whether it is ready, by gRPC health: a probe that speaks TLS
    #[command(after_help = HEALTH_HELP)]
    Health(HealthArgs),
}

const AGENT_HELP: &str = "\
The file, the environment and the command line may each set every key; the later overrides the earlier.
SIGTERM ends it and leaves connections and their links to the next agent; Ctrl-C (SIGINT) and `proxy-nsmgr drain` close
everything first. SIGHUP reloads the IP map, the log level and the resolver.

Examples:
  proxy-nsmgr agent                                  one agent that is a whole domain
  proxy-nsmgr agent --domain cluster-1.example --tunnel-ip 192.0.2.1
  NSM_LOG_LEVEL=debug proxy-nsmgr agent --config /etc/proxy-nsmgr/config.yaml
  proxy-nsmgr agent --print-config                   the effective configuration, and where each value comes from

Exit codes: 0 all went well, 1 it failed (the reason is on standard error), 2 the command line is wrong.";

const CONNECT_HELP: &str = "\
Examples:
  proxy-nsmgr connect icmp-responder@cluster-2.example --netns /run/netns/pod
  proxy-nsmgr connect icmp-responder --netns 4711 --interface nsm-7 --label app=web
  proxy-nsmgr connect icmp-responder@192.0.2.7 --netns /run/netns/pod --json

Ctrl-C closes the connection. With --json each line of standard output is an object with an \"event\":
connected, refreshed, down, closed or error.

Exit codes: 0 closed on request, 1 refused or failed (the reason is on standard error), 2 the command line is wrong.";

const ENDPOINT_HELP: &str = "\
Examples:
  proxy-nsmgr endpoint --service icmp-responder --cidr 172.16.1.0/24 --netns /run/netns/server
  proxy-nsmgr endpoint --service web --cidr 172.16.2.0/24 --cidr fd00:2::/64 --netns 4711 --label app=web

Each connection gets one address of each family for the client and one for this end. Ctrl-C unregisters the endpoint
and closes its connections. With --json each line of standard output is an object with an \"event\": registered, connected,
closed, unregistered or error.

Exit codes: 0 ended on request, 1 it failed (the reason is on standard error), 2 the command line is wrong.";

const STATUS_HELP: &str = "\
Examples:
  proxy-nsmgr status
  proxy-nsmgr status --json | jq '.connections[].tunnel.vni'

Exit codes: 0 the agent answered, 1 it did not (the reason is on standard error), 2 the command line is wrong.";

const DRAIN_HELP: &str = "\
For a node that is to have no agent any more. An agent that is only replaced needs SIGTERM: its connections stand meanwhile.

Examples:
  proxy-nsmgr drain

Exit codes: 0 everything is closed and the agent has ended, 1 it is not (the reason is on standard error), 2 the command line is wrong.";

const IDENTITY_HELP: &str = "\
Examples:
  proxy-nsmgr identity
  proxy-nsmgr identity --json | jq .ends_in_seconds

Exit codes: 0 the agent answered, 1 it did not (the reason is on standard error), 2 the command line is wrong.";

const HEALTH_HELP: &str = "\
Examples:
  proxy-nsmgr health --connect-to tcp://127.0.0.1:5006
  proxy-nsmgr health --identity-workload-api unix:///run/spire/sockets/agent.sock

Exit codes: 0 ready, 1 not ready or not reachable (the reason is on standard error), 2 the command line is wrong.";

#[derive(Debug, Args)]
pub(crate) struct HealthArgs {
    /// The agent to ask
    #[arg(long, value_name = "URL", env = "NSM_CONNECT_TO", default_value = DEFAULT_CONNECT_TO, value_parser = PeerUrl::configured)]
    pub(crate) connect_to: PeerUrl,

    /// The longest time for all of it
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub(crate) timeout: Duration,

    #[command(flatten)]
    pub(crate) identity: IdentityArgs,
}

#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    /// The configuration file [default: /etc/proxy-nsmgr/config.yaml, if it is there]
    #[arg(long, value_name = "FILE", env = "NSM_CONFIG_FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Prints the configuration that would be in force, as YAML with the source of each value, and ends
    #[arg(long)]
    pub(crate) print_config: bool,

    /// Prints the JSON schema of the configuration file and ends
    #[arg(long)]
    pub(crate) print_config_schema: bool,

    #[command(flatten)]
    pub(crate) keys: ConfigFlags,
}

/// How a tool reaches the agent, and its identity.
#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// The agent (or any NSM v1 NSMgr) to ask
    #[arg(long, value_name = "URL", env = "NSM_CONNECT_TO", default_value = DEFAULT_CONNECT_TO, value_parser = PeerUrl::configured)]
    pub(crate) connect_to: PeerUrl,

    /// The longest time for one call
    #[arg(long, value_name = "DURATION", default_value = "15s", value_parser = duration)]
    pub(crate) timeout: Duration,

    /// The life of the tokens; a connection or registration lives no longer without a refresh
    #[arg(long, value_name = "DURATION", env = "NSM_MAX_TOKEN_LIFETIME", default_value = "10m", value_parser = duration)]
    pub(crate) max_token_lifetime: Duration,

    /// The shared secret with which tokens are signed
    #[arg(
        long,
        value_name = "TEXT",
        env = "NSM_TOKEN_SECRET",
        default_value = "insecure",
        hide_env_values = true
    )]
    pub(crate) token_secret: String,

    /// One JSON object a line on standard output
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) identity: IdentityArgs,
}

/// Who a tool is in mutual TLS, and whom it believes; without, it speaks plain text.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct IdentityArgs {
    /// The socket of SPIFFE's Workload API: the tool then speaks mutual TLS
    #[arg(long = "identity-workload-api", value_name = "URL", env = "SPIFFE_ENDPOINT_SOCKET", value_parser = PeerUrl::configured)]
    workload_api: Option<PeerUrl>,

    /// A PEM file with the chain of an X.509-SVID, leaf first, in place of the Workload API
    #[arg(
        long = "identity-certificate-file",
        value_name = "FILE",
        env = "NSM_IDENTITY_CERTIFICATE_FILE"
    )]
    certificate_file: Option<PathBuf>,

    /// The PEM file of its key
    #[arg(
        long = "identity-key-file",
        value_name = "FILE",
        env = "NSM_IDENTITY_KEY_FILE"
    )]
    key_file: Option<PathBuf>,

    /// A PEM file with the authorities of a trust domain; may be given again
    #[arg(long = "identity-bundles", value_name = "TRUST-DOMAIN=FILE", env = "NSM_IDENTITY_BUNDLES", value_delimiter = ',', value_parser = bundle)]
    bundles: Vec<(TrustDomain, PathBuf)>,
}

impl IdentityArgs {
    /// Where the identity comes from; none where there is none.
    ///
    /// # Errors
    /// Some of it is missing.
    pub(crate) fn source(&self) -> anyhow::Result<Option<IdentitySource>> {
        if let Some(url) = &self.workload_api {
            let socket = url.socket_path().with_context(|| {
                format!("{url} is no socket of a Workload API: unix:///run/spire/sockets/agent.sock is one")
            })?;
            return Ok(Some(IdentitySource::WorkloadApi(socket.to_owned())));
        }
        match (&self.certificate_file, &self.key_file) {
            (None, None) if self.bundles.is_empty() => Ok(None),
            (Some(certificate), Some(key)) if !self.bundles.is_empty() => {
                Ok(Some(IdentitySource::Files(PemFiles {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    bundles: self.bundles.iter().cloned().collect(),
                })))
            }
            _ => anyhow::bail!(
                "an identity in files has all three: --identity-certificate-file, --identity-key-file and --identity-bundles"
            ),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ConnectArgs {
    /// The service: `service`, or `service@domain` for one of another domain
    #[arg(value_name = "NAME")]
    pub(crate) service: InterdomainName,

    /// The network namespace that gets the interface: its path, or a process in it
    #[arg(long, value_name = "PATH|PID")]
    pub(crate) netns: String,

    /// The name of the interface in it, at most 15 bytes
    #[arg(long, value_name = "NAME", default_value = "nsm-1")]
    pub(crate) interface: IfName,

    /// A label of the client, by which endpoints are selected; may be given again
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) labels: Vec<(String, String)>,

    /// Lets the endpoint route everything over the connection; what is more specific in the namespace keeps its way
    #[arg(long)]
    pub(crate) default_route: bool,

    /// The client's name on the path [default: nsc- and a random number]
    #[arg(long, value_parser = name)]
    pub(crate) name: Option<String>,

    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct EndpointArgs {
    /// The service that is offered; may be given again
    #[arg(long = "service", value_name = "NAME", required = true, value_parser = name)]
    pub(crate) services: Vec<String>,

    /// A prefix, IPv4 or IPv6, out of which connections get their addresses; may be given again
    #[arg(long = "cidr", value_name = "PREFIX", required = true)]
    pub(crate) prefixes: Vec<IpNet>,

    /// The network namespace that gets the interfaces: its path, or a process in it
    #[arg(long, value_name = "PATH|PID")]
    pub(crate) netns: String,

    /// The endpoint's name [default: the first service and a random number]
    #[arg(long, value_parser = name)]
    pub(crate) name: Option<String>,

    /// A label of the endpoint, by which clients select it; may be given again
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) labels: Vec<(String, String)>,

    /// The socket on which the endpoint serves [default: one in /run/proxy-nsmgr, else in the directory of temporary files]
    #[arg(long, value_name = "PATH")]
    pub(crate) listen: Option<PathBuf>,

    /// What the service carries
    #[arg(long, value_enum, default_value_t = Payload::Ip, ignore_case = true)]
    pub(crate) payload: Payload,

    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

/// What a service carries, by NSM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Payload {
    /// IP packets
    #[value(name = "IP")]
    Ip,
    /// Ethernet frames
    #[value(name = "ETHERNET")]
    Ethernet,
}

impl Payload {
    /// The name on the wire.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ip => "IP",
            Self::Ethernet => "ETHERNET",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// The agent's answer as one JSON object
    #[arg(long)]
    pub(crate) json: bool,

    /// The agent's admin socket
    #[arg(long, value_name = "URL", env = "NSM_ADMIN_URL", default_value = DEFAULT_ADMIN, value_parser = PeerUrl::configured)]
    pub(crate) admin: PeerUrl,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// The agent's admin socket
    #[arg(long, value_name = "URL", env = "NSM_ADMIN_URL", default_value = DEFAULT_ADMIN, value_parser = PeerUrl::configured)]
    pub(crate) admin: PeerUrl,
}

impl ConnectArgs {
    /// The client's labels as the wire has them.
    pub(crate) fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = label_map(&self.labels);
        if self.default_route {
            labels.insert(DEFAULT_ROUTE_LABEL.to_owned(), "true".to_owned());
        }
        labels
    }
}

/// Labels as the wire has them; of a key that was given twice the last value counts.
pub(crate) fn label_map(labels: &[(String, String)]) -> BTreeMap<String, String> {
    labels.iter().cloned().collect()
}

fn duration(text: &str) -> Result<Duration, String> {
    match parse_duration(text) {
        Ok(Duration::ZERO) => Err("a duration above 0 is needed, such as 15s".to_owned()),
        Ok(duration) if duration > Duration::from_secs(24 * 3600) => {
            Err("at most 24h are allowed".to_owned())
        }
        Ok(duration) => Ok(duration),
        Err(allowed) => Err(format!("expected {allowed}")),
    }
}

/// A name without a domain, as registries hold it.
fn name(text: &str) -> Result<String, String> {
    InterdomainName::new(text, None)
        .map(|name| name.target().to_owned())
        .map_err(|error| error.to_string())
}

fn bundle(text: &str) -> Result<(TrustDomain, PathBuf), String> {
    match text.split_once('=') {
        Some((domain, file)) if !file.is_empty() => {
            let domain: TrustDomain = domain.parse().map_err(|error| format!("{error}"))?;
            Ok((domain, file.into()))
        }
        _ => Err("expected TRUST-DOMAIN=FILE".to_owned()),
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, error::ErrorKind};

    use super::*;

    fn parse(words: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(words.split_whitespace()).map(|cli| cli.command)
    }

    fn error(words: &str) -> clap::Error {
        let error = parse(words).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        error
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn connect_is_read() {
        let Ok(Command::Connect(args)) = parse(
            "proxy-nsmgr connect icmp-responder@cluster-2.example --netns /run/netns/pod \
             --interface nsm-7 --label a=1 --label b=x=y --timeout 500ms --connect-to unix:///x.sock --json",
        ) else {
            panic!("no connect")
        };
        assert_eq!(args.service.to_string(), "icmp-responder@cluster-2.example");
        assert_eq!(args.interface.as_str(), "nsm-7");
        assert_eq!(args.labels()["b"], "x=y");
        assert!(!args.labels().contains_key(DEFAULT_ROUTE_LABEL));
        assert_eq!(args.client.timeout, Duration::from_millis(500));
        assert_eq!(args.client.max_token_lifetime, Duration::from_secs(600));
        assert!(args.client.json);
    }

    #[test]
    fn a_default_route_is_asked_for_by_a_label() {
        let Ok(Command::Connect(args)) = parse("proxy-nsmgr connect a --netns 1 --default-route")
        else {
            panic!("no connect")
        };
        assert_eq!(args.labels()[DEFAULT_ROUTE_LABEL], "true");
    }

    #[test]
    fn endpoint_is_read() {
        let Ok(Command::Endpoint(args)) = parse(
            "proxy-nsmgr endpoint --service a --service b --cidr 172.16.1.0/24 --cidr fd00::/64 \
             --netns 17 --payload ethernet --listen /run/x.sock",
        ) else {
            panic!("no endpoint")
        };
        assert_eq!(args.services, ["a", "b"]);
        assert_eq!(args.prefixes.len(), 2);
        assert_eq!(args.payload, Payload::Ethernet);
    }

    #[test]
    fn what_is_wrong_with_a_word_is_a_usage_error() {
        for name in ["@x", "a@", "a@b@c", "a@b..c", "''@"] {
            let text = error(&format!("proxy-nsmgr connect {name} --netns 1")).to_string();
            assert!(text.contains(name), "{text}");
        }
        let label = "x".repeat(64);
        error(&format!("proxy-nsmgr connect a@{label}.example --netns 1"));
        for words in [
            "connect a",
            "connect a --netns 1 --interface interface-too-long",
            "connect a --netns 1 --label a",
            "connect a --netns 1 --label =a",
            "connect a --netns 1 --timeout 5",
            "connect a --netns 1 --timeout 0s",
            "connect a --netns 1 --connect-to 192.0.2.1",
            "connect a --netns 1 --bogus",
            "connect a b --netns 1",
            "endpoint --service a --netns 1",
            "endpoint --cidr 172.16.1.0/24 --netns 1",
            "endpoint --service a@b --cidr 172.16.1.0/24 --netns 1",
            "endpoint --service a --cidr 172.16.1.0/33 --netns 1",
            "endpoint --service a --cidr 172.16.1.0/24 --netns 1 --payload L2",
            "status --admin x",
            "agent --bogus-key 1",
            "agent --tunnel-port",
            "bogus",
        ] {
            error(&format!("proxy-nsmgr {words}"));
        }
    }

    #[test]
    fn version_and_help_are_there() {
        assert_eq!(
            parse("proxy-nsmgr --version").unwrap_err().kind(),
            ErrorKind::DisplayVersion
        );
        for command in [
            "", "agent", "connect", "endpoint", "status", "identity", "health",
        ] {
            let error = parse(&format!("proxy-nsmgr {command} --help")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DisplayHelp);
            assert!(error.to_string().contains("Exit codes"), "{command}");
        }
        let help = parse("proxy-nsmgr agent --help").unwrap_err().to_string();
        assert!(
            help.contains("--tunnel-port <PORT>") && help.contains("NSM_TUNNEL_PORT"),
            "{help}"
        );
    }
}
