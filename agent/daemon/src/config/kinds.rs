//! The kinds of values that keys have: for each what is read, what is allowed otherwise, and how it is shown.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use nsm_controlplane::liveness::Reachability;
use nsm_core::{
    address::public::Provider,
    net::{IfName, PeerUrl, Vni},
    nsm::name::{Domain, InterdomainName},
};
use nsm_discovery::{
    dns::{HostEntry, HostTarget},
    public_address::{BaseUrl, StunServer},
};
use serde_json::{Value, json};

use super::{
    node::{self, Bad, Node},
    table::{Choice, One, Shape, Whole},
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

const DIGITS: Shape = Shape::Integer(1, u64::MAX);

pub(super) static NAME: One<String> = one("NAME", Shape::Text, name);
pub(super) static DOMAIN: One<Domain> = one("DOMAIN", Shape::Text, from_str);
pub(super) static LISTEN: One<ListenUrl> = one("URL", Shape::Text, from_str);
pub(super) static SOCKET: One<ListenUrl> = one("URL", Shape::Text, |text| {
    socket(
        text,
        "unix:///path: namespaces' descriptors travel over sockets only",
    )
});
/// The rights of a socket's file keep other users out.
pub(super) static ADMIN: One<ListenUrl> = one("URL", Shape::Text, |text| {
    socket(text, "unix:///path: the admin API is for this machine only")
});
pub(super) static PEER: One<PeerUrl> = one("URL", Shape::Text, from_str);
pub(super) static DNS_SERVER: One<SocketAddr> = one("ADDRESS[:PORT]", Shape::Text, dns_server);
pub(super) static STUN: One<StunServer> = one("HOST[:PORT]", Shape::Text, from_str);
pub(super) static HOST_ADDRESS: One<IpAddr> = one("ADDRESS", Shape::Text, host_address);
pub(super) static INTERFACE: One<IfName> = one("NAME", Shape::Text, from_str);
pub(super) static KUBERNETES: One<KubernetesApi> = one("auto|off|URL", Shape::Text, from_str);
pub(super) static NODE_NAME: One<String> = one("NAME", Shape::Text, node_name);
pub(super) static SPIFFE_ID: One<String> = one("ID", Shape::Text, spiffe_id);
pub(super) static LOG_LEVEL: One<String> = one("LEVEL", Shape::Text, |text| {
    parse_log_level(text).map_err(str::to_owned)
});
pub(super) static SECRET: One<String> = One {
    is_secret: true,
    ..one("TEXT", Shape::Text, |text| {
        or(
            Some(text.to_owned()).filter(|text| !text.is_empty()),
            "a text that is not empty",
        )
    })
};
pub(super) static PORT: One<u16> = number("PORT", Shape::Integer(1, 65535), |text| {
    or(
        text.parse().ok().filter(|port| *port > 0),
        "a port between 1 and 65535",
    )
});
/// 576 is the least that every IPv4 host takes (RFC 791).
pub(super) static MTU: One<u32> = number("BYTES", Shape::Integer(0, 65535), |text| {
    let allowed = |mtu: &u32| *mtu == 0 || (576..=65535).contains(mtu);
    or(
        text.parse().ok().filter(allowed),
        "0 for the MTU of the underlay's link, or 576 to 65535",
    )
});
pub(super) static CONNECTIONS: One<usize> = number("NUMBER", DIGITS, |text| {
    or(
        text.parse().ok().filter(|count| *count > 0),
        "a number above 0",
    )
});
pub(super) static STREAMS: One<u32> = number("NUMBER", DIGITS, |text| {
    or(
        text.parse().ok().filter(|count| *count > 0),
        "a number above 0",
    )
});
pub(super) static BOOL: One<bool> = number("BOOL", Shape::Bool, |text| {
    parse_bool(text).map_err(str::to_owned)
});
pub(super) static VNI: One<Vni> = One {
    show: |vni| vni.get().into(),
    ..one("VNI", Shape::Integer(1, 16_777_215), |text| {
        or(text.parse().ok(), "a VNI between 1 and 16777215")
    })
};
pub(super) static DURATION: One<Duration> = duration(|text| match parse_duration(text)? {
    Duration::ZERO => Err("a duration above 0 such as 15s or 500ms".to_owned()),
    duration => Ok(duration),
});
/// Below a second every client would refresh all the time; above a day a lost client would hold its addresses too long.
pub(super) static LIFETIME: One<Duration> = duration(|text| {
    let range = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
    let lifetime = parse_duration(text)?;
    or(
        Some(lifetime).filter(|lifetime| range.contains(lifetime)),
        "a duration from 1s to 24h",
    )
});
/// Below 4 KiB a path of eight segments with their tokens does not fit.
pub(super) static MESSAGE_SIZE: One<usize> = One {
    placeholder: "BYTES",
    shape: Shape::Size,
    is_secret: false,
    parse: |text| {
        let size = parse_size(text)?;
        or(
            Some(size).filter(|size| (4 << 10..=64 << 20).contains(size)),
            "4KiB to 64MiB",
        )
    },
    show: |size| show_size(*size).into(),
};
pub(super) static FILE: One<PathBuf> = path("FILE", |text| {
    or(
        Some(text).filter(|text| is_path(text)).map(PathBuf::from),
        "the path of a file",
    )
});
pub(super) static DIRECTORY: One<PathBuf> = path("DIR", |text| {
    let absolute = Some(text).filter(|text| is_path(text) && Path::new(text).is_absolute());
    or(absolute.map(PathBuf::from), "an absolute path")
});
pub(super) static MAP_IP_FILE: One<MapIpFile> = One {
    placeholder: "FILE",
    shape: Shape::Text,
    is_secret: false,
    parse: |text| {
        let path = (FILE.parse)(text)?;
        Ok(MapIpFile {
            path,
            is_required: true,
        })
    },
    show: |file| (FILE.show)(&file.path),
};
pub(super) static METRICS: Whole<Option<SocketAddr>> = Whole {
    placeholder: "URL|off",
    shape: Shape::Text,
    read: |node| {
        node.parse(|text| match text.parse() {
            _ if is_off(text) => Ok(None),
            Ok(ListenUrl::Tcp(address)) => Ok(Some(address)),
            _ => Err("tcp://address:port, or off"),
        })
    },
    show: |address| {
        address.map_or(OFF.into(), |address| {
            ListenUrl::Tcp(address).to_string().into()
        })
    },
};
pub(super) static REACHABILITY: Choice<Reachability> = Choice(&[
    ("require", Reachability::Require),
    ("prefer", Reachability::Prefer),
    (OFF, Reachability::Off),
]);
pub(super) static HOOK: Choice<Hook> = Choice(&[
    ("auto", Hook::Auto),
    ("tcx", Hook::Tcx),
    ("clsact", Hook::Clsact),
]);
pub(super) static ALGORITHM: Choice<TokenAlgorithm> = Choice(&[
    ("hs256", TokenAlgorithm::Hs256),
    ("es256", TokenAlgorithm::Es256),
]);
pub(super) static LOG_FORMAT: Choice<LogFormat> =
    Choice(&[("text", LogFormat::Text), ("json", LogFormat::Json)]);
pub(super) static LABELS: Whole<BTreeMap<String, String>> = Whole {
    placeholder: "KEY=VALUE,…",
    shape: Shape::Map,
    read: labels,
    show: |labels| json!(labels),
};
pub(super) static HOSTS: Whole<BTreeMap<Domain, HostEntry>> = Whole {
    placeholder: "DOMAIN=HOST[:PORT],…",
    shape: Shape::Map,
    read: hosts,
    show: |hosts| {
        let entry = |(domain, entry): (&Domain, &HostEntry)| (domain.to_string(), show_host(entry));
        Value::Object(hosts.iter().map(entry).collect())
    },
};
pub(super) static METADATA: Whole<MetadataServices> = Whole {
    placeholder: "auto|off|PROVIDER[=URL],…",
    shape: Shape::List,
    read: metadata,
    show: |services| match services {
        MetadataServices::Auto => "auto".into(),
        MetadataServices::These(services) => services.iter().map(show_service).collect(),
    },
};

/// A kind of text.
const fn one<T: ToString>(
    placeholder: &'static str,
    shape: Shape,
    parse: fn(&str) -> Result<T, String>,
) -> One<T> {
    One {
        placeholder,
        shape,
        is_secret: false,
        parse,
        show: |value| value.to_string().into(),
    }
}

/// A kind of number or Boolean.
const fn number<T: Copy + Into<Value>>(
    placeholder: &'static str,
    shape: Shape,
    parse: fn(&str) -> Result<T, String>,
) -> One<T> {
    One {
        placeholder,
        shape,
        is_secret: false,
        parse,
        show: |value| (*value).into(),
    }
}

const fn duration(parse: fn(&str) -> Result<Duration, String>) -> One<Duration> {
    One {
        placeholder: "DURATION",
        shape: Shape::Text,
        is_secret: false,
        parse,
        show: |duration| show_duration(*duration).into(),
    }
}

const fn path(
    placeholder: &'static str,
    parse: fn(&str) -> Result<PathBuf, String>,
) -> One<PathBuf> {
    One {
        placeholder,
        shape: Shape::Text,
        is_secret: false,
        parse,
        show: |path| path.display().to_string().into(),
    }
}

fn from_str<T: FromStr<Err: ToString>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn or<T>(value: Option<T>, allowed: &str) -> Result<T, String> {
    value.ok_or_else(|| allowed.to_owned())
}

fn name(text: &str) -> Result<String, String> {
    InterdomainName::new(text, None)
        .map(|name| name.target().to_owned())
        .map_err(|error| error.to_string())
}

/// A socket that only this node reaches.
fn socket(text: &str, allowed: &str) -> Result<ListenUrl, String> {
    let url = from_str(text)?;
    or(
        Some(url).filter(|url| matches!(url, ListenUrl::Unix(_))),
        allowed,
    )
}

fn dns_server(text: &str) -> Result<SocketAddr, String> {
    let with_port = || {
        text.parse()
            .ok()
            .filter(|server: &SocketAddr| server.port() != 0)
    };
    let server = text
        .parse::<IpAddr>()
        .map(|ip| SocketAddr::new(ip, 53))
        .ok();
    or(
        server.or_else(with_port),
        "the address of a DNS server such as 192.0.2.53, 192.0.2.53:53 or [2001:db8::53]:53",
    )
}

fn host_address(text: &str) -> Result<IpAddr, String> {
    let is_one_host = |ip: &IpAddr| {
        let is_broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
        !(ip.is_unspecified() || ip.is_multicast() || is_broadcast)
    };
    or(
        text.parse().ok().filter(is_one_host),
        "the address of one host such as 192.0.2.1 or 2001:db8::1",
    )
}

/// A node's name in Kubernetes is a DNS name; it becomes a part of a URL.
fn node_name(text: &str) -> Result<String, String> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    let is_name = (1..=253).contains(&text.len()) && text.bytes().all(is_allowed);
    or(
        is_name.then(|| text.to_owned()),
        "the name of a Kubernetes node: letters, digits, dots and hyphens",
    )
}

fn spiffe_id(text: &str) -> Result<String, String> {
    let is_id = text
        .strip_prefix("spiffe://")
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/') && rest.is_ascii())
        && !text.contains(|c: char| c.is_whitespace() || c.is_control());
    or(
        is_id.then(|| text.to_owned()),
        "a SPIFFE id such as spiffe://cluster-1.example/agent",
    )
}

fn is_path(text: &str) -> bool {
    !text.is_empty() && !text.contains('\0')
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

/// Labels: a map, or `key=value` pairs, or `key:value` pairs as NSM's own forwarders read them.
fn labels(node: &Node) -> Result<BTreeMap<String, String>, Bad> {
    let node = match &node.value {
        node::Value::Scalar(text) if !text.contains('=') => {
            &Node::text(&text.replace(':', "=")).at(node.line)
        }
        _ => node,
    };
    let mut labels = BTreeMap::new();
    for (key, value) in node.pairs()? {
        let value = value.parse(from_str)?;
        if key.is_empty() || labels.insert(key, value).is_some() {
            return Err(node.bad("key=value pairs, each key once"));
        }
    }
    Ok(labels)
}

/// Each domain with its place: one for both services (`192.0.2.1`, `gw.example:5005`), or a map with `registry` and `proxy`.
fn hosts(node: &Node) -> Result<BTreeMap<Domain, HostEntry>, Bad> {
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
fn metadata(node: &Node) -> Result<MetadataServices, Bad> {
    match &node.value {
        node::Value::Scalar(text) if text == "auto" => return Ok(MetadataServices::Auto),
        node::Value::Scalar(text) if is_off(text) => {
            return Ok(MetadataServices::These(Vec::new()));
        }
        _ => {}
    }
    let services: Vec<(Provider, BaseUrl)> = node.list(|text| {
        let (name, url) = text.split_once('=').unwrap_or((text, ""));
        let provider: Provider = name.parse()?;
        let base = match url {
            "" => provider.base_url(),
            url => url,
        };
        base.parse().map(|base| (provider, base))
    })?;
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
