//! The parsers of the keys: each gives the value or says what is allowed.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use nsm_controlplane::{liveness::Reachability, transport::dial::DialUrl};
use nsm_core::{
    address::public::Provider,
    net::Vni,
    nsm::name::{Domain, InterdomainName},
};
use nsm_discovery::{
    dns::{HostEntry, HostTarget},
    public_address::BaseUrl,
};

use super::{
    model::{Hook, LogFormat, MetadataServices, TokenAlgorithm},
    node::{Bad, Node, Value},
    value::{DURATION_ALLOWED, ListenUrl, is_off, parse_duration, parse_size},
};

/// A secret is not shown in an error either.
pub(super) fn hide(bad: Bad) -> Bad {
    Bad {
        value: "the value".to_owned(),
        ..bad
    }
}

/// Each domain with its place: one for both services (`192.0.2.1`, `gw.example:5005`), or a map with
/// `registry` and `proxy`.
pub(super) fn hosts(node: &Node) -> Result<BTreeMap<Domain, HostEntry>, Bad> {
    let mut hosts = BTreeMap::new();
    for (name, node) in node.pairs()? {
        let bad = |value: &str, allowed: String| Bad {
            value: format!("{value:?}"),
            ..node.bad(allowed)
        };
        let domain = name
            .parse::<Domain>()
            .map_err(|error| bad(&name, error.to_string()))?;
        let entry = match &node.value {
            Value::Map(_) => host_entry(&node)?,
            _ => node.parse(str::parse::<HostTarget>)?.into(),
        };
        if hosts.insert(domain, entry).is_some() {
            return Err(bad(&name, "each domain once".to_owned()));
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

/// Providers, each perhaps with a place of its own, or `auto`, or `off`.
pub(super) fn metadata(node: &Node) -> Result<MetadataServices, Bad> {
    match &node.value {
        Value::Scalar(text) if text == "auto" => return Ok(MetadataServices::Auto),
        Value::Scalar(text) if is_off(text) => return Ok(MetadataServices::These(Vec::new())),
        _ => {}
    }
    let services: Vec<(Provider, BaseUrl)> = node.list(|text| {
        let (word, url) = text.split_once('=').unwrap_or((text, ""));
        let provider: Provider = word.parse()?;
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

/// How a provider is written in the configuration.
pub(super) fn provider_word(provider: Provider) -> &'static str {
    match provider {
        Provider::Aws => "aws",
        Provider::Gcp => "gcp",
        Provider::Equinix => "equinix",
        Provider::Azure => "azure",
    }
}

/// A node's name in Kubernetes is a DNS name; it becomes a part of a URL.
pub(super) fn parse_node_name(text: &str) -> Result<String, &'static str> {
    let is_name = !text.is_empty()
        && text.len() <= 253
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
    if is_name {
        Ok(text.to_owned())
    } else {
        Err("the name of a Kubernetes node: letters, digits, dots and hyphens")
    }
}

pub(super) fn parse_name(text: &str) -> Result<String, String> {
    InterdomainName::new(text, None)
        .map(|name| name.target().to_owned())
        .map_err(|error| error.to_string())
}

pub(super) fn parse_peer(text: &str) -> Result<Option<DialUrl>, String> {
    match text.parse() {
        Ok(url) => Ok(Some(url)),
        Err(error) => Err(format!("{error}")),
    }
}

pub(super) fn parse_admin(text: &str) -> Result<ListenUrl, &'static str> {
    match text.parse()? {
        url @ ListenUrl::Unix(_) => Ok(url),
        // It answers whoever reaches it: the rights of a socket's file keep others out.
        ListenUrl::Tcp(_) => Err("unix:///path: the admin API is for this machine only"),
    }
}

pub(super) fn parse_metrics(text: &str) -> Result<Option<SocketAddr>, &'static str> {
    const ALLOWED: &str = "tcp://address:port, or off";
    if is_off(text) {
        return Ok(None);
    }
    match text.parse::<ListenUrl>() {
        Ok(ListenUrl::Tcp(address)) => Ok(Some(address)),
        _ => Err(ALLOWED),
    }
}

pub(super) fn parse_server(text: &str) -> Result<SocketAddr, &'static str> {
    const ALLOWED: &str =
        "the address of a DNS server such as 192.0.2.53, 192.0.2.53:53 or [2001:db8::53]:53";
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, 53));
    }
    let server = text.parse::<SocketAddr>().map_err(|_| ALLOWED)?;
    if server.port() == 0 {
        Err(ALLOWED)
    } else {
        Ok(server)
    }
}

pub(super) fn parse_unicast(text: &str) -> Result<IpAddr, &'static str> {
    const ALLOWED: &str = "the address of one host such as 192.0.2.1 or 2001:db8::1";
    let ip = text.parse::<IpAddr>().map_err(|_| ALLOWED)?;
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    if ip.is_unspecified() || ip.is_multicast() || broadcast {
        return Err(ALLOWED);
    }
    Ok(ip)
}

pub(super) fn parse_port(text: &str) -> Result<u16, &'static str> {
    text.parse::<u16>()
        .ok()
        .filter(|&port| port != 0)
        .ok_or("a port between 1 and 65535")
}

pub(super) fn parse_vni(text: &str) -> Result<Vni, &'static str> {
    text.parse().map_err(|_| "a VNI between 1 and 16777215")
}

pub(super) fn parse_mtu(text: &str) -> Result<u32, &'static str> {
    match text.parse::<u32>() {
        // 576 is the least that every IPv4 host takes (RFC 791).
        Ok(mtu) if mtu == 0 || (576..=65535).contains(&mtu) => Ok(mtu),
        _ => Err("0 for the MTU of the underlay's link, or 576 to 65535"),
    }
}

pub(super) fn parse_path(text: &str) -> Result<PathBuf, &'static str> {
    if text.is_empty() || text.contains('\0') {
        return Err("the path of a file");
    }
    Ok(PathBuf::from(text))
}

pub(super) fn parse_absolute(text: &str) -> Result<PathBuf, &'static str> {
    parse_path(text)
        .ok()
        .filter(|path| path.is_absolute())
        .ok_or("an absolute path")
}

pub(super) fn parse_hook(text: &str) -> Result<Hook, &'static str> {
    match text {
        "auto" => Ok(Hook::Auto),
        "tcx" => Ok(Hook::Tcx),
        "clsact" => Ok(Hook::Clsact),
        _ => Err("auto, tcx or clsact"),
    }
}

pub(super) fn parse_format(text: &str) -> Result<LogFormat, &'static str> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("text or json"),
    }
}

/// A socket that only this node reaches.
pub(super) fn parse_socket(text: &str) -> Result<ListenUrl, &'static str> {
    match text.parse()? {
        url @ ListenUrl::Unix(_) => Ok(url),
        ListenUrl::Tcp(_) => Err("unix:///path: namespaces' descriptors travel over sockets only"),
    }
}

/// Labels, as a map, as `key=value` pairs, or as NSM's own forwarders are told them: `key:value`.
pub(super) fn labels(node: &Node) -> Result<BTreeMap<String, String>, Bad> {
    let node = match &node.value {
        Value::Scalar(text) if !text.contains('=') => &Node {
            value: Value::Scalar(text.replace(':', "=")),
            ..node.clone()
        },
        _ => node,
    };
    let mut labels = BTreeMap::new();
    for (key, value) in node.pairs()? {
        let parse = |text: &str| Ok::<_, &'static str>(text.to_owned());
        let value = value.parse(parse)?;
        if key.is_empty() || labels.insert(key, value).is_some() {
            return Err(node.bad("key=value pairs, each key once"));
        }
    }
    Ok(labels)
}

pub(super) fn parse_algorithm(text: &str) -> Result<TokenAlgorithm, &'static str> {
    match text {
        "hs256" => Ok(TokenAlgorithm::Hs256),
        "es256" => Ok(TokenAlgorithm::Es256),
        _ => Err("hs256 or es256"),
    }
}

pub(super) fn parse_reachability(text: &str) -> Result<Reachability, &'static str> {
    if is_off(text) {
        return Ok(Reachability::Off);
    }
    text.parse().map_err(|_| "require, prefer or off")
}

pub(super) fn parse_secret(text: &str) -> Result<String, &'static str> {
    if text.is_empty() {
        Err("a text that is not empty")
    } else {
        Ok(text.to_owned())
    }
}

pub(super) fn parse_spiffe_id(text: &str) -> Result<String, &'static str> {
    let is_id = text
        .strip_prefix("spiffe://")
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/') && rest.is_ascii())
        && !text.contains(|c: char| c.is_whitespace() || c.is_control());
    if is_id {
        Ok(text.to_owned())
    } else {
        Err("a SPIFFE id such as spiffe://cluster-1.example/agent")
    }
}

pub(super) fn parse_positive(text: &str) -> Result<Duration, &'static str> {
    match parse_duration(text)? {
        Duration::ZERO => Err("a duration above 0 such as 15s or 500ms"),
        duration => Ok(duration),
    }
}

/// Below a second every client would refresh all the time; above a day a lost client would hold its
/// addresses for ever.
pub(super) fn parse_lifetime(text: &str) -> Result<Duration, &'static str> {
    let range = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
    match parse_duration(text) {
        Ok(lifetime) if range.contains(&lifetime) => Ok(lifetime),
        Ok(_) => Err("a duration from 1s to 24h"),
        Err(_) => Err(DURATION_ALLOWED),
    }
}

/// Below 4 KiB a path of eight segments with their tokens does not fit.
pub(super) fn parse_message_size(text: &str) -> Result<usize, &'static str> {
    match parse_size(text)? {
        size if (4 << 10..=64 << 20).contains(&size) => Ok(size),
        _ => Err("4KiB to 64MiB"),
    }
}

pub(super) fn parse_count<T: std::str::FromStr + PartialOrd + From<u8>>(
    text: &str,
) -> Result<T, &'static str> {
    text.parse::<T>()
        .ok()
        .filter(|count| *count >= T::from(1))
        .ok_or("a number above 0")
}
