//! The configuration as types, and what an agent that was told nothing does.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use nsm_controlplane::{liveness::Reachability, transport::dial::DialUrl};
use nsm_core::{
    address::public::Provider,
    net::{IfName, Vni},
    nsm::name::Domain,
};
use nsm_discovery::{
    dns::{HostEntry, ResolverConfig},
    public_address::{BaseUrl, StunServer},
};

use super::value::{ListenUrl, is_off};

/// The secret with which tokens are signed unless told otherwise: everybody knows it.
pub(super) const DEFAULT_SECRET: &str = "insecure";

/// The configuration of one agent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Config {
    /// The name of this agent on paths; the host's name by default.
    pub(crate) name: String,
    /// The domain whose names are served here.
    pub(crate) domain: Domain,
    /// Where each role listens.
    pub(crate) listen: Listen,
    /// What peers are told to dial to reach this agent's proxy; derived from the tunnel's address and the
    /// proxy's port when absent.
    pub(crate) advertise_url: Option<DialUrl>,
    /// An NSMgr that serves this node's clients in our place; the NSMgr role is on without it.
    pub(crate) upstream_nsmgr_url: Option<DialUrl>,
    /// The registry proxy that is asked for names of other domains; the agent is its own without it.
    pub(crate) registry_proxy_url: Option<DialUrl>,
    /// The registry of this domain; the agent is one itself without it.
    pub(crate) registry_url: Option<DialUrl>,
    /// Whether this agent makes links on this node.
    pub(crate) forwarder: bool,
    /// The service by which the upstream NSMgr looks for its forwarders.
    pub(crate) forwarder_service: String,
    /// The labels by which network services choose among forwarders.
    pub(crate) forwarder_labels: BTreeMap<String, String>,
    /// Whether the path to a peer must be proved before a connection is granted.
    pub(crate) reachability: Reachability,
    /// How domains are resolved.
    pub(crate) resolver: Resolver,
    /// How the node's public address is found.
    pub(crate) public_address: PublicAddress,
    /// The tunnels of this node.
    pub(crate) tunnel: Tunnel,
    /// The file of internal and external addresses.
    pub(crate) map_ip_file: PathBuf,
    /// Whether the file was named, so that its absence is an error.
    pub(crate) map_ip_file_required: bool,
    /// The BPF programs on the underlay.
    pub(crate) bpf: Bpf,
    /// The longest life of a token that is signed here.
    pub(crate) max_token_lifetime: Duration,
    /// How tokens are signed.
    pub(crate) token: Token,
    /// The longest time that a Request may take.
    pub(crate) request_timeout: Duration,
    /// The longest time that a connection to a peer may take.
    pub(crate) dial_timeout: Duration,
    /// What a client may cost.
    pub(crate) limits: Limits,
    /// What is logged, and how.
    pub(crate) log: Log,
}

/// Where each role listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listen {
    /// Local clients and endpoints.
    pub(crate) nsmgr: ListenUrl,
    /// The upstream NSMgr, when this agent is its forwarder.
    pub(crate) forwarder: ListenUrl,
    /// Proxies of other domains.
    pub(crate) proxy: ListenUrl,
    /// Registries of other domains, and other nodes of this one.
    pub(crate) registry: ListenUrl,
    /// `proxy-nsmgr status`.
    pub(crate) admin: ListenUrl,
    /// Prometheus.
    pub(crate) metrics: Option<SocketAddr>,
}

/// How domains are resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolver {
    /// DNS servers (UDP, then TCP); the system's own where empty.
    pub(crate) servers: Vec<SocketAddr>,
    /// Domains whose place is known here and not asked for.
    pub(crate) hosts: BTreeMap<Domain, HostEntry>,
    /// The longest time that one question may take, with all its retries.
    pub(crate) timeout: Duration,
    /// The port of a domain's registry where no SRV record names it.
    pub(crate) registry_port: u16,
    /// The port of a domain's proxy where no SRV record names it.
    pub(crate) proxy_port: u16,
}

/// How the node's public address is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublicAddress {
    /// What it is, where the operator knows.
    pub(crate) ip: Option<IpAddr>,
    /// Metadata services that are asked.
    pub(crate) metadata: MetadataServices,
    /// The API server of the node's cluster.
    pub(crate) kubernetes: KubernetesApi,
    /// The node's name there; the agent's name when absent.
    pub(crate) node_name: Option<String>,
    /// STUN servers.
    pub(crate) stun: Vec<StunServer>,
    /// How often all are asked.
    pub(crate) interval: Duration,
}

/// Metadata services of clouds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MetadataServices {
    /// That of the cloud which the machine's firmware names, if it names one.
    Auto,
    /// These, with where each is.
    These(Vec<(Provider, BaseUrl)>),
}

/// The API server of the node's cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KubernetesApi {
    /// That of the cluster which this agent is a pod of, if it is.
    Auto,
    /// None.
    Off,
    /// This one.
    At(BaseUrl),
}

impl FromStr for KubernetesApi {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            text if is_off(text) => Ok(Self::Off),
            url => match url.parse() {
                Ok(url) => Ok(Self::At(url)),
                Err(allowed) => Err(format!("auto, off, or {allowed}")),
            },
        }
    }
}

impl fmt::Display for KubernetesApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::At(url) => url.fmt(f),
        }
    }
}

/// The tunnels of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tunnel {
    /// The local address of tunnels; the source address of the default route when absent.
    pub(crate) ip: Option<IpAddr>,
    /// The UDP port of VXLAN.
    pub(crate) port: u16,
    /// The MTU of the underlay; 0 takes it from the underlay's link.
    pub(crate) mtu: u32,
    /// The VNI of the health plane's probes: never a connection's. Peers are told it, and may have another.
    pub(crate) management_vni: Vni,
}

/// The BPF programs on the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bpf {
    /// Whether they are attached at all.
    pub(crate) enabled: bool,
    /// Where their maps are pinned.
    pub(crate) pin_dir: PathBuf,
    /// The underlay's links; the one with the tunnel's address where empty.
    pub(crate) interfaces: Vec<IfName>,
    /// How they are attached.
    pub(crate) hook: Hook,
}

/// How BPF programs are attached to a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hook {
    /// tcx where the kernel has it (6.6), else clsact.
    Auto,
    /// tcx or nothing.
    Tcx,
    /// clsact and its filters.
    Clsact,
}

/// How tokens are signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    /// The algorithm of the signature.
    pub(crate) algorithm: TokenAlgorithm,
    /// The key of HS256.
    pub(crate) secret: String,
    /// The file of ES256's key; a new one for each life of the agent when absent.
    pub(crate) key_file: Option<PathBuf>,
    /// Who the tokens say we are; `spiffe://<domain>/<name>` when absent.
    pub(crate) spiffe_id: Option<String>,
    /// Whom the tokens are for (the claim `aud`); the claim is left out where empty.
    pub(crate) audience: Vec<String>,
}

/// The algorithm of a token's signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenAlgorithm {
    /// HMAC with SHA-256 and a shared secret: names the caller, proves nothing.
    Hs256,
    /// ECDSA on the curve P-256 and a key of our own, as NSM signs with that of its SVID.
    Es256,
}

/// What a client may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The largest message that is taken, in bytes.
    pub(crate) max_message_bytes: usize,
    /// The most connections that are open at once.
    pub(crate) max_connections: usize,
    /// The most streams of one client's transport connection.
    pub(crate) max_streams_per_client: u32,
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Log {
    /// A level, perhaps with levels of single modules: `info,h2=warn`.
    pub(crate) level: String,
    /// How a line looks.
    pub(crate) format: LogFormat,
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Config {
    /// The configuration of an agent that was told nothing, on a host of this name.
    pub(super) fn default_for(host_name: &str) -> Self {
        let dns = ResolverConfig::default();
        let tcp = |port| ListenUrl::Tcp(SocketAddr::from(([0, 0, 0, 0], port)));
        Self {
            name: host_name.to_owned(),
            domain: "cluster.local".parse().expect("a DNS name"),
            listen: Listen {
                nsmgr: ListenUrl::Unix("/var/lib/networkservicemesh/nsm.io.sock".into()),
                forwarder: ListenUrl::Unix("/run/proxy-nsmgr/forwarder.sock".into()),
                proxy: tcp(5006),
                registry: tcp(5005),
                admin: ListenUrl::Unix("/run/proxy-nsmgr/admin.sock".into()),
                // Ids and peers of connections are nobody's business beyond this machine unless the operator says so.
                metrics: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 9006))),
            },
            advertise_url: None,
            upstream_nsmgr_url: None,
            registry_url: None,
            registry_proxy_url: None,
            forwarder: true,
            forwarder_service: "forwarder".to_owned(),
            forwarder_labels: [("p2p".to_owned(), "true".to_owned())].into(),
            reachability: Reachability::default(),
            resolver: Resolver {
                servers: dns.servers,
                hosts: dns.hosts,
                timeout: dns.timeout,
                registry_port: dns.registry_port,
                proxy_port: dns.proxy_port,
            },
            public_address: PublicAddress {
                ip: None,
                metadata: MetadataServices::Auto,
                kubernetes: KubernetesApi::Auto,
                node_name: None,
                stun: Vec::new(),
                interval: nsm_core::address::public::INTERVAL,
            },
            tunnel: Tunnel {
                ip: None,
                port: 4789,
                mtu: 0,
                management_vni: Vni::MANAGEMENT,
            },
            map_ip_file: "map-ip.yaml".into(),
            map_ip_file_required: false,
            bpf: Bpf {
                enabled: true,
                pin_dir: "/sys/fs/bpf/proxy-nsmgr".into(),
                interfaces: Vec::new(),
                hook: Hook::Auto,
            },
            max_token_lifetime: Duration::from_secs(600),
            token: Token {
                algorithm: TokenAlgorithm::Hs256,
                secret: DEFAULT_SECRET.to_owned(),
                key_file: None,
                spiffe_id: None,
                audience: Vec::new(),
            },
            request_timeout: Duration::from_secs(15),
            dial_timeout: Duration::from_secs(5),
            limits: Limits {
                max_message_bytes: 1 << 20,
                max_connections: 16384,
                max_streams_per_client: 1024,
            },
            log: Log {
                level: "info".to_owned(),
                format: LogFormat::Text,
            },
        }
    }

    /// What peers' tokens and paths call this agent.
    pub(crate) fn spiffe_id(&self) -> String {
        match &self.token.spiffe_id {
            Some(id) => id.clone(),
            None => format!("spiffe://{}/{}", self.domain, self.name),
        }
    }

    /// Rules between keys, as the path of the key to blame and a sentence.
    pub(super) fn contradictions(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let listeners = [
            ("listen.nsmgr", &self.listen.nsmgr),
            ("listen.forwarder", &self.listen.forwarder),
            ("listen.proxy", &self.listen.proxy),
            ("listen.registry", &self.listen.registry),
            ("listen.admin", &self.listen.admin),
        ];
        if let Some(metrics) = self.listen.metrics.map(ListenUrl::Tcp)
            && let Some((other, _)) = listeners.iter().find(|(_, other)| **other == metrics)
        {
            let path = "listen.metrics";
            found.push((path, format!("{path} and {other} are both {metrics}")));
        }
        for (at, (path, url)) in listeners.iter().enumerate() {
            if let Some((other, _)) = listeners[..at].iter().find(|(_, other)| other == url) {
                found.push((*path, format!("{path} and {other} are both {url}")));
            }
        }
        for (path, upstream, own_path, own) in [
            (
                // Its usual socket is our default: we do not listen there then.
                "upstream_nsmgr_url",
                &self.upstream_nsmgr_url,
                "listen.forwarder",
                &self.listen.forwarder,
            ),
            (
                "registry_url",
                &self.registry_url,
                "listen.registry",
                &self.listen.registry,
            ),
            (
                "registry_proxy_url",
                &self.registry_proxy_url,
                "listen.registry",
                &self.listen.registry,
            ),
        ] {
            if upstream
                .as_ref()
                .is_some_and(|url| url.to_string() == own.to_string())
            {
                found.push((
                    path,
                    format!("{path} is {own_path}: the agent would ask itself for ever"),
                ));
            }
        }
        if self.token.key_file.is_some() && self.token.algorithm != TokenAlgorithm::Es256 {
            found.push((
                "token.key_file",
                "token.key_file is the key of es256: set token.algorithm to es256".to_owned(),
            ));
        }
        found
    }

    /// Whether this agent is the forwarder of another NSMgr.
    pub(crate) fn is_upstreams_forwarder(&self) -> bool {
        self.forwarder && self.upstream_nsmgr_url.is_some()
    }
}
