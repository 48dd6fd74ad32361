//! The keys, with their defaults: this declaration is the configuration's only list of them.
//!
//! The sentence above a field is its help text. Keys stand in the order of help texts and of `--print-config`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::LazyLock,
    time::Duration,
};

use ipnet::IpNet;
use nsm_controlplane::liveness::Reachability;
use nsm_core::{
    identity::TrustDomain,
    link::admission::{cluster_domains, private_ranges},
    net::{IfName, PeerUrl, Vni},
    nsm::name::Domain,
};
use nsm_discovery::{
    dns::{HostEntry, ResolverConfig},
    public_address::StunServer,
};

use super::{
    kinds::*,
    prefixes::{domain_prefixes, prefix},
    table::{Field, Key, Section, Settings, settings},
    value::ListenUrl,
};

/// Every key.
pub(super) static KEYS: LazyLock<Vec<Key<Config>>> = LazyLock::new(Config::keys);

settings! {
/// The configuration of one agent.
Config {
    /// The agent's name on paths
    name: String = host_name() => name(), default_is("the host's name");
    /// The domain whose names (`service@domain`) are served here
    domain: Domain = "cluster.local".parse().expect("a DNS name") => text("DOMAIN");
    /// Where each role listens
    listen: Listen = Listen::default() => Section;
    /// What peers dial to reach this agent's proxy; by default the tunnel's address and the proxy's port
    advertise_url: Option<PeerUrl> = None => advertised_url().optional();
    /// An NSMgr that serves this node's clients; with `forwarder`, this agent is a forwarder of it. Without it this agent is the
    /// node's NSMgr
    upstream_nsmgr_url: Option<PeerUrl> = None => peer_url().optional();
    /// The registry of this domain; without it this agent is the registry
    registry_url: Option<PeerUrl> = None => peer_url().optional();
    /// The registry proxy for names of other domains; by default DNS leads to their registries
    registry_proxy_url: Option<PeerUrl> = None => peer_url().optional();
    /// Address ranges of this domain's own systems, which may ask over the network for names of other domains: NSMgrs and registries
    relay_for: Vec<IpNet> = Vec::new() => prefix().list();
    /// Address ranges that may register over the network, beside `relay_for`; without any all may
    registrants: Vec<IpNet> = Vec::new() => prefix().list();
    /// A YAML file of who may do what by the id in a certificate: the domains that this one has to do with. SIGHUP reads it again
    policy_file: Option<PathBuf> = None => file().optional();
    /// Ranges of loopback, link-local and own addresses that are dialled although DNS or other domains named them; the configured URLs
    /// and hosts need none
    dial_inside: Vec<IpNet> = Vec::new() => prefix().list();
    /// Who this agent is in mutual TLS, and whom it believes: SPIFFE's Workload API, or PEM files
    identity: Identity = Identity::default() => Section;
    /// Whether this agent speaks plain text with everybody: who reaches it may then ask, register and monitor in anybody's name
    insecure: bool = false => boolean();
    /// Whether this agent makes links on this node
    forwarder: bool = true => boolean();
    /// Whether root of the node may have links in the node's own network namespace; other callers may not in any case
    node_namespace: bool = false => boolean();
    /// The service by which the upstream NSMgr finds its forwarders
    forwarder_service: String = "forwarder".to_owned() => name(), variable_is("NSM_NSNAME");
    /// The labels by which network services choose among forwarders
    forwarder_labels: BTreeMap<String, String> = [("p2p".to_owned(), "true".to_owned())].into() => labels(), variable_is("NSM_LABELS");
    /// Proof of the path to a peer before a connection is granted: `require` refuses endpoints without it, `prefer` takes them last,
    /// `off` probes nothing
    reachability: Reachability = Reachability::default() => choice(REACHABILITY);
    /// How domains are resolved
    resolver: Resolver = Resolver::default() => Section;
    /// How the node's public address is found
    public_address: PublicAddress = PublicAddress::default() => Section;
    /// The tunnels of this node
    tunnel: Tunnel = Tunnel::default() => Section;
    /// A YAML file of `internal: external` addresses, followed while the agent runs; it may be absent where no layer names it
    map_ip_file: MapIpFile = MapIpFile::default() => map_ip_file(), variable_is("NSM_MAP_IP_FILE_PATH");
    /// The BPF programs on the underlay
    bpf: Bpf = Bpf::default() => Section;
    /// Labels that clients and endpoints of this node get where they have none of that name
    client_info: ClientInfo = ClientInfo::default() => Section;
    /// The longest life of a token that is signed here
    max_token_lifetime: Duration = Duration::from_secs(600) => lifetime();
    /// How tokens are signed
    token: Token = Token::default() => Section;
    /// The longest time for a Request
    request_timeout: Duration = Duration::from_secs(15) => duration();
    /// The longest time to connect to a peer
    dial_timeout: Duration = Duration::from_secs(5) => duration();
    /// What another domain may put into a pod
    admission: Admission = Admission::default() => Section;
    /// What a client may cost
    limits: Limits = Limits::default() => Section;
    /// What is logged, and how
    log: Log = Log::default() => Section;
}
}

settings! {
/// Where each role listens.
Listen {
    /// The socket for local clients and endpoints
    nsmgr: ListenUrl = unix("/var/lib/networkservicemesh/nsm.io.sock") => socket("its callers count as processes of this node");
    /// The socket where the upstream NSMgr reaches this agent's forwarder
    forwarder: ListenUrl = unix("/run/proxy-nsmgr/forwarder.sock") => socket("namespaces' descriptors travel over sockets only");
    /// Where proxies of other domains connect
    proxy: ListenUrl = tcp(5006) => text("URL");
    /// Where other domains, and other nodes of this one, find endpoints
    registry: ListenUrl = tcp(5005) => text("URL");
    /// The socket of `proxy-nsmgr status` and `drain`
    admin: ListenUrl = unix("/run/proxy-nsmgr/admin.sock") => socket("the admin API is for this machine only");
    /// Where Prometheus scrapes metrics; on loopback by default, because ids and peers of connections are not public
    metrics: Option<SocketAddr> = Some((Ipv4Addr::LOCALHOST, 9006).into()) => metrics();
}
}

settings! {
/// Who this agent is in mutual TLS, and whom it believes.
Identity {
    /// The socket of SPIFFE's Workload API, which gives the SVID and the bundles, and renews them
    workload_api: Option<PeerUrl> = None => workload_api().optional(), variable_is("SPIFFE_ENDPOINT_SOCKET");
    /// A PEM file with the chain of an X.509-SVID, leaf first; it, the key and the bundles are followed while the agent runs
    certificate_file: Option<PathBuf> = None => file().optional();
    /// The PEM file of its key, of the curve P-256
    key_file: Option<PathBuf> = None => file().optional();
    /// PEM files with the authorities of each trust domain that is believed
    bundles: BTreeMap<TrustDomain, PathBuf> = BTreeMap::new() => bundles();
}
}

settings! {
/// How domains are resolved.
Resolver {
    /// DNS servers; the system's own by default
    servers: Vec<SocketAddr> = Vec::new() => dns_server().list(), reloadable();
    /// Domains whose place is known: one place for both services, or one each
    hosts: BTreeMap<Domain, HostEntry> = BTreeMap::new() => hosts(), reloadable();
    /// The longest time for one DNS question, retries included
    timeout: Duration = ResolverConfig::default().timeout => duration(), reloadable();
    /// The port of a domain's registry without an SRV record
    registry_port: u16 = ResolverConfig::default().registry_port => port(), reloadable();
    /// The port of a domain's proxy without an SRV record
    proxy_port: u16 = ResolverConfig::default().proxy_port => port(), reloadable();
}
}

settings! {
/// Labels of the node, as NSM's NSMgr has them.
ClientInfo {
    /// The label nodeName, by which a network service can choose an endpoint of the client's node
    node_name: Option<String> = None => label().optional(), variable_is("NODE_NAME");
    /// The label podName
    pod_name: Option<String> = None => label().optional(), variable_is("POD_NAME");
    /// The label clusterName
    cluster_name: Option<String> = None => label().optional(), variable_is("CLUSTER_NAME");
}
}

settings! {
/// How the node's public address is found.
PublicAddress {
    /// The node's public address; found out by default
    ip: Option<IpAddr> = None => host_address().optional();
    /// Clouds whose metadata service is asked: aws, gcp, azure, equinix, each perhaps at another URL; auto: the cloud that the
    /// machine's firmware names
    metadata: MetadataServices = MetadataServices::Auto => metadata();
    /// The API server with the node's ExternalIP; auto: that of the cluster the agent runs in, which must allow `get` on `nodes`
    kubernetes: KubernetesApi = KubernetesApi::Auto => text("auto|off|URL");
    /// The node's name in Kubernetes; the agent's name by default
    node_name: Option<String> = None => node_name().optional(), variable_is("NSM_NODE_NAME");
    /// STUN servers, which see the address that packets of this node come from
    stun: Vec<StunServer> = Vec::new() => text("HOST[:PORT]").list();
    /// The time between two rounds of questions to these sources; a change of an own address starts one, too
    interval: Duration = nsm_core::address::public::INTERVAL => duration();
}
}

settings! {
/// The tunnels of this node.
Tunnel {
    /// The local address of tunnels; by default the source address of the default route
    ip: Option<IpAddr> = None => host_address().optional();
    /// The UDP port of VXLAN, which no other VXLAN device of the node may have
    port: u16 = 4789 => port();
    /// UDP ports of VXLAN that other nodes may choose beside this node's: each is opened here when one does
    peer_ports: Vec<u16> = Vec::new() => port().list();
    /// The MTU of the underlay; 0 takes that of its link
    mtu: u32 = 0 => mtu();
    /// Whether every packet of a tunnel passes this node's firewall; by default most take a faster path, and rules for the tunnels' port
    /// show on it half a second later
    respect_host_firewall: bool = false => boolean();
    /// The VNI of the probes between nodes, which no connection gets; peers may have another
    management_vni: Vni = Vni::MANAGEMENT => vni();
}
}

settings! {
/// The BPF programs on the underlay.
Bpf {
    /// Whether this node makes links, which takes BPF; without, Requests are only passed on
    enabled: bool = true => boolean();
    /// Where BPF maps are pinned, below a bpf file system
    pin_dir: PathBuf = "/sys/fs/bpf/proxy-nsmgr".into() => directory();
    /// Links of the underlay; by default the one with the tunnel's address
    interfaces: Vec<IfName> = Vec::new() => text("NAME").list();
    /// How BPF programs are attached; auto: tcx where the kernel has it (Linux 6.6), else clsact
    hook: Hook = Hook::Auto => choice(HOOKS);
}
}

settings! {
/// How tokens are signed.
Token {
    /// The algorithm of a token's signature
    algorithm: TokenAlgorithm = TokenAlgorithm::Hs256 => choice(ALGORITHMS);
    /// The shared secret of hs256
    secret: String = "insecure".to_owned() => secret();
    /// The PEM file of es256's key (that of an SVID), read again for each token; by default a new key at each start
    key_file: Option<PathBuf> = None => file().optional();
    /// The subject of tokens; `spiffe://<domain>/<name>` by default
    spiffe_id: Option<String> = None => spiffe_id().optional();
    /// The SPIFFE ids of the peers that tokens are for (`aud`); by default tokens name none
    audience: Vec<String> = Vec::new() => spiffe_id().list();
}
}

settings! {
/// What another domain may put into a pod.
Admission {
    /// Prefixes of addresses and routes that any domain may give to a pod
    prefixes: Vec<IpNet> = private_ranges() => prefix().list();
    /// Prefixes that a domain may give to a pod, in place of these
    domains: BTreeMap<Domain, Vec<IpNet>> = BTreeMap::new() => domain_prefixes();
    /// Prefixes that no domain may give to a pod: those of the cluster's pods and services
    protected: Vec<IpNet> = Vec::new() => prefix().list();
    /// NSM's file of prefixes that are protected too, followed while the agent runs
    excluded_prefixes_file: PathBuf = "/var/lib/networkservicemesh/config/excluded_prefixes.yaml".into() => file();
    /// DNS domains of the cluster, which no other domain may resolve; this agent's domain is one too
    dns_domains: Vec<Domain> = cluster_domains() => text("DOMAIN").list();
}
}

settings! {
/// What a client may cost.
Limits {
    /// The largest message that is accepted
    max_message_bytes: usize = 1 << 20 => message_size();
    /// The most connections open at once. The limits a source are for one user of a pod, or one address, an IPv6 network being one; the
    /// node's administrators, the upstream NSMgr and `relay_for` have none, and an eighth of everything for themselves
    max_connections: usize = 32768 => count();
    /// The most connections of one source
    max_connections_per_source: usize = 16384 => count();
    /// The most monitor and Find streams open at once
    max_streams: usize = 16384 => count();
    /// The most monitor and Find streams of one source
    max_streams_per_source: usize = 4096 => count();
    /// The most entries of this agent's registry, and endpoints that are reached through the agent
    max_entries: usize = 65536 => count();
    /// The most of these from one source
    max_entries_per_source: usize = 8192 => count();
    /// The most memory for connections, registrations and events that wait to be read
    max_bytes: usize = 256 << 20 => memory_size();
    /// The most of it for one source
    max_bytes_per_source: usize = 64 << 20 => memory_size();
    /// The most questions to DNS at once for one source
    max_questions_per_source: usize = 64 => count();
    /// The most transport connections of one source; at most an eighth of the open files
    max_clients_per_source: u32 = 256 => count();
    /// The most streams of one client's transport connection
    max_streams_per_client: u32 = 1024 => count();
}
}

settings! {
/// What is logged, and how.
Log {
    /// trace, debug, info, warn, error or off, perhaps with other levels of modules: `info,h2=warn`
    level: String = "info".to_owned() => log_level(), reloadable();
    /// The form of a line of the log
    format: LogFormat = LogFormat::Text => choice(LOG_FORMATS);
}
}

impl ClientInfo {
    /// The labels, by their names in NSM.
    pub(crate) fn labels(&self) -> BTreeMap<String, String> {
        let labels = [
            ("nodeName", &self.node_name),
            ("podName", &self.pod_name),
            ("clusterName", &self.cluster_name),
        ];
        let labels = labels.into_iter();
        labels
            .filter_map(|(name, value)| Some((name.to_owned(), value.clone()?)))
            .collect()
    }
}

impl Config {
    /// The subject of tokens that are signed here.
    pub(crate) fn spiffe_id(&self) -> String {
        match &self.token.spiffe_id {
            Some(id) => id.clone(),
            None => format!("spiffe://{}/{}", self.domain, self.name),
        }
    }

    /// Whether this agent is the forwarder of another NSMgr.
    pub(crate) fn is_upstreams_forwarder(&self) -> bool {
        self.forwarder && self.upstream_nsmgr_url.is_some()
    }

    /// Contradictions between keys: the path of the key to blame and a sentence.
    pub(super) fn contradictions(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let listen = &self.listen;
        let listeners = [
            ("listen.nsmgr", Some(listen.nsmgr.to_string())),
            ("listen.forwarder", Some(listen.forwarder.to_string())),
            ("listen.proxy", Some(listen.proxy.to_string())),
            ("listen.registry", Some(listen.registry.to_string())),
            ("listen.admin", Some(listen.admin.to_string())),
            (
                "listen.metrics",
                listen
                    .metrics
                    .map(|address| ListenUrl::Tcp(address).to_string()),
            ),
        ];
        for (at, (path, url)) in listeners.iter().enumerate() {
            let before = listeners[..at].iter().find(|(_, other)| other == url);
            if let (Some(url), Some((other, _))) = (url, before) {
                found.push((*path, format!("{path} and {other} are both {url}")));
            }
        }
        for (path, upstream, (own_path, own)) in [
            // The usual socket of an NSMgr is the default of listen.nsmgr: this agent does not listen there then.
            (
                "upstream_nsmgr_url",
                &self.upstream_nsmgr_url,
                &listeners[1],
            ),
            ("registry_url", &self.registry_url, &listeners[3]),
            (
                "registry_proxy_url",
                &self.registry_proxy_url,
                &listeners[3],
            ),
        ] {
            if upstream
                .as_ref()
                .map(PeerUrl::to_string)
                .is_some_and(|url| Some(url) == *own)
            {
                found.push((
                    path,
                    format!("{path} is {own_path}: the agent would call itself for ever"),
                ));
            }
        }
        found.extend(self.identity_contradictions());
        if self.token.key_file.is_some() && self.token.algorithm != TokenAlgorithm::Es256 {
            let what = "token.key_file is the key of es256: set token.algorithm to es256";
            found.push(("token.key_file", what.to_owned()));
        }
        found
    }
}

fn unix(path: &str) -> ListenUrl {
    ListenUrl::Unix(path.into())
}

fn tcp(port: u16) -> ListenUrl {
    ListenUrl::Tcp((Ipv4Addr::UNSPECIFIED, port).into())
}

/// The host's name in this UTS namespace.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" | "(none)" => "proxy-nsmgr".to_owned(),
        name => name.to_owned(),
    }
}
