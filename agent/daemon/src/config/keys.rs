//! The table of keys: for each its name, its flag and variable, its parser and its text.

use std::{fmt::Display, time::Duration};

use nsm_core::{address::public::Provider, nsm::name::Domain};
use nsm_discovery::{dns::HostEntry, public_address::BaseUrl};

use super::{
    model::{Config, DEFAULT_SECRET, Hook, LogFormat, MetadataServices, TokenAlgorithm},
    node::{Bad, Node},
    parse::{
        hide, hosts, labels, metadata, parse_absolute, parse_admin, parse_algorithm, parse_count,
        parse_format, parse_hook, parse_lifetime, parse_message_size, parse_metrics, parse_mtu,
        parse_name, parse_node_name, parse_path, parse_peer, parse_port, parse_positive,
        parse_reachability, parse_secret, parse_server, parse_socket, parse_spiffe_id,
        parse_unicast, parse_vni, provider_word,
    },
    value::{ListenUrl, parse_bool, parse_log_level, show_duration, show_size},
};

/// One key.
pub(crate) struct Key {
    /// `section.key` or `key`.
    pub(super) path: &'static str,
    /// NSM's name of the variable, where it is not the one that follows from the path.
    variable: Option<&'static str>,
    /// What stands behind the flag in help texts.
    pub(super) placeholder: &'static str,
    /// One sentence for help texts.
    pub(super) help: &'static str,
    /// Whether a reload takes a new value over.
    pub(super) reloads: bool,
    /// Takes a value of any layer.
    pub(super) apply: fn(&mut Config, &Node) -> Result<(), Bad>,
    /// The value as it would stand in a file.
    pub(super) show: fn(&Config) -> Shown,
}

/// A value as it would stand in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Shown {
    /// Derived when the agent starts.
    Unset,
    /// Set, and not to be shown: the text is for comparison.
    Hidden(String),
    Text(String),
    List(Vec<String>),
    Map(Vec<(String, Shown)>),
}

impl Key {
    /// The flag, with its dashes.
    pub(super) fn flag(&self) -> String {
        format!("--{}", self.flag_name())
    }

    /// The flag without its dashes.
    pub(super) fn flag_name(&self) -> String {
        self.path.replace(['.', '_'], "-")
    }

    /// The variable.
    pub(super) fn variable(&self) -> String {
        match self.variable {
            Some(name) => name.to_owned(),
            None => format!("NSM_{}", self.path.replace('.', "_").to_ascii_uppercase()),
        }
    }
}

/// A key that needs a restart and whose variable follows from its path.
const fn key(
    path: &'static str,
    placeholder: &'static str,
    help: &'static str,
    apply: fn(&mut Config, &Node) -> Result<(), Bad>,
    show: fn(&Config) -> Shown,
) -> Key {
    Key {
        path,
        variable: None,
        placeholder,
        help,
        reloads: false,
        apply,
        show,
    }
}

impl Key {
    const fn variable_is(mut self, name: &'static str) -> Self {
        self.variable = Some(name);
        self
    }

    const fn reloadable(mut self) -> Self {
        self.reloads = true;
        self
    }
}

/// Every key, in the order of help texts and of `--print-config`; keys of a section stand together.
pub(crate) static KEYS: &[Key] = &[
    key(
        "name",
        "NAME",
        "The agent's name on paths; the host's name by default",
        |c, n| set(&mut c.name, n.parse(parse_name)),
        |c| text(&c.name),
    ),
    key(
        "domain",
        "DOMAIN",
        "The domain whose names (`service@domain`) are served here",
        |c, n| set(&mut c.domain, n.parse(str::parse::<Domain>)),
        |c| text(&c.domain),
    ),
    key(
        "listen.nsmgr",
        "URL",
        "Where local clients and endpoints connect",
        |c, n| set(&mut c.listen.nsmgr, n.parse(str::parse)),
        |c| text(&c.listen.nsmgr),
    ),
    key(
        "listen.forwarder",
        "URL",
        "Where the upstream NSMgr reaches this agent's forwarder; a unix socket",
        |c, n| set(&mut c.listen.forwarder, n.parse(parse_socket)),
        |c| text(&c.listen.forwarder),
    ),
    key(
        "listen.proxy",
        "URL",
        "Where proxies of other domains connect",
        |c, n| set(&mut c.listen.proxy, n.parse(str::parse)),
        |c| text(&c.listen.proxy),
    ),
    key(
        "listen.registry",
        "URL",
        "Where other domains, and other nodes of this one, ask for endpoints",
        |c, n| set(&mut c.listen.registry, n.parse(str::parse)),
        |c| text(&c.listen.registry),
    ),
    key(
        "listen.admin",
        "URL",
        "Where `proxy-nsmgr status` asks; a unix socket",
        |c, n| set(&mut c.listen.admin, n.parse(parse_admin)),
        |c| text(&c.listen.admin),
    ),
    key(
        "listen.metrics",
        "URL|off",
        "Where Prometheus asks for metrics; a TCP address",
        |c, n| set(&mut c.listen.metrics, n.parse(parse_metrics)),
        |c| match c.listen.metrics {
            Some(address) => text(ListenUrl::Tcp(address)),
            None => text("off"),
        },
    ),
    key(
        "advertise_url",
        "URL",
        "What peers are told to dial; by default the tunnel's address and the proxy's port",
        |c, n| set(&mut c.advertise_url, n.parse(parse_peer)),
        |c| optional(c.advertise_url.as_ref()),
    ),
    key(
        "upstream_nsmgr_url",
        "URL",
        "An NSMgr that serves this node in our place; with `forwarder`, this agent is a forwarder of it",
        |c, n| set(&mut c.upstream_nsmgr_url, n.parse(parse_peer)),
        |c| optional(c.upstream_nsmgr_url.as_ref()),
    ),
    key(
        "registry_url",
        "URL",
        "The registry of this domain; switches the registry role off",
        |c, n| set(&mut c.registry_url, n.parse(parse_peer)),
        |c| optional(c.registry_url.as_ref()),
    ),
    key(
        "registry_proxy_url",
        "URL",
        "A registry proxy that is asked for names of other domains; by default DNS is, and their registries",
        |c, n| set(&mut c.registry_proxy_url, n.parse(parse_peer)),
        |c| optional(c.registry_proxy_url.as_ref()),
    ),
    key(
        "forwarder",
        "BOOL",
        "Whether this agent makes links on this node",
        |c, n| set(&mut c.forwarder, n.parse(parse_bool)),
        |c| text(c.forwarder),
    ),
    key(
        "forwarder_service",
        "NAME",
        "The service by which the upstream NSMgr looks for its forwarders",
        |c, n| set(&mut c.forwarder_service, n.parse(parse_name)),
        |c| text(&c.forwarder_service),
    )
    .variable_is("NSM_NSNAME"),
    key(
        "forwarder_labels",
        "KEY=VALUE,…",
        "Labels by which network services choose among forwarders",
        |c, n| set(&mut c.forwarder_labels, labels(n)),
        |c| {
            let labels = c.forwarder_labels.iter();
            Shown::Map(
                labels
                    .map(|(key, value)| (key.clone(), text(value)))
                    .collect(),
            )
        },
    )
    .variable_is("NSM_LABELS"),
    key(
        "reachability",
        "POLICY",
        "Proof of the path to a peer before a connection is granted: require, prefer or off",
        |c, n| set(&mut c.reachability, n.parse(parse_reachability)),
        |c| text(c.reachability),
    ),
    key(
        "resolver.servers",
        "ADDRESS[:PORT],…",
        "DNS servers; the system's own by default",
        |c, n| set(&mut c.resolver.servers, n.list(parse_server)),
        |c| list(&c.resolver.servers),
    )
    .reloadable(),
    key(
        "resolver.hosts",
        "DOMAIN=HOST[:PORT],…",
        "Domains whose place is known and not asked for",
        |c, n| set(&mut c.resolver.hosts, hosts(n)),
        |c| {
            let hosts = c.resolver.hosts.iter();
            Shown::Map(
                hosts
                    .map(|(name, entry)| (name.to_string(), show_host(entry)))
                    .collect(),
            )
        },
    )
    .reloadable(),
    key(
        "resolver.timeout",
        "DURATION",
        "The longest time for one DNS question",
        |c, n| set(&mut c.resolver.timeout, n.parse(parse_positive)),
        |c| duration(c.resolver.timeout),
    )
    .reloadable(),
    key(
        "resolver.registry_port",
        "PORT",
        "The port of a domain's registry without an SRV record",
        |c, n| set(&mut c.resolver.registry_port, n.parse(parse_port)),
        |c| text(c.resolver.registry_port),
    )
    .reloadable(),
    key(
        "resolver.proxy_port",
        "PORT",
        "The port of a domain's proxy without an SRV record",
        |c, n| set(&mut c.resolver.proxy_port, n.parse(parse_port)),
        |c| text(c.resolver.proxy_port),
    )
    .reloadable(),
    key(
        "public_address.ip",
        "ADDRESS",
        "The node's public address; found out by default",
        |c, n| set(&mut c.public_address.ip, n.parse(parse_unicast).map(Some)),
        |c| optional(c.public_address.ip.as_ref()),
    ),
    key(
        "public_address.metadata",
        "auto|off|PROVIDER[=URL],…",
        "Clouds whose metadata service is asked: aws, gcp, azure, equinix; auto: the one that the machine's firmware names",
        |c, n| set(&mut c.public_address.metadata, metadata(n)),
        |c| match &c.public_address.metadata {
            MetadataServices::Auto => text("auto"),
            MetadataServices::These(services) => {
                Shown::List(services.iter().map(show_metadata).collect())
            }
        },
    ),
    key(
        "public_address.kubernetes",
        "auto|off|URL",
        "The API server that is asked for the node's ExternalIP; auto: that of the cluster we run in",
        |c, n| set(&mut c.public_address.kubernetes, n.parse(str::parse)),
        |c| text(&c.public_address.kubernetes),
    ),
    key(
        "public_address.node_name",
        "NAME",
        "The node's name in Kubernetes; the agent's name by default",
        |c, n| {
            set(
                &mut c.public_address.node_name,
                n.parse(parse_node_name).map(Some),
            )
        },
        |c| optional(c.public_address.node_name.as_ref()),
    )
    .variable_is("NSM_NODE_NAME"),
    key(
        "public_address.stun",
        "HOST[:PORT],…",
        "STUN servers that are asked where our packets come from",
        |c, n| set(&mut c.public_address.stun, n.list(str::parse)),
        |c| list(&c.public_address.stun),
    ),
    key(
        "public_address.interval",
        "DURATION",
        "How often all of these are asked, beside each change of an own address",
        |c, n| set(&mut c.public_address.interval, n.parse(parse_positive)),
        |c| duration(c.public_address.interval),
    ),
    key(
        "tunnel.ip",
        "ADDRESS",
        "The local address of tunnels; by default that of the default route",
        |c, n| set(&mut c.tunnel.ip, n.parse(parse_unicast).map(Some)),
        |c| optional(c.tunnel.ip.as_ref()),
    ),
    key(
        "tunnel.port",
        "PORT",
        "The UDP port of VXLAN",
        |c, n| set(&mut c.tunnel.port, n.parse(parse_port)),
        |c| text(c.tunnel.port),
    ),
    key(
        "tunnel.mtu",
        "BYTES",
        "The MTU of the underlay; 0 takes its link's",
        |c, n| set(&mut c.tunnel.mtu, n.parse(parse_mtu)),
        |c| text(c.tunnel.mtu),
    ),
    key(
        "tunnel.management_vni",
        "VNI",
        "The VNI of the probes between nodes, which no connection gets; peers may have another",
        |c, n| set(&mut c.tunnel.management_vni, n.parse(parse_vni)),
        |c| text(c.tunnel.management_vni),
    ),
    key(
        "map_ip_file",
        "FILE",
        "A YAML file of `internal: external` addresses; watched",
        |c, n| set(&mut c.map_ip_file, n.parse(parse_path)),
        |c| text(c.map_ip_file.display()),
    )
    .variable_is("NSM_MAP_IP_FILE_PATH"),
    key(
        "bpf.enabled",
        "BOOL",
        "Whether BPF programs count and check tunnel packets",
        |c, n| set(&mut c.bpf.enabled, n.parse(parse_bool)),
        |c| text(c.bpf.enabled),
    ),
    key(
        "bpf.pin_dir",
        "DIR",
        "Where BPF maps are pinned, below a bpf file system",
        |c, n| set(&mut c.bpf.pin_dir, n.parse(parse_absolute)),
        |c| text(c.bpf.pin_dir.display()),
    ),
    key(
        "bpf.interfaces",
        "NAME,…",
        "Links of the underlay; by default the one with the tunnel's address",
        |c, n| set(&mut c.bpf.interfaces, n.list(str::parse)),
        |c| list(&c.bpf.interfaces),
    ),
    key(
        "bpf.hook",
        "auto|tcx|clsact",
        "How BPF programs are attached",
        |c, n| set(&mut c.bpf.hook, n.parse(parse_hook)),
        |c| {
            text(match c.bpf.hook {
                Hook::Auto => "auto",
                Hook::Tcx => "tcx",
                Hook::Clsact => "clsact",
            })
        },
    ),
    key(
        "max_token_lifetime",
        "DURATION",
        "The longest life of a token that is signed here",
        |c, n| set(&mut c.max_token_lifetime, n.parse(parse_lifetime)),
        |c| duration(c.max_token_lifetime),
    ),
    key(
        "token.algorithm",
        "hs256|es256",
        "How tokens are signed",
        |c, n| set(&mut c.token.algorithm, n.parse(parse_algorithm)),
        |c| {
            text(match c.token.algorithm {
                TokenAlgorithm::Hs256 => "hs256",
                TokenAlgorithm::Es256 => "es256",
            })
        },
    ),
    key(
        "token.secret",
        "TEXT",
        "The shared secret of hs256",
        |c, n| set(&mut c.token.secret, n.parse(parse_secret).map_err(hide)),
        |c| {
            if c.token.secret == DEFAULT_SECRET {
                text(DEFAULT_SECRET)
            } else {
                Shown::Hidden(c.token.secret.clone())
            }
        },
    ),
    key(
        "token.key_file",
        "FILE",
        "The PEM file of es256's key, read again for each token; by default a new key at each start",
        |c, n| set(&mut c.token.key_file, n.parse(parse_path).map(Some)),
        |c| {
            optional(
                c.token
                    .key_file
                    .as_ref()
                    .map(|path| path.display())
                    .as_ref(),
            )
        },
    ),
    key(
        "token.spiffe_id",
        "ID",
        "Who tokens say we are; `spiffe://<domain>/<name>` by default",
        |c, n| set(&mut c.token.spiffe_id, n.parse(parse_spiffe_id).map(Some)),
        |c| optional(c.token.spiffe_id.as_ref()),
    ),
    key(
        "token.audience",
        "ID,…",
        "The SPIFFE ids of the peers that tokens are for; by default tokens name none",
        |c, n| set(&mut c.token.audience, n.list(parse_spiffe_id)),
        |c| list(&c.token.audience),
    ),
    key(
        "request_timeout",
        "DURATION",
        "The longest time for a Request",
        |c, n| set(&mut c.request_timeout, n.parse(parse_positive)),
        |c| duration(c.request_timeout),
    ),
    key(
        "dial_timeout",
        "DURATION",
        "The longest time to connect to a peer",
        |c, n| set(&mut c.dial_timeout, n.parse(parse_positive)),
        |c| duration(c.dial_timeout),
    ),
    key(
        "limits.max_message_bytes",
        "BYTES",
        "The largest message that is taken",
        |c, n| set(&mut c.limits.max_message_bytes, n.parse(parse_message_size)),
        |c| text(show_size(c.limits.max_message_bytes)),
    ),
    key(
        "limits.max_connections",
        "NUMBER",
        "The most connections open at once",
        |c, n| set(&mut c.limits.max_connections, n.parse(parse_count)),
        |c| text(c.limits.max_connections),
    ),
    key(
        "limits.max_streams_per_client",
        "NUMBER",
        "The most streams of one client",
        |c, n| set(&mut c.limits.max_streams_per_client, n.parse(parse_count)),
        |c| text(c.limits.max_streams_per_client),
    ),
    key(
        "log.level",
        "LEVEL",
        "trace, debug, info, warn, error or off; modules too: info,h2=warn",
        |c, n| set(&mut c.log.level, n.parse(parse_log_level)),
        |c| text(&c.log.level),
    )
    .reloadable(),
    key(
        "log.format",
        "text|json",
        "How a line of the log looks",
        |c, n| set(&mut c.log.format, n.parse(parse_format)),
        |c| {
            text(match c.log.format {
                LogFormat::Text => "text",
                LogFormat::Json => "json",
            })
        },
    ),
];

fn set<T>(field: &mut T, value: Result<T, Bad>) -> Result<(), Bad> {
    *field = value?;
    Ok(())
}

fn text(value: impl Display) -> Shown {
    Shown::Text(value.to_string())
}

fn optional(value: Option<&impl Display>) -> Shown {
    value.map_or(Shown::Unset, text)
}

fn strings<T: Display>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

fn list<T: Display>(values: &[T]) -> Shown {
    Shown::List(strings(values))
}

fn duration(value: Duration) -> Shown {
    Shown::Text(show_duration(value))
}

fn show_metadata((provider, base): &(Provider, BaseUrl)) -> String {
    let word = provider_word(*provider);
    if base.to_string() == provider.base_url() {
        word.to_owned()
    } else {
        format!("{word}={base}")
    }
}

fn show_host(entry: &HostEntry) -> Shown {
    if entry.registry == entry.proxy {
        return text(&entry.registry);
    }
    let service = |name: &str, target| (name.to_owned(), text(target));
    Shown::Map(vec![
        service("registry", &entry.registry),
        service("proxy", &entry.proxy),
    ])
}
