//! The control plane's configuration.

use std::sync::Arc;

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit};
use nsm_controlplane::{
    identity::token::{Es256Key, TokenSource},
    places::{Budget, Limits},
    plane::{ControlPlane, Settings},
    ports::Forwarder,
    registry::{
        backend::Backend,
        memory::{self, Memory},
    },
    transport::tls::Tls,
};
use nsm_core::{
    identity::{relay::Relays, share::Limit},
    link::admission,
    mechanism::vni_pool::VniPool,
};
use nsm_discovery::dns::{MAX_FLIGHTS, Resolver, ResolverConfig};

use super::{advertised::Advertised, forwarder::NodeForwarder, policy};
use crate::config::{Config, TokenAlgorithm};

/// Open files where the limit is not known: the usual one.
const USUAL_OPEN_FILES: u64 = 1024;

/// The control plane of an agent.
///
/// # Errors
/// The key of tokens, or the policy's file, cannot be used.
pub(crate) fn build(
    config: &Config,
    forwarder: Option<&Arc<NodeForwarder>>,
    tls: Option<Arc<Tls>>,
) -> anyhow::Result<ControlPlane> {
    let budget = Budget::new(&limits(config));
    let registry = match &config.registry_url {
        Some(url) => Backend::Remote(url.clone()),
        None => Backend::Memory(Memory::charging(memory::Limits::default(), &budget)),
    };
    let settings = Settings {
        name: config.name.clone(),
        domain: config.domain.clone(),
        advertise_url: Advertised::of(config).internal(config.tunnel.ip),
        upstream_nsmgr_url: config.upstream_nsmgr_url.clone(),
        registry_proxy_url: config.registry_proxy_url.clone(),
        request_timeout: config.request_timeout,
        dial_timeout: config.dial_timeout,
        budget,
        max_message_bytes: config.limits.max_message_bytes,
        reachability: config.reachability,
        node_namespace: config.node_namespace,
        admission: admission(config),
        gate: Arc::new(policy::gate(config)?),
        relays: relays(config),
        dial_inside: config.dial_inside.clone(),
        peer_ports: config.tunnel.peer_ports.clone(),
        client_info: config.client_info.labels(),
        tls,
    };
    Ok(ControlPlane::start(
        settings,
        Arc::new(token_source(config)?),
        Resolver::new(resolver_config(config)),
        registry,
        forwarder.map(|forwarder| Arc::clone(forwarder) as Arc<dyn Forwarder>),
        VniPool::new(config.tunnel.management_vni),
    ))
}

/// The callers of the network that the configuration names.
pub(super) fn relays(config: &Config) -> Relays {
    Relays {
        relay_for: config.relay_for.clone(),
        registrants: config.registrants.clone(),
    }
}

/// What callers may hold.
fn limits(config: &Config) -> Limits {
    let limits = &config.limits;
    let each = |all, of_one| Limit { all, of_one };
    let of_one = usize::try_from(limits.max_clients_per_source).unwrap_or(usize::MAX);
    // Half of the open files are for connections from outside, so that links, peers and the administrator's socket have the other half.
    let clients = open_files() / 2;
    Limits {
        connections: each(limits.max_connections, limits.max_connections_per_source),
        clients: each(clients, of_one.min(clients / 4)),
        streams: each(limits.max_streams, limits.max_streams_per_source),
        entries: each(limits.max_entries, limits.max_entries_per_source),
        bytes: each(limits.max_bytes, limits.max_bytes_per_source),
        questions: each(MAX_FLIGHTS, limits.max_questions_per_source),
    }
}

/// How many files this process may have open.
pub(super) fn open_files() -> usize {
    let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(USUAL_OPEN_FILES, |(soft, _)| soft);
    usize::try_from(files).unwrap_or(usize::MAX)
}

/// What other domains may put into pods.
fn admission(config: &Config) -> admission::Rules {
    let mut dns_domains = config.admission.dns_domains.clone();
    dns_domains.push(config.domain.clone());
    admission::Rules {
        prefixes: config.admission.prefixes.clone(),
        of_domain: config.admission.domains.clone(),
        protected: config.admission.protected.clone(),
        dns_domains,
    }
}

/// The resolver's configuration, which a reload replaces.
pub(crate) fn resolver_config(config: &Config) -> ResolverConfig {
    ResolverConfig {
        servers: config.resolver.servers.clone(),
        hosts: config.resolver.hosts.clone(),
        timeout: config.resolver.timeout,
        registry_port: config.resolver.registry_port,
        proxy_port: config.resolver.proxy_port,
        ..ResolverConfig::default()
    }
}

fn token_source(config: &Config) -> anyhow::Result<TokenSource> {
    let (id, lifetime) = (config.spiffe_id(), config.max_token_lifetime);
    let source = match config.token.algorithm {
        TokenAlgorithm::Hs256 => TokenSource::hs256(&id, config.token.secret.as_bytes(), lifetime),
        TokenAlgorithm::Es256 => {
            let file = config.token.key_file.clone();
            let key = file.map_or(Es256Key::Generated, Es256Key::File);
            TokenSource::es256(&id, key, lifetime).context("`token.key_file`")?
        }
    };
    Ok(source.with_audience(config.token.audience.clone()))
}
