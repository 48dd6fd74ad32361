//! `proxy-nsmgr agent`: all parts wired together.
//!
//! Start: sockets first (a taken port fails at once), then the dataplane, the control plane, the tasks, the listeners. The agent is ready
//! when all guards of [`Readiness`] are gone.
//!
//! Stop (SIGTERM): the listeners end, and everything else stays in the kernel for the next agent, as after a crash: links, tunnels,
//! programs, pins, the table of nftables. Drain (`proxy-nsmgr drain`, Ctrl-C): no new connections, every connection closed on both sides,
//! the listeners' streams ended, the programs detached.

use std::{path::PathBuf, sync::Arc, time::Duration};

use nsm_controlplane::plane::ControlPlane;
use tokio::{sync::oneshot, task::JoinSet};

use crate::{
    agent::{
        cluster, control,
        drains::{self, Asked, Drained, Drains},
        forwarder::NodeForwarder,
        hooks, identity,
        ip_map::{self, IpMapFile, IpMaps},
        listeners::{self, Listeners, Sockets},
        orphans, policy,
        public_address::{self, PublicAddress},
        readiness::Readiness,
        signals::{Signal, Signals},
        upstream::Registration,
    },
    config::{Config, Inputs},
    logging::LogHandle,
    observe::{Observer, admin, metrics::Metrics},
};

/// How long closing all connections may take. Kubernetes waits 30 s before it kills.
const DRAIN_GRACE: Duration = Duration::from_secs(10);

/// How long open calls and streams may take to end after that.
const LISTENER_GRACE: Duration = Duration::from_secs(2);

/// Runs an agent until a signal stops it.
///
/// # Errors
/// What keeps it from starting: a taken port or socket, a bad IP map file, no rights.
pub(crate) async fn run(mut config: Config, inputs: Inputs, log: LogHandle) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let mut agent = Agent::start(&config).await?;
    tracing::info!(
        name = %config.name, domain = %config.domain, nsmgr = %config.listen.nsmgr,
        proxy = %config.listen.proxy, registry = %config.listen.registry, "the agent serves"
    );
    let end = loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Signal::Reload => agent.reload(&mut config, &inputs, &log),
                Signal::Stop => break End::Stop,
                Signal::Drain => break End::Drain(None),
            },
            answer = agent.asked.next() => break End::Drain(Some(answer)),
        }
    };
    match end {
        End::Stop => {
            tracing::info!("stopping: connections stand, the next agent takes them over");
            agent.stop().await;
        }
        End::Drain(answer) => {
            tracing::info!("draining");
            agent.drain(answer).await;
        }
    }
    tracing::info!("stopped");
    Ok(())
}

/// How the agent ends.
enum End {
    Stop,
    /// And who is to get the outcome.
    Drain(Option<oneshot::Sender<Drained>>),
}

/// The parts of a running agent.
struct Agent {
    readiness: Readiness,
    forwarder: Option<Arc<NodeForwarder>>,
    plane: ControlPlane,
    maps: Arc<IpMaps>,
    tasks: JoinSet<()>,
    listeners: Option<Listeners>,
    registration: Option<Registration>,
    socket_files: Vec<PathBuf>,
    asked: Asked,
}

impl Agent {
    async fn start(config: &Config) -> anyhow::Result<Self> {
        let sockets = Sockets::bind(config).await?;
        let socket_files = sockets.files();
        let readiness = Readiness::waiting_for([listeners::GUARD, public_address::GUARD]);
        let forwarder = NodeForwarder::build(config, &readiness).await?;
        let mut tasks = JoinSet::new();
        let tls = identity::start(config, &readiness, &mut tasks)?;
        let plane = control::build(config, forwarder.as_ref(), tls.clone())?;
        let maps = Arc::new(IpMaps::new(plane.clone()));
        let map_file = IpMapFile::load(&config.map_ip_file, &maps)?;
        let observer = Observer {
            plane: plane.clone(),
            forwarder: forwarder.clone(),
            public_address: PublicAddress::default(),
            readiness: readiness.clone(),
            tls: tls.clone(),
        };
        tasks.spawn(map_file.follow(Arc::clone(&maps)));
        let prefixes_file = config.admission.excluded_prefixes_file.clone();
        tasks.spawn(cluster::follow(prefixes_file, plane.clone()));
        plane.set_public_address_known(false);
        tasks.spawn(observer.public_address.clone().watch(
            config,
            forwarder.clone(),
            Arc::clone(&maps),
            plane.clone(),
            readiness.clone(),
        ));
        if let Some(url) = &config.registry_url {
            let (url, timeout) = (url.clone(), config.dial_timeout);
            tasks.spawn(
                readiness
                    .clone()
                    .until_registry_answers(url, tls.clone(), timeout),
            );
        }
        if let Some(forwarder) = &forwarder {
            let probing = Arc::clone(forwarder.probing());
            tasks.spawn(probing.until_it_probes(plane.clone(), readiness.clone()));
            let programs = Arc::clone(forwarder.programs());
            let forwarding = Arc::clone(forwarder.forwarding());
            tasks.spawn(hooks::look_after(programs, forwarding, readiness.clone()));
            tasks.spawn(orphans::collect(
                Arc::clone(forwarder),
                plane.clone(),
                config.domain.clone(),
                config.max_token_lifetime,
            ));
        }
        let (drains, asked) = drains::channel();
        let listeners = serve(config, sockets, observer, drains)?;
        let registration = Registration::keep(config, &plane, &readiness);
        readiness.arrived(listeners::GUARD);
        Ok(Self {
            readiness,
            forwarder,
            plane,
            maps,
            tasks,
            listeners: Some(listeners),
            registration,
            socket_files,
            asked,
        })
    }

    /// SIGHUP: takes over the keys that can change, names the others. A bad file changes nothing.
    fn reload(&self, current: &mut Config, inputs: &Inputs, log: &LogHandle) {
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
        self.plane.resolver().reload(control::resolver_config(&new));
        ip_map::reload(&current.map_ip_file.path, &self.maps);
        policy::reload(current.policy_file.as_deref(), &self.plane);
        current.log.level.clone_from(&new.log.level);
        current.resolver = new.resolver;
        tracing::info!(keys = ?changes.reloadable, "reloaded");
    }

    /// Ends, and leaves all that stands to the next agent.
    async fn stop(mut self) {
        self.begin_end();
        // Nothing is taken out of the kernel when this process ends: what would do so when it is dropped is kept until then.
        std::mem::forget(self.forwarder.clone());
        self.plane.end_streams();
        self.end_listeners().await;
    }

    /// Closes everything, and ends.
    async fn drain(mut self, answer: Option<oneshot::Sender<Drained>>) {
        self.begin_end();
        if let Some(registration) = self.registration.take() {
            registration.end().await;
        }
        if let Some(forwarder) = &self.forwarder {
            forwarder.leave_paths().await;
        }
        let before = self.plane.connections().len();
        self.plane.drain(DRAIN_GRACE).await;
        let left = self.plane.connections().len();
        let closed = before.saturating_sub(left);
        // What looks after links and programs would put them back.
        self.tasks.shutdown().await;
        if let Some(forwarder) = &self.forwarder {
            forwarder.close().await;
        }
        if let Some(answer) = answer {
            // Who asked may have gone.
            let _ = answer.send(Drained { closed, left });
        }
        self.end_listeners().await;
    }

    fn begin_end(&self) {
        self.readiness
            .wait_for("its end: the agent is shutting down");
        // While this agent still listens there: the next one may have its own in that place a moment later.
        for path in &self.socket_files {
            let _ = std::fs::remove_file(path);
        }
    }

    async fn end_listeners(&mut self) {
        let listeners = std::mem::take(&mut self.listeners);
        let ended =
            listeners.map(|listeners| tokio::time::timeout(LISTENER_GRACE, listeners.end()));
        if let Some(ended) = ended
            && ended.await.is_err()
        {
            tracing::warn!("some clients kept their streams open: cut off");
        }
        self.tasks.shutdown().await;
    }
}

/// Which service is on which socket.
fn serve(
    config: &Config,
    sockets: Sockets,
    observer: Observer,
    drains: Drains,
) -> anyhow::Result<Listeners> {
    let plane = observer.plane.clone();
    let tls = observer.tls.clone();
    let readiness = observer.readiness.clone();
    let mut listeners = Listeners::new(config, tls, plane.budget(), readiness);
    if let Some(listener) = sockets.metrics {
        listeners.run(Metrics::new(observer.clone()).serve(listener));
    }
    if let Some(socket) = sockets.nsmgr {
        listeners.serve_nsm("nsmgr", socket, plane.node_front())?;
    }
    if let Some(socket) = sockets.forwarder {
        listeners.serve_forwarder(socket, plane.forwarder_front())?;
    }
    listeners.serve_nsm("proxy", sockets.proxy, plane.network_front())?;
    listeners.serve_nsm("registry", sockets.registry, plane.network_front())?;
    let routes = listeners
        .common_services()?
        .add_service(admin::service(config, observer, drains));
    listeners.serve_admin("admin", sockets.admin, routes);
    Ok(listeners)
}
