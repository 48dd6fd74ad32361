//! The kinds of values that keys have: for each what is read, what is allowed otherwise, and how it is shown.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use nsm_controlplane::liveness::Reachability;
use nsm_core::{
    address::public::Provider,
    identity::TrustDomain,
    net::{PeerUrl, Vni},
    nsm::name::{Domain, InterdomainName},
};
use nsm_discovery::{
    dns::{HostEntry, HostTarget},
    public_address::BaseUrl,
};
use serde_json::{Value, json};

use super::{
    node::{self, Bad, Node},
    table::{Kind, Shape},
    value::{
        ListenUrl, OFF, is_off, parse_bool, parse_duration, parse_log_level, parse_size,
        show_duration, show_size,
    },
};

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

/// The algorithm of a token's signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenAlgorithm {
    /// HMAC with SHA-256 and a shared secret: names the caller, proves nothing.
    Hs256,
    /// ECDSA on the curve P-256 and a key of our own, as NSM signs with that of its SVID.
    Es256,
}

/// The form of a line of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
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

/// The file of internal and external addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MapIpFile {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Whether a layer named it, so that its absence is an error.
    pub(crate) is_required: bool,
}

impl Default for MapIpFile {
    fn default() -> Self {
        Self {
            path: "map-ip.yaml".into(),
            is_required: false,
        }
    }
}

/// The policies of reachability.
pub(super) const REACHABILITY: &[(&str, Reachability)] = &[
    ("require", Reachability::Require),
    ("prefer", Reachability::Prefer),
    (OFF, Reachability::Off),
];

/// The hooks of BPF programs.
pub(super) const HOOKS: &[(&str, Hook)] = &[
    ("auto", Hook::Auto),
    ("tcx", Hook::Tcx),
    ("clsact", Hook::Clsact),
];

/// The algorithms of signatures.
pub(super) const ALGORITHMS: &[(&str, TokenAlgorithm)] = &[
    ("hs256", TokenAlgorithm::Hs256),
    ("es256", TokenAlgorithm::Es256),
];

/// The forms of the log.
pub(super) const LOG_FORMATS: &[(&str, LogFormat)] =
    &[("text", LogFormat::Text), ("json", LogFormat::Json)];

/// One of a few words.
pub(super) fn choice<T: Copy + PartialEq + Send + Sync + 'static>(
    words: &'static [(&'static str, T)],
) -> Kind<T> {
    let names: Vec<_> = words.iter().map(|(word, _)| *word).collect();
    let (last, others) = names.split_last().expect("a choice has words");
    let allowed = format!("{} or {last}", others.join(", "));
    let parse = move |text: &str| {
        let is_meant = |word: &str| word == text || word == OFF && is_off(text);
        let found = words.iter().find(|(word, _)| is_meant(word));
        or(found.map(|(_, value)| *value), &allowed)
    };
    let show = |value: &T| {
        let found = words.iter().find(|(_, other)| other == value);
        found.map(|(word, _)| *word)
    };
    Kind::one(&names.join("|"), Shape::Words, parse, show)
}

/// A text that the type itself reads.
pub(super) fn text<T: FromStr<Err: ToString> + ToString + 'static>(placeholder: &str) -> Kind<T> {
    Kind::one(placeholder, Shape::Text, str::parse, T::to_string)
}

/// A number in this range.
fn number<T: TryFrom<u64> + Copy + Into<Value> + 'static>(
    placeholder: &str,
    range: RangeInclusive<u64>,
    allowed: &'static str,
) -> Kind<T> {
    let shape = Shape::Integer(*range.start(), *range.end());
    let parse = move |text: &str| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        number
            .and_then(|number| T::try_from(number).ok())
            .ok_or(allowed)
    };
    Kind::one(placeholder, shape, parse, |value| *value)
}

pub(super) fn port() -> Kind<u16> {
    number("PORT", 1..=65535, "a port between 1 and 65535")
}

pub(super) fn count<T: TryFrom<u64> + Copy + Into<Value> + 'static>() -> Kind<T> {
    number("NUMBER", 1..=u64::MAX, "a number above 0")
}

/// A text that `is_allowed` accepts.
fn checked(placeholder: &str, is_allowed: fn(&str) -> bool, allowed: &'static str) -> Kind<String> {
    let parse = move |text: &str| or(is_allowed(text).then(|| text.to_owned()), allowed);
    Kind::one(placeholder, Shape::Text, parse, String::clone)
}

/// A path that `is_allowed` accepts.
fn path(placeholder: &str, is_allowed: fn(&str) -> bool, allowed: &'static str) -> Kind<PathBuf> {
    let parse = move |text: &str| {
        let is_path = !text.is_empty() && !text.contains('\0') && is_allowed(text);
        or(is_path.then(|| PathBuf::from(text)), allowed)
    };
    Kind::one(placeholder, Shape::Text, parse, |path| {
        path.display().to_string()
    })
}

fn or<T>(value: Option<T>, allowed: &str) -> Result<T, String> {
    value.ok_or_else(|| allowed.to_owned())
}

pub(super) fn boolean() -> Kind<bool> {
    Kind::one("BOOL", Shape::Bool, parse_bool, |value| *value)
}

pub(super) fn name() -> Kind<String> {
    let parse = |text: &str| InterdomainName::new(text, None).map(|name| name.target().to_owned());
    Kind::one("NAME", Shape::Text, parse, String::clone)
}

/// The value of a label.
pub(super) fn label() -> Kind<String> {
    let is_value = |text: &str| !text.is_empty() && !text.chars().any(char::is_control);
    checked("TEXT", is_value, "printable text")
}

/// A node's name in Kubernetes is a DNS name; it becomes a part of a URL.
pub(super) fn node_name() -> Kind<String> {
    let is_name = |text: &str| {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
        (1..=253).contains(&text.len()) && text.bytes().all(is_allowed)
    };
    let allowed = "the name of a Kubernetes node: letters, digits, dots and hyphens";
    checked("NAME", is_name, allowed)
}

pub(super) fn spiffe_id() -> Kind<String> {
    let is_id = |text: &str| {
        let rest = text.strip_prefix("spiffe://").unwrap_or_default();
        !rest.is_empty()
            && !rest.starts_with('/')
            && rest.bytes().all(|byte| byte.is_ascii_graphic())
    };
    checked(
        "ID",
        is_id,
        "a SPIFFE id such as spiffe://cluster-1.example/agent",
    )
}

pub(super) fn secret() -> Kind<String> {
    checked("TEXT", |text| !text.is_empty(), "a text that is not empty").secret()
}

pub(super) fn log_level() -> Kind<String> {
    Kind::one("LEVEL", Shape::Text, parse_log_level, String::clone)
}

/// Where a peer listens, in its canonical spelling.
pub(super) fn peer_url() -> Kind<PeerUrl> {
    Kind::one("URL", Shape::Text, PeerUrl::configured, PeerUrl::to_string)
}

/// A URL that others dial: no address that means another node to each of them.
pub(super) fn advertised_url() -> Kind<PeerUrl> {
    let parse = |text: &str| {
        let url = PeerUrl::configured(text).map_err(|error| error.to_string())?;
        let means_none = |ip: IpAddr| ip.is_unspecified() || ip.is_multicast();
        match url.address() {
            Some(ip) if means_none(ip) => {
                Err("tcp://address:port with an address of this node that others reach".to_owned())
            }
            _ => Ok(url),
        }
    };
    Kind::one("URL", Shape::Text, parse, PeerUrl::to_string)
}

/// A socket that only this node reaches.
pub(super) fn socket(reason: &'static str) -> Kind<ListenUrl> {
    let parse = move |text: &str| match text.parse().map_err(str::to_owned)? {
        url @ ListenUrl::Unix(_) => Ok(url),
        ListenUrl::Tcp(_) => Err(format!("unix:///path: {reason}")),
    };
    Kind::one("URL", Shape::Text, parse, ListenUrl::to_string)
}

pub(super) fn metrics() -> Kind<Option<SocketAddr>> {
    let parse = |text: &str| match text.parse() {
        _ if is_off(text) => Ok(None),
        Ok(ListenUrl::Tcp(address)) => Ok(Some(address)),
        _ => Err("tcp://address:port, or off"),
    };
    Kind::one("URL|off", Shape::Text, parse, |address| {
        address.map_or(OFF.to_owned(), |address| {
            ListenUrl::Tcp(address).to_string()
        })
    })
}

pub(super) fn dns_server() -> Kind<SocketAddr> {
    let parse = |text: &str| {
        let server = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53));
        let server = server.ok().or_else(|| text.parse().ok());
        server.filter(|server| server.port() != 0).ok_or(
            "the address of a DNS server such as 192.0.2.53, 192.0.2.53:53 or [2001:db8::53]:53",
        )
    };
    Kind::one("ADDRESS[:PORT]", Shape::Text, parse, SocketAddr::to_string)
}

pub(super) fn host_address() -> Kind<IpAddr> {
    let parse = |text: &str| {
        let is_one_host = |ip: &IpAddr| {
            let is_broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
            !(ip.is_unspecified() || ip.is_multicast() || is_broadcast)
        };
        let ip = text.parse().ok().filter(is_one_host);
        ip.ok_or("the address of one host such as 192.0.2.1 or 2001:db8::1")
    };
    Kind::one("ADDRESS", Shape::Text, parse, IpAddr::to_string)
}

/// 576 is the least that every IPv4 host takes (RFC 791).
pub(super) fn mtu() -> Kind<u32> {
    let parse = |text: &str| {
        let is_allowed = |mtu: &u32| *mtu == 0 || (576..=65535).contains(mtu);
        let mtu = text.parse().ok().filter(is_allowed);
        mtu.ok_or("0 for the MTU of the underlay's link, or 576 to 65535")
    };
    Kind::one("BYTES", Shape::Integer(0, 65535), parse, |mtu| *mtu)
}

pub(super) fn vni() -> Kind<Vni> {
    let parse = |text: &str| or(text.parse().ok(), "a VNI between 1 and 16777215");
    Kind::one("VNI", Shape::Integer(1, 16_777_215), parse, |vni: &Vni| {
        vni.get()
    })
}

pub(super) fn duration() -> Kind<Duration> {
    let parse = |text: &str| match parse_duration(text)? {
        Duration::ZERO => Err("a duration above 0 such as 15s or 500ms"),
        duration => Ok(duration),
    };
    Kind::one("DURATION", Shape::Text, parse, |it| show_duration(*it))
}

/// Below a second every client would refresh all the time; above a day a lost client would hold its addresses too long.
pub(super) fn lifetime() -> Kind<Duration> {
    let parse = |text: &str| {
        let range = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
        let lifetime = Some(parse_duration(text)?);
        let lifetime = lifetime.filter(|lifetime| range.contains(lifetime));
        lifetime.ok_or("a duration from 1s to 24h")
    };
    Kind::one("DURATION", Shape::Text, parse, |it| show_duration(*it))
}

/// Below 4 KiB a path of eight segments with their tokens does not fit.
pub(super) fn message_size() -> Kind<usize> {
    let parse = |text: &str| {
        let size = Some(parse_size(text)?);
        let size = size.filter(|size| (4 << 10..=64 << 20).contains(size));
        size.ok_or("4KiB to 64MiB")
    };
    Kind::one("BYTES", Shape::Size, parse, |size| show_size(*size))
}

/// Below 1 MiB not even a few connections fit.
pub(super) fn memory_size() -> Kind<usize> {
    let parse = |text: &str| {
        let size = parse_size(text)?;
        Some(size)
            .filter(|size| *size >= 1 << 20)
            .ok_or("1MiB or more")
    };
    Kind::one("BYTES", Shape::Size, parse, |size| show_size(*size))
}

pub(super) fn file() -> Kind<PathBuf> {
    path("FILE", |_| true, "the path of a file")
}

pub(super) fn directory() -> Kind<PathBuf> {
    path(
        "DIR",
        |text| Path::new(text).is_absolute(),
        "an absolute path",
    )
}

pub(super) fn map_ip_file() -> Kind<MapIpFile> {
    let named = |path| MapIpFile {
        path,
        is_required: true,
    };
    file().map(named, |file| &file.path)
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
            Self::Off => f.write_str(OFF),
            Self::At(url) => url.fmt(f),
        }
    }
}

pub(super) fn labels() -> Kind<BTreeMap<String, String>> {
    Kind::new("KEY=VALUE,…", Shape::Map, read_labels, |labels| {
        json!(labels)
    })
}

pub(super) fn hosts() -> Kind<BTreeMap<Domain, HostEntry>> {
    Kind::new("DOMAIN=HOST[:PORT],…", Shape::Map, read_hosts, |hosts| {
        let entry = |(domain, entry): (&Domain, &HostEntry)| (domain.to_string(), show_host(entry));
        Value::Object(hosts.iter().map(entry).collect())
    })
}

pub(super) fn metadata() -> Kind<MetadataServices> {
    let placeholder = "auto|off|PROVIDER[=URL],…";
    Kind::new(
        placeholder,
        Shape::List,
        read_metadata,
        |services| match services {
            MetadataServices::Auto => "auto".into(),
            MetadataServices::These(services) => services.iter().map(show_service).collect(),
        },
    )
}

/// Labels: a map, or `key=value` pairs, or `key:value` pairs as NSM's own forwarders read them.
fn read_labels(node: &Node) -> Result<BTreeMap<String, String>, Bad> {
    let node = match &node.value {
        node::Value::Scalar(text) if !text.contains('=') => {
            &Node::text(&text.replace(':', "=")).at(node.line)
        }
        _ => node,
    };
    let mut labels = BTreeMap::new();
    for (key, value) in node.pairs()? {
        let value = value.parse(str::parse)?;
        if key.is_empty() || labels.insert(key, value).is_some() {
            return Err(node.bad("key=value pairs, each key once"));
        }
    }
    Ok(labels)
}

/// Each domain with its place: one for both services (`192.0.2.1`, `gw.example:5005`), or a map with `registry` and `proxy`.
fn read_hosts(node: &Node) -> Result<BTreeMap<Domain, HostEntry>, Bad> {
    let mut hosts = BTreeMap::new();
    for (name, node) in node.pairs()? {
        let domain = Node::text(&name).at(node.line);
        let entry = match &node.value {
            node::Value::Map(_) => host_entry(&node)?,
            _ => node.parse(str::parse::<HostTarget>)?.into(),
        };
        if hosts.insert(domain.parse(str::parse)?, entry).is_some() {
            return Err(domain.bad("each domain once"));
        }
    }
    Ok(hosts)
}

fn host_entry(node: &Node) -> Result<HostEntry, Bad> {
    let (mut registry, mut proxy) = (None, None);
    for (service, node) in node.pairs()? {
        let target = Some(node.parse(str::parse::<HostTarget>)?);
        match service.as_str() {
            "registry" => registry = target,
            "proxy" => proxy = target,
            _ => return Err(node.bad(format!("{service:?} is neither registry nor proxy"))),
        }
    }
    match (registry, proxy) {
        (Some(registry), Some(proxy)) => Ok(HostEntry { registry, proxy }),
        _ => Err(node.bad("registry and proxy, both")),
    }
}

fn show_host(entry: &HostEntry) -> Value {
    let (registry, proxy) = (entry.registry.to_string(), entry.proxy.to_string());
    match registry == proxy {
        true => registry.into(),
        false => json!({"registry": registry, "proxy": proxy}),
    }
}

/// Providers, each perhaps with a place of its own, or `auto`, or `off`.
fn read_metadata(node: &Node) -> Result<MetadataServices, Bad> {
    match &node.value {
        node::Value::Scalar(text) if text == "auto" => return Ok(MetadataServices::Auto),
        node::Value::Scalar(text) if is_off(text) => {
            return Ok(MetadataServices::These(Vec::new()));
        }
        _ => {}
    }
    let parse = |text: &str| {
        let (name, url) = text.split_once('=').unwrap_or((text, ""));
        let provider: Provider = name.parse()?;
        let base = match url {
            "" => provider.base_url(),
            url => url,
        };
        base.parse().map(|base| (provider, base))
    };
    let services: Vec<(Provider, BaseUrl)> = node.list(|node| node.parse(parse))?;
    for (at, (provider, _)) in services.iter().enumerate() {
        if services[..at].iter().any(|(other, _)| other == provider) {
            return Err(node.bad(format!("{} once", provider_word(*provider))));
        }
    }
    Ok(MetadataServices::These(services))
}

fn show_service((provider, base): &(Provider, BaseUrl)) -> String {
    let word = provider_word(*provider);
    match base.to_string() {
        base if base == provider.base_url() => word.to_owned(),
        base => format!("{word}={base}"),
    }
}

fn provider_word(provider: Provider) -> &'static str {
    match provider {
        Provider::Aws => "aws",
        Provider::Gcp => "gcp",
        Provider::Equinix => "equinix",
        Provider::Azure => "azure",
    }
}

/// The socket of the Workload API (`unix:///run/spire/sockets/agent.sock`).
pub(super) fn workload_api() -> Kind<PeerUrl> {
    let parse = |text: &str| {
        let url = PeerUrl::configured(text).ok();
        let url = url.filter(|url| url.socket_path().is_some());
        url.ok_or(
            "the socket of SPIFFE's Workload API such as unix:///run/spire/sockets/agent.sock",
        )
    };
    Kind::one("URL", Shape::Text, parse, PeerUrl::to_string)
}

/// Each trust domain with its file.
pub(super) fn bundles() -> Kind<BTreeMap<TrustDomain, PathBuf>> {
    Kind::new(
        "TRUST-DOMAIN=FILE,…",
        Shape::Map,
        read_bundles,
        |bundles| {
            let entry = |(domain, file): (&TrustDomain, &PathBuf)| {
                (domain.to_string(), file.display().to_string().into())
            };
            Value::Object(bundles.iter().map(entry).collect())
        },
    )
}

fn read_bundles(node: &Node) -> Result<BTreeMap<TrustDomain, PathBuf>, Bad> {
    let mut bundles = BTreeMap::new();
    for (name, node) in node.pairs()? {
        let domain = Node::text(&name).at(node.line);
        let file = node.parse(|text| match text {
            "" => Err("the path of a file"),
            path => Ok(PathBuf::from(path)),
        })?;
        if bundles.insert(domain.parse(str::parse)?, file).is_some() {
            return Err(domain.bad("each trust domain once"));
        }
    }
    Ok(bundles)
}
