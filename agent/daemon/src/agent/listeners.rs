//! The agent's sockets and the servers behind them.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use nsm_controlplane::{
    api::{
        listener::{ListenerLimits, Socket, serve},
        server::Front,
    },
    places::Budget,
    transport::{clients::Clients, tls::Tls},
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tonic::service::Routes;

use super::{control, handover::when_free, readiness::Readiness};
use crate::config::{Config, ListenUrl};

/// Every pod of the node may connect to the NSMgr's socket, whatever user it runs as; who a client is and what it passes decides what
/// it may name. The socket's folder can narrow that.
const OPEN_TO_ALL: u32 = 0o666;

/// The mode of the admin socket, and of the forwarder's: an NSMgr passes on the namespaces of its clients, and is believed.
const OWN_USER_ONLY: u32 = 0o600;

/// Connections to the admin socket at one time: `status` in some terminals, and what scrapes it.
const ADMIN_CLIENTS: usize = 64;

/// What readiness waits for.
pub(crate) const GUARD: &str = "the listeners";

/// Every socket of the agent, bound.
pub(crate) struct Sockets {
    /// None behind an upstream NSMgr.
    pub(crate) nsmgr: Option<Socket>,
    /// For an upstream NSMgr only.
    pub(crate) forwarder: Option<Socket>,
    pub(crate) proxy: Socket,
    pub(crate) registry: Socket,
    pub(crate) admin: Socket,
    pub(crate) metrics: Option<TcpListener>,
    files: Vec<PathBuf>,
}

impl Sockets {
    /// Binds all sockets, unless the agent would be open to the network without `insecure`; a taken port or path fails at once.
    pub(crate) async fn bind(config: &Config) -> anyhow::Result<Self> {
        config.check_openness()?;
        let listen = &config.listen;
        let mut files = Vec::new();
        let nsmgr = match config.upstream_nsmgr_url {
            Some(_) => None,
            None => Some(bind("listen.nsmgr", &listen.nsmgr, OPEN_TO_ALL, &mut files).await?),
        };
        let mut own = async |key, url| bind(key, url, OWN_USER_ONLY, &mut files).await;
        let forwarder = match config.is_upstreams_forwarder() {
            true => Some(own("listen.forwarder", &listen.forwarder).await?),
            false => None,
        };
        let admin = own("listen.admin", &listen.admin).await?;
        Ok(Self {
            nsmgr,
            forwarder,
            proxy: open("listen.proxy", &listen.proxy).await?,
            registry: open("listen.registry", &listen.registry).await?,
            admin,
            metrics: match listen.metrics {
                Some(address) => Some(bind_metrics(address).await?),
                None => None,
            },
            files,
        })
    }

    /// The files of the sockets that only this agent serves.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.files.clone()
    }
}

/// The servers behind the sockets.
pub(crate) struct Listeners {
    servers: JoinSet<()>,
    budget: Budget,
    limits: ListenerLimits,
    readiness: Readiness,
    /// Set at the end; the servers watch it.
    stop: watch::Sender<bool>,
}

impl Listeners {
    pub(crate) fn new(
        config: &Config,
        tls: Option<Arc<Tls>>,
        budget: &Budget,
        readiness: Readiness,
    ) -> Self {
        Self {
            servers: JoinSet::new(),
            budget: budget.clone(),
            limits: ListenerLimits {
                clients: Clients::of_all(budget.clients.clone(), control::relays(config)),
                messages: budget.messages.clone(),
                max_message_bytes: config.limits.max_message_bytes,
                max_streams: config.limits.max_streams_per_client,
                tls,
            },
            readiness,
            stop: watch::channel(false).0,
        }
    }

    /// Serves NSM with health and reflection.
    pub(crate) fn serve_nsm(
        &mut self,
        name: &'static str,
        socket: Socket,
        front: Front,
    ) -> anyhow::Result<()> {
        let limits = self.limits.clone();
        let routes = front.add_to(self.common_services()?, &limits);
        self.serve(name, socket, routes, limits);
        Ok(())
    }

    /// Serves the NSMgr whose forwarder this agent is. It is one source and opens a connection for each of its clients, so that its
    /// connections count apart and have no limit a source.
    pub(crate) fn serve_forwarder(&mut self, socket: Socket, front: Front) -> anyhow::Result<()> {
        let places = self.budget.clients_apart(control::open_files() / 4);
        let limits = ListenerLimits {
            clients: Clients::of_our_own(places),
            ..self.limits.clone()
        };
        let routes = front.add_to(self.common_services()?, &limits);
        self.serve("forwarder", socket, routes, limits);
        Ok(())
    }

    /// Serves the administrators of the node, whose connections count apart: nobody else's take their place. The kernel proves who they
    /// are, so that there is no TLS.
    pub(crate) fn serve_admin(&mut self, name: &'static str, socket: Socket, routes: Routes) {
        let limits = ListenerLimits {
            clients: Clients::of_our_own(self.budget.clients_apart(ADMIN_CLIENTS)),
            tls: None,
            ..self.limits.clone()
        };
        self.serve(name, socket, routes, limits);
    }

    fn serve(
        &mut self,
        name: &'static str,
        socket: Socket,
        routes: Routes,
        limits: ListenerLimits,
    ) {
        let (stopped, readiness) = (self.stopped(), self.readiness.clone());
        self.servers.spawn(async move {
            if let Err(error) = serve(socket, routes, &limits, stopped).await {
                tracing::error!(listener = name, %error, "a listener broke");
                readiness.wait_for(format!(
                    "the {name} listener, which broke: restart the agent"
                ));
            }
        });
    }

    /// Runs a server that ends with the others.
    pub(crate) fn run(&mut self, server: impl Future<Output = ()> + Send + 'static) {
        let stopped = self.stopped();
        self.servers.spawn(async move {
            tokio::select! {
                () = server => {}
                () = stopped => {}
            }
        });
    }

    /// Health and reflection, on every listener.
    pub(crate) fn common_services(&self) -> anyhow::Result<Routes> {
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(nsm_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .context("cannot build gRPC reflection")?;
        Ok(Routes::new(self.readiness.health_service()).add_service(reflection))
    }

    /// Ends the servers when their calls and streams have ended.
    pub(crate) async fn end(self) {
        let _ = self.stop.send(true);
        self.servers.join_all().await;
    }

    fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut stop = self.stop.subscribe();
        async move {
            let _ = stop.wait_for(|stop| *stop).await;
        }
    }
}

/// Binds a socket whose file, if it has one, has this mode and is removed at the end.
async fn bind(
    key: &str,
    url: &ListenUrl,
    mode: u32,
    files: &mut Vec<PathBuf>,
) -> anyhow::Result<Socket> {
    let socket = open(key, url).await?;
    if let ListenUrl::Unix(path) = url {
        set_mode(path, mode)
            .with_context(|| format!("cannot set the mode of {url} (`{key}`) to {mode:o}"))?;
        files.push(path.clone());
    }
    Ok(socket)
}

async fn open(key: &str, url: &ListenUrl) -> anyhow::Result<Socket> {
    let opened = when_free(url, is_taken, async || match url {
        ListenUrl::Unix(path) => Socket::unix(path),
        ListenUrl::Tcp(address) => Socket::tcp(*address).await,
    });
    opened.await.with_context(|| {
        format!(
            "cannot listen on {url}: choose another `{key}`, or stop the program that listens there"
        )
    })
}

fn is_taken(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrInUse
}

async fn bind_metrics(address: std::net::SocketAddr) -> anyhow::Result<TcpListener> {
    let bound = when_free(address, is_taken, async || TcpListener::bind(address).await);
    bound.await.with_context(|| {
        format!(
            "cannot listen on tcp://{address}: choose another `listen.metrics`, or `off`, or stop the program that listens there"
        )
    })
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}
