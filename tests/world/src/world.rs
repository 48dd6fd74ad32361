//! A world that stands: its nodes, pods and processes, and its end.

use std::{
    ffi::OsStr,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use crate::{
    Builder, Dns, Fault, FaultGuard, Leaks, Link, PIN_DIR, Process, WorldError, fault, leaks,
    netns::{self, command_in},
    plan::{Cloud, DNS_ADDRESS, NODE_INTERFACE, Place, Plan},
    process::{Body, Company, ProcessId, record},
    remove, wait_until,
};

/// A world of network namespaces; dropping it tears it down.
#[derive(Debug)]
pub struct World {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) plan: Plan,
    run_dir: PathBuf,
    /// Links of real agents on this machine, which are none of ours.
    links_outside: Vec<Link>,
    state: Mutex<State>,
    dns: OnceLock<Dns>,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    torn_down: bool,
    /// Every process ever spawned: the handle, and the identity by which it is looked up after its end.
    processes: Vec<(Arc<Body>, ProcessId)>,
    /// Processes that others started inside our namespaces, found at tear-down. Not ours to kill.
    strangers: Vec<ProcessId>,
    /// How many faults were injected so far; each has a table of its own.
    faults: usize,
}

/// Worlds that stand, for the thread that attends to signals.
static STANDING: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

impl World {
    /// Starts the description of a world. `name` becomes part of every name: lower-case letters, digits and '-'.
    pub fn builder(name: &str) -> Builder {
        Builder::new(name)
    }

    pub(crate) fn new(plan: Plan, run_dir: PathBuf, links_outside: Vec<Link>) -> Self {
        let inner = Arc::new(Inner {
            plan,
            run_dir,
            links_outside,
            state: Mutex::default(),
            dns: OnceLock::new(),
        });
        let mut standing = STANDING.lock().unwrap_or_else(PoisonError::into_inner);
        standing.retain(|world| world.strong_count() > 0);
        standing.push(Arc::downgrade(&inner));
        Self { inner }
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.inner.plan
    }

    /// Held while the world is made, so that a Ctrl-C waits for a whole world to tear down.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.state()
    }

    pub(crate) fn set_dns(&self, dns: Dns) {
        // The builder sets it once.
        let _ = self.inner.dns.set(dns);
    }

    /// The world's id, `<name>-<pid>-<n>`: the prefix of its namespaces and pin directories.
    pub fn id(&self) -> &str {
        &self.inner.plan.id
    }

    /// How the nodes come by their public addresses.
    pub fn cloud(&self) -> Cloud {
        self.inner.plan.cloud
    }

    /// The directory of the world's files: `node(..).run_dir()` of each node is in it, and `log/` of all processes.
    pub fn run_dir(&self) -> &Path {
        &self.inner.run_dir
    }

    /// The node of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<Node, WorldError> {
        let mut nodes = self.inner.plan.nodes();
        let place = nodes
            .find(|(_, node)| node.name == name)
            .map(|(place, _)| place);
        place
            .map(|place| self.node_at(place))
            .ok_or_else(|| WorldError::Unknown {
                kind: "node",
                name: name.to_owned(),
                have: self
                    .nodes()
                    .iter()
                    .map(Node::name)
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// All nodes, domain by domain.
    pub fn nodes(&self) -> Vec<Node> {
        self.inner
            .plan
            .nodes()
            .map(|(place, _)| self.node_at(place))
            .collect()
    }

    fn node_at(&self, place: Place) -> Node {
        Node {
            world: Arc::clone(&self.inner),
            place,
        }
    }

    /// The pod of that name, on whichever node it is.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, name: &str) -> Result<Pod, WorldError> {
        let mut pods: Vec<Pod> = self.nodes().iter().flat_map(Node::pods).collect();
        match pods.iter().position(|pod| pod.name == name) {
            Some(index) => Ok(pods.swap_remove(index)),
            None => Err(WorldError::Unknown {
                kind: "pod",
                name: name.to_owned(),
                have: pods.iter().map(Pod::name).collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// The world's DNS server.
    ///
    /// # Panics
    /// When the world was built without one ([`Builder::without_dns`]).
    pub fn dns(&self) -> &Dns {
        self.inner
            .dns
            .get()
            .expect("this world was built without DNS")
    }

    /// Starts a process: its stdout and stderr go to `log/<name>.out` and `.err`, it has a process group of its own, and it
    /// dies with this process, with the [`Process`] and with the world. Make the command with [`Node::command`] or
    /// [`Pod::command`]; its stdin, stdout and stderr are set here.
    ///
    /// # Errors
    /// When the program cannot be started, or the world is torn down.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process, WorldError> {
        self.spawn_in(name, command, Company::Group)
    }

    /// Starts a process as [`World::spawn`], in a session of its own: where the kernel groups by session it has a share of the
    /// CPU of its own, as what runs in another container does.
    ///
    /// # Errors
    /// As [`World::spawn`].
    pub fn spawn_apart(&self, name: &str, command: Command) -> Result<Process, WorldError> {
        self.spawn_in(name, command, Company::Session)
    }

    fn spawn_in(
        &self,
        name: &str,
        command: Command,
        company: Company,
    ) -> Result<Process, WorldError> {
        let mut state = self.inner.standing_state()?;
        let log_dir = self.inner.run_dir.join("log");
        fs::create_dir_all(&log_dir)
            .map_err(WorldError::io(format!("create {}", log_dir.display())))?;
        // A second process of a name must not be taken for the first by its log.
        let earlier = state
            .processes
            .iter()
            .filter(|(body, _)| body.name() == name)
            .count();
        let log_name = if earlier == 0 {
            name.to_owned()
        } else {
            format!("{name}.{}", earlier + 1)
        };
        let (process, id) = Process::spawn(name, &log_name, command, &log_dir, company)?;
        let list = self.inner.run_dir.join(remove::PROCESSES);
        let listed =
            record(&list, &id).map_err(WorldError::io(format!("write {}", list.display())));
        state.processes.push((process.body(), id));
        listed?;
        Ok(process)
    }

    /// Injects a fault between two nodes, until the guard is dropped. It lies in the middle (in the internet, or in the
    /// gateway for two nodes of one aws domain), where the nodes' own BPF programs cannot see it.
    ///
    /// # Errors
    /// When nftables refuses it.
    pub fn inject(&self, from: &Node, to: &Node, what: Fault) -> Result<FaultGuard, WorldError> {
        let mut state = self.inner.standing_state()?;
        state.faults += 1;
        fault::inject(&self.inner.plan, from.place, to.place, what, state.faults)
    }

    /// Lets a node's own firewall drop UDP packets to `port`, until the guard is dropped.
    ///
    /// # Errors
    /// When nftables refuses it.
    pub fn close_port(&self, node: &Node, port: u16) -> Result<FaultGuard, WorldError> {
        let mut state = self.inner.standing_state()?;
        state.faults += 1;
        fault::close_port(&node.netns_name(), port, state.faults)
    }

    /// Asks all processes to end (SIGTERM), all at once, and waits for them; those that do not are killed and named.
    /// The DNS server stays.
    pub fn stop_processes(&self, deadline: Duration) -> Vec<String> {
        let dns = self.inner.dns.get().map(Dns::pid);
        let processes: Vec<_> = self
            .lock()
            .processes
            .iter()
            .map(|(body, _)| Arc::clone(body))
            .collect();
        let ours: Vec<_> = processes
            .into_iter()
            .filter(|body| Some(body.pid()) != dns)
            .collect();
        ours.iter().for_each(|body| body.ask_to_end());
        let _ = wait_until("all processes to end", deadline, || {
            ours.iter().all(|body| body.has_ended())
        });
        let late = ours.iter().filter(|body| !body.has_ended());
        late.map(|body| {
            body.kill();
            body.name().to_owned()
        })
        .collect()
    }

    /// The end of every process's output, for a person who looks for the cause of a failure.
    pub fn logs(&self) -> String {
        self.lock()
            .processes
            .iter()
            .map(|(body, _)| body.tail())
            .collect()
    }

    /// Kills the processes and removes namespaces, pins and files. Idempotent; drop does it too.
    pub fn tear_down(&self) {
        self.inner.tear_down();
    }

    /// Runs `work` in the namespace between the nodes, which routes; sockets made there stay there.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn in_internet<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, WorldError> {
        netns::inside(&netns::path(&self.inner.plan.internet()), work)
    }

    /// What of this world exists at this moment, looked up in the kernel and the file systems. After
    /// [`World::tear_down`] there should be nothing; between [`World::stop_processes`] and it, `links` and `pins` are
    /// what the agents left behind.
    ///
    /// # Errors
    /// When `ip` cannot show the links of a namespace.
    pub fn leaks(&self) -> Result<Leaks, WorldError> {
        let state = self.lock();
        let known = state
            .processes
            .iter()
            .map(|(_, id)| id)
            .chain(&state.strangers);
        let known: Vec<_> = known.cloned().collect();
        leaks::look(self.id(), &known, &self.inner.links_outside)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "world {}, last lines of its processes:\n{}",
                self.id(),
                self.logs()
            );
        }
        self.tear_down();
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn standing_state(&self) -> Result<MutexGuard<'_, State>, WorldError> {
        let state = self.state();
        if state.torn_down {
            return Err(WorldError::TornDown(self.plan.id.clone()));
        }
        Ok(state)
    }

    fn tear_down(&self) {
        let mut state = self.state();
        if std::mem::replace(&mut state.torn_down, true) {
            return;
        }
        for (body, _) in &state.processes {
            body.kill();
        }
        remove::kill_strays(&self.plan.id);
        state.strangers = leaks::processes_inside(&self.plan.id)
            .into_iter()
            .map(|process| process.id)
            .collect();
        remove::world(&self.plan.id);
    }
}

/// Tears down every world that stands; the process is about to end.
pub(crate) fn tear_down_all() {
    let standing: Vec<_> = STANDING
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .drain(..)
        .collect();
    for world in standing.iter().filter_map(Weak::upgrade) {
        world.tear_down();
    }
}

/// A node: a network namespace with an underlay interface.
#[derive(Debug, Clone)]
pub struct Node {
    world: Arc<Inner>,
    place: Place,
}

impl Node {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.world.plan.domains[self.place.domain].nodes[self.place.node].name
    }

    /// The domain it belongs to.
    pub fn domain(&self) -> &str {
        &self.world.plan.domains[self.place.domain].name
    }

    /// The path of its network namespace.
    pub fn netns(&self) -> PathBuf {
        netns::path(&self.netns_name())
    }

    /// The name of its network namespace, for `ip netns exec`.
    pub fn netns_name(&self) -> String {
        self.world.plan.netns(self.name())
    }

    /// Its underlay interface.
    pub fn interface(&self) -> &'static str {
        NODE_INTERFACE
    }

    /// The address on its underlay interface: a private one in an aws world, the public one in a packet world.
    pub fn private_ip(&self) -> Ipv4Addr {
        self.world.plan.link_ip(self.place)
    }

    /// The address under which other domains reach it.
    pub fn public_ip(&self) -> Ipv4Addr {
        self.place.public_ip()
    }

    /// Its public IPv6 address; packet worlds only.
    pub fn public_ip6(&self) -> Option<Ipv6Addr> {
        (self.world.plan.cloud == Cloud::Packet).then(|| self.place.public_ip6())
    }

    /// Internal and public address of each node of its domain, as an agent's IP map has it; empty in a packet world, where
    /// they are the same.
    pub fn ip_map(&self) -> Vec<(IpAddr, IpAddr)> {
        if self.world.plan.cloud == Cloud::Packet {
            return Vec::new();
        }
        let domain = self.place.domain;
        let places =
            (0..self.world.plan.domains[domain].nodes.len()).map(|node| Place { domain, node });
        places
            .map(|place| (place.private_ip().into(), place.public_ip().into()))
            .collect()
    }

    /// The DNS server it should ask.
    pub fn dns_address(&self) -> Ipv4Addr {
        DNS_ADDRESS
    }

    /// A directory for its sockets and files.
    pub fn run_dir(&self) -> PathBuf {
        self.world.run_dir.join(self.name())
    }

    /// A resolv.conf that names the world's DNS server.
    pub fn resolv_conf(&self) -> PathBuf {
        self.run_dir().join("resolv.conf")
    }

    /// The directory in which its agent should pin; the world removes it. It does not exist at first.
    pub fn pin_dir(&self) -> PathBuf {
        Path::new(PIN_DIR).join(self.netns_name())
    }

    /// Its pods.
    pub fn pods(&self) -> Vec<Pod> {
        let pods = &self.world.plan.domains[self.place.domain].nodes[self.place.node].pods;
        let pod = |name: &String| Pod {
            name: name.clone(),
            netns: self.world.plan.netns(name),
        };
        pods.iter().map(pod).collect()
    }

    /// A command that runs inside its network namespace, and is otherwise as any other (`/sys/fs/bpf` included).
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command, WorldError> {
        command_in(&self.netns(), program)
    }

    /// Runs `work` inside its network namespace; sockets made there stay there.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, WorldError> {
        netns::inside(&self.netns(), work)
    }

    /// All links in its namespace.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn links(&self) -> Result<Vec<Link>, WorldError> {
        leaks::links_in(Some(&self.netns_name()))
    }
}

/// A pod: a network namespace with nothing but `lo`, until an agent puts an interface in.
#[derive(Debug, Clone)]
pub struct Pod {
    name: String,
    netns: String,
}

impl Pod {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path of its network namespace.
    pub fn netns(&self) -> PathBuf {
        netns::path(&self.netns)
    }

    /// The name of its network namespace, for `ip netns exec`.
    pub fn netns_name(&self) -> &str {
        &self.netns
    }

    /// A command that runs inside its network namespace.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command, WorldError> {
        command_in(&self.netns(), program)
    }

    /// Runs `work` inside its network namespace; sockets made there stay there.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, WorldError> {
        netns::inside(&self.netns(), work)
    }

    /// All links in its namespace.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn links(&self) -> Result<Vec<Link>, WorldError> {
        leaks::links_in(Some(&self.netns))
    }
}
