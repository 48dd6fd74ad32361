//! `proxy-nsmgr agent`: the four roles wired together, from the first socket to the last link.
//!
//! Up: sockets first (a taken port fails at once), then the dataplane, then the control plane,
//! then the listeners; ready when all of it is in place. Down: no new connections, every
//! connection closed towards both sides, the listeners' streams ended, the programs unhooked.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use nsm_controlplane::{
    api::server::{Front, ListenerLimits, Socket, serve},
    identity::token::{Es256Key, TokenSource},
    plane::{ControlPlane, Settings},
    registry::{
        backend::Backend,
        memory::{Limits, Memory},
    },
    route::upstream::ForwarderEntry,
    transport::dial::DialUrl,
};
use nsm_core::mechanism::vni_pool::VniPool;
use nsm_discovery::dns::{Resolver, ResolverConfig};
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinSet,
};
use tonic::service::Routes;

use crate::{
    config::{Config, Inputs, ListenUrl, TokenAlgorithm},
    logging::LogHandle,
};

mod admin;
mod forwarder;
mod ip_map;
mod metrics;
mod namespaces;
mod prober;
mod probing;
mod public_address;
mod readiness;
mod signals;

use self::{
    forwarder::NodeForwarder,
    ip_map::{IpMapFile, IpMaps},
    public_address::PublicAddress,
    readiness::Readiness,
    signals::Signal,
};

/// The NSMgr's socket is for every pod of the node, whatever user it runs as; what a client may name
/// is decided by who it is and what it passes. The socket's folder can narrow that.
const OPEN_TO_ALL: u32 = 0o666;

/// The mode of the admin socket, and of the forwarder's: an NSMgr is root, and its word is taken.
const OWN_USER_ONLY: u32 = 0o600;

/// How long closing all connections may take. Kubernetes waits 30 s before it kills.
const DRAIN_GRACE: Duration = Duration::from_secs(10);

/// How long open calls and streams may take to end after that.
const LISTENER_GRACE: Duration = Duration::from_secs(2);

/// Runs an agent until it is told to stop.
///
/// # Errors
/// What keeps it from starting: a taken port or socket, a bad IP map file, no rights.
pub(crate) async fn run(config: Config, inputs: Inputs, log: LogHandle) -> anyhow::Result<()> {
    let mut signals = signals::Signals::listen()?;
    let sockets = Sockets::bind(&config).await?;
    let own_sockets = sockets.paths(&config);
    let readiness = Readiness::waiting_for(["the listeners", public_address::GUARD]);
    let forwarder = start_forwarder(&config, &readiness).await?;
    let advertise_url = advertise_url(&config, forwarder.as_deref()).await;
    let registry = match &config.registry_url {
        Some(url) => {
            readiness.wait_for(format!("the registry {url}"));
            Backend::Remote(url.to_string())
        }
        None => Backend::Memory(Memory::new(Limits::default())),
    };
    let tokens = Arc::new(token_source(&config)?);
    let plane = ControlPlane::start(
        Settings {
            name: config.name.clone(),
            domain: config.domain.clone(),
            advertise_url,
            upstream_nsmgr_url: config.upstream_nsmgr_url.as_ref().map(DialUrl::to_string),
            registry_proxy_url: config.registry_proxy_url.as_ref().map(DialUrl::to_string),
            request_timeout: config.request_timeout,
            dial_timeout: config.dial_timeout,
            max_connections: config.limits.max_connections,
            max_message_bytes: config.limits.max_message_bytes,
            reachability: config.reachability,
        },
        tokens,
        Resolver::new(resolver_config(&config)),
        registry,
        forwarder
            .clone()
            .map(|forwarder| forwarder as Arc<dyn nsm_controlplane::ports::Forwarder>),
        VniPool::new(config.tunnel.management_vni),
    );
    let maps = Arc::new(IpMaps::new(plane.clone()));
    let map_file = IpMapFile::load(&config.map_ip_file, &maps)?;
    let mut tasks = JoinSet::new();
    tasks.spawn(map_file.follow(Arc::clone(&maps)));
    let public_address = PublicAddress::default();
    plane.set_public_address_known(false);
    tasks.spawn(public_address.clone().watch(
        &config,
        forwarder.clone(),
        Arc::clone(&maps),
        plane.clone(),
        readiness.clone(),
    ));
    if let Some(url) = &config.registry_url {
        tasks.spawn(readiness::until_registry_answers(
            url.clone(),
            config.dial_timeout,
            readiness.clone(),
        ));
    }
    if let Some(forwarder) = &forwarder {
        tasks.spawn(probing::until_it_probes(
            config.clone(),
            Arc::clone(forwarder),
            plane.clone(),
            readiness.clone(),
        ));
        tasks.spawn(forwarder::collect_orphans(
            Arc::clone(forwarder),
            plane.clone(),
            config.domain.clone(),
            config.max_token_lifetime,
        ));
    }
    let (stop, stopped) = watch::channel(false);
    let listeners = sockets
        .serve(
            &config,
            Told {
                plane: plane.clone(),
                forwarder: forwarder.clone(),
                public_address,
                readiness: readiness.clone(),
            },
            &stopped,
        )
        .await?;
    readiness.arrived("the listeners");
    let registration = forwarder_entry(&config).map(|entry| {
        let told = readiness_of_forwarder(&config, &readiness);
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async move {
            let _ = stopped.await;
        };
        let keeping = tokio::spawn(plane.clone().keep_forwarder(entry, told, stopped));
        (stop, keeping)
    });
    tracing::info!(
        name = %config.name, domain = %config.domain, nsmgr = %config.listen.nsmgr,
        proxy = %config.listen.proxy, registry = %config.listen.registry, "the agent serves"
    );

    let mut current = config;
    while signals.next().await == Signal::Reload {
        reload(&mut current, &inputs, &log, &plane, &maps);
    }
    tracing::info!("draining");
    readiness.wait_for("its end: the agent is shutting down");
    if let Some((stop, keeping)) = registration {
        drop(stop);
        let _ = keeping.await;
    }
    if let Some(forwarder) = &forwarder {
        forwarder.leave_paths().await;
    }
    plane.drain(DRAIN_GRACE).await;
    // The receivers are the listeners: they end when they see it.
    let _ = stop.send(true);
    if tokio::time::timeout(LISTENER_GRACE, listeners.join_all())
        .await
        .is_err()
    {
        tracing::warn!("some clients kept their streams open: cut off");
    }
    tasks.shutdown().await;
    for path in own_sockets {
        let _ = std::fs::remove_file(path);
    }
    drop(plane);
    if let Some(forwarder) = forwarder {
        forwarder.close().await;
    }
    tracing::info!("stopped");
    Ok(())
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

/// What this agent's forwarder is to an upstream NSMgr.
fn forwarder_entry(config: &Config) -> Option<ForwarderEntry> {
    let ListenUrl::Unix(path) = &config.listen.forwarder else {
        return None;
    };
    config.is_upstreams_forwarder().then(|| ForwarderEntry {
        name: config.name.clone(),
        service: config.forwarder_service.clone(),
        labels: config.forwarder_labels.clone(),
        url: DialUrl::Unix(path.clone()),
    })
}

/// Ready when the NSMgr knows our forwarder.
fn readiness_of_forwarder(config: &Config, readiness: &Readiness) -> impl Fn(bool) + use<> {
    let nsmgr = config.upstream_nsmgr_url.as_ref();
    let nsmgr = nsmgr.map(DialUrl::to_string).unwrap_or_default();
    let guard = format!("the NSMgr {nsmgr}, whose forwarder this agent is");
    readiness.wait_for(guard.clone());
    let readiness = readiness.clone();
    move |registered| match registered {
        true => readiness.arrived(&guard),
        false => readiness.wait_for(guard.clone()),
    }
}

async fn start_forwarder(
    config: &Config,
    readiness: &Readiness,
) -> anyhow::Result<Option<Arc<NodeForwarder>>> {
    if !config.forwarder {
        return Ok(None);
    }
    let forwarder = NodeForwarder::start(config).await?;
    for reason in forwarder.degraded() {
        tracing::warn!(reason, "degraded");
        readiness.degraded(reason.clone());
    }
    Ok(Some(Arc::new(forwarder)))
}

/// What others are told to dial: as configured, else the tunnel's address and the proxy's port.
async fn advertise_url(config: &Config, forwarder: Option<&NodeForwarder>) -> String {
    if let Some(url) = &config.advertise_url {
        return url.to_string();
    }
    let ListenUrl::Tcp(listen) = &config.listen.proxy else {
        return config.listen.proxy.to_string();
    };
    let mut address = *listen;
    if address.ip().is_unspecified() {
        let ip = match (config.tunnel.ip, forwarder) {
            (Some(ip), _) => Some(ip),
            (None, Some(forwarder)) => forwarder.tunnel_ip().await.ok(),
            (None, None) => None,
        };
        if let Some(ip) = ip {
            address.set_ip(ip);
        }
    }
    format!("tcp://{address}")
}

fn resolver_config(config: &Config) -> ResolverConfig {
    ResolverConfig {
        servers: config.resolver.servers.clone(),
        hosts: config.resolver.hosts.clone(),
        timeout: config.resolver.timeout,
        registry_port: config.resolver.registry_port,
        proxy_port: config.resolver.proxy_port,
        ..ResolverConfig::default()
    }
}

/// SIGHUP: takes over what can be, names what cannot. A bad file changes nothing.
fn reload(
    current: &mut Config,
    inputs: &Inputs,
    log: &LogHandle,
    plane: &ControlPlane,
    maps: &IpMaps,
) {
    let new = match Config::load(inputs) {
        Ok(loaded) => loaded.config,
        Err(error) => {
            tracing::error!(%error, "the configuration is not reloaded: mend the file and send SIGHUP again");
            return;
        }
    };
    let changes = Config::reloadable_changes(current, &new);
    if !changes.restart.is_empty() {
        tracing::warn!(keys = ?changes.restart, "these keys need a restart of the agent");
    }
    if let Err(error) = log.set_level(&new.log.level) {
        tracing::error!(%error, "the log level stays as it is");
    }
    plane.resolver().reload(resolver_config(&new));
    ip_map::reload(&current.map_ip_file.path, maps);
    current.log.level.clone_from(&new.log.level);
    current.resolver = new.resolver;
    tracing::info!(keys = ?changes.reloadable, "reloaded");
}

/// What the listeners tell about.
#[derive(Clone)]
struct Told {
    plane: ControlPlane,
    forwarder: Option<Arc<NodeForwarder>>,
    public_address: PublicAddress,
    readiness: Readiness,
}

/// Every socket of the agent, bound.
struct Sockets {
    nsmgr: Option<Socket>,
    forwarder: Option<Socket>,
    proxy: Socket,
    registry: Socket,
    admin: Socket,
    metrics: Option<TcpListener>,
}

impl Sockets {
    async fn bind(config: &Config) -> anyhow::Result<Self> {
        let listen = &config.listen;
        let nsmgr = match config.upstream_nsmgr_url {
            Some(_) => None,
            None => Some(bind("listen.nsmgr", &listen.nsmgr).await?),
        };
        if let (Some(_), ListenUrl::Unix(path)) = (&nsmgr, &listen.nsmgr) {
            set_mode(path, OPEN_TO_ALL).context("cannot open the NSMgr's socket to all users")?;
        }
        let forwarder = match config.is_upstreams_forwarder() {
            true => Some(bind("listen.forwarder", &listen.forwarder).await?),
            false => None,
        };
        if let (Some(_), ListenUrl::Unix(path)) = (&forwarder, &listen.forwarder) {
            set_mode(path, OWN_USER_ONLY)
                .context("cannot restrict the forwarder's socket to root")?;
        }
        let admin = bind("listen.admin", &listen.admin).await?;
        if let ListenUrl::Unix(path) = &listen.admin {
            set_mode(path, OWN_USER_ONLY).context("cannot restrict the admin socket to root")?;
        }
        Ok(Self {
            nsmgr,
            forwarder,
            proxy: bind("listen.proxy", &listen.proxy).await?,
            registry: bind("listen.registry", &listen.registry).await?,
            admin,
            metrics: match listen.metrics {
                Some(address) => Some(metrics::bind(address).await?),
                None => None,
            },
        })
    }

    /// The files of the sockets that are ours: an upstream NSMgr's is not.
    fn paths(&self, config: &Config) -> Vec<PathBuf> {
        let listen = &config.listen;
        [
            (self.nsmgr.is_some(), &listen.nsmgr),
            (self.forwarder.is_some(), &listen.forwarder),
            (true, &listen.admin),
        ]
        .into_iter()
        .filter_map(|(bound, url)| match url {
            ListenUrl::Unix(path) if bound => Some(path.clone()),
            _ => None,
        })
        .collect()
    }

    async fn serve(
        self,
        config: &Config,
        told: Told,
        stopped: &watch::Receiver<bool>,
    ) -> anyhow::Result<JoinSet<()>> {
        let limits = ListenerLimits {
            max_message_bytes: config.limits.max_message_bytes,
            max_streams: config.limits.max_streams_per_client,
        };
        let (plane, readiness) = (told.plane.clone(), told.readiness.clone());
        let mut listeners = JoinSet::new();
        if let Some(listener) = self.metrics {
            let mut stopped = stopped.clone();
            let metrics = metrics::Metrics::new(told.clone());
            listeners.spawn(async move {
                tokio::select! {
                    () = metrics.serve(listener) => {}
                    _ = stopped.wait_for(|stop| *stop) => {}
                }
            });
        }
        let mut listen = |name: &'static str, socket, routes: Routes| {
            let (mut stopped, readiness) = (stopped.clone(), readiness.clone());
            listeners.spawn(async move {
                let shutdown = async move {
                    let _ = stopped.wait_for(|stop| *stop).await;
                };
                if let Err(error) = serve(socket, routes, limits, shutdown).await {
                    tracing::error!(listener = name, %error, "a listener broke");
                    readiness.wait_for(format!(
                        "the {name} listener, which broke: restart the agent"
                    ));
                }
            });
        };
        let with = |front: Front| -> anyhow::Result<Routes> {
            Ok(front.add_to(common_services(&readiness)?, limits))
        };
        if let Some(socket) = self.nsmgr {
            listen("nsmgr", socket, with(plane.node_front())?);
        }
        if let Some(socket) = self.forwarder {
            listen("forwarder", socket, with(plane.forwarder_front())?);
        }
        listen("proxy", self.proxy, with(plane.network_front())?);
        listen("registry", self.registry, with(plane.network_front())?);
        let common = common_services(&readiness)?;
        let admin = admin::service(config, told);
        listen("admin", self.admin, common.add_service(admin));
        Ok(listeners)
    }
}

/// Health and reflection, on every listener.
fn common_services(readiness: &Readiness) -> anyhow::Result<Routes> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(nsm_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("cannot build gRPC reflection")?;
    Ok(Routes::new(readiness.health_service()).add_service(reflection))
}

async fn bind(key: &str, url: &ListenUrl) -> anyhow::Result<Socket> {
    match url {
        ListenUrl::Unix(path) => Socket::unix(path),
        ListenUrl::Tcp(address) => Socket::tcp(*address).await,
    }
    .with_context(|| {
        format!("cannot listen on {url}: choose another `{key}`, or stop whoever listens there")
    })
}

fn set_mode(path: &Path, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}
