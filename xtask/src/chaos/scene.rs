//! The world of a run: three domains, five nodes behind NAT, three endpoints, three clients; and what is done to them.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nsm_world::{
    Agent, Client, Cloud, Endpoint, Fault, FaultGuard, NameFault, Pod, Signal, World, registry_name,
};

use super::{
    plan::{Blow, CLIENTS, ENDPOINTS, NODES},
    watch::Watch,
};
use crate::cargo::Programs;

const SERVICE: &str = "icmp-responder";

/// The interface that `connect` makes.
const INTERFACE: &str = "nsm-1";

/// The node of each client and what it asks for.
const ASKED: [(usize, &str); CLIENTS] = [
    (0, "icmp-responder@cluster-2.example"),
    (0, "icmp-responder@cluster-3.example"),
    (4, "icmp-responder@cluster-2.example"),
];

/// The node of each endpoint and the prefix that it serves.
const SERVED: [(usize, &str); ENDPOINTS] = [
    (1, "172.16.1.0/24"),
    (2, "172.16.2.0/24"),
    (3, "172.16.3.0/24"),
];

/// The node whose agent is the registry of another one's domain.
const REGISTRIES: [(usize, usize); 2] = [(2, 1), (4, 0)];

/// What an agent may take to end after SIGTERM.
const END_DEADLINE: Duration = Duration::from_secs(15);

/// After its start an agent may take this long until its clients get events of losses again.
const BACK_AGAIN: Duration = Duration::from_secs(5);

/// Memory and open files of a process.
#[derive(Debug, Clone, Copy)]
struct Size {
    files: usize,
    kib: usize,
}

/// All that stands; what is dropped first stands first.
pub(super) struct Scene {
    watches: Vec<Watch>,
    faults: Vec<(usize, FaultGuard)>,
    clients: Vec<Option<Client>>,
    endpoints: Vec<Option<Endpoint>>,
    agents: Vec<Option<Agent>>,
    sizes: BTreeMap<u32, Size>,
    program: PathBuf,
    world: World,
}

impl Scene {
    /// Builds the world and waits until all clients are connected.
    pub(super) fn build(programs: &Programs) -> Result<Self> {
        let world = World::builder("chaos")
            .cloud(Cloud::Aws)
            .dns_program(&programs.dns)
            .domain("cluster-1.example", |domain| {
                let domain = domain.node(NODES[0]).pod("client-0").pod("client-1");
                domain.node(NODES[4]).pod("client-2")
            })
            .domain("cluster-2.example", |domain| {
                let domain = domain.node(NODES[1]).pod("endpoint-0");
                domain.node(NODES[2]).pod("endpoint-1")
            })
            .domain("cluster-3.example", |domain| {
                domain.node(NODES[3]).pod("endpoint-2")
            })
            .build()?;
        let mut scene = Self {
            watches: Vec::new(),
            faults: Vec::new(),
            clients: (0..CLIENTS).map(|_| None).collect(),
            endpoints: (0..ENDPOINTS).map(|_| None).collect(),
            agents: NODES.iter().map(|_| None).collect(),
            sizes: BTreeMap::new(),
            program: programs.agent.clone(),
            world,
        };
        for node in 0..NODES.len() {
            scene.start_agent(node)?;
        }
        for agent in scene.agents.iter().flatten() {
            agent.wait_ready()?;
        }
        for number in 0..CLIENTS {
            let watch = Watch::start(number as u8, &scene.client_pod(number)?)?;
            scene.watches.push(watch);
        }
        scene.start_missing();
        Ok(scene)
    }

    pub(super) fn watches(&self) -> &[Watch] {
        &self.watches
    }

    pub(super) fn world(&self) -> &World {
        &self.world
    }

    fn client_pod(&self, number: usize) -> Result<Pod> {
        Ok(self.world.pod(&format!("client-{number}"))?)
    }

    fn start_agent(&mut self, node: usize) -> Result<()> {
        let registry = REGISTRIES.iter().find(|(of, _)| *of == node);
        let registry = registry.map(|(_, at)| self.world.node(NODES[*at]));
        let url = registry.transpose()?;
        let url = url.map(|node| format!("tcp://{}:5005", node.private_ip()));
        let at = self.world.node(NODES[node])?;
        let agent = Agent::start(&self.world, &at, &self.program, |command| {
            if let Some(url) = url {
                command.args(["--registry-url", &url]);
            }
        })?;
        self.agents[node] = Some(agent);
        self.excuse_clients_of(node, BACK_AGAIN);
        Ok(())
    }

    /// Starts clients and endpoints that do not run; one whose agent is away is tried again by the next call.
    pub(super) fn start_missing(&mut self) {
        for (number, (node, cidr)) in SERVED.into_iter().enumerate() {
            let runs = self.endpoints[number].as_ref();
            if runs.is_some_and(|it| it.process.exited().is_none()) {
                continue;
            }
            if let (Some(agent), Ok(pod)) = (
                &self.agents[node],
                self.world.pod(&format!("endpoint-{number}")),
            ) {
                let endpoint = agent.endpoint(&self.world, &pod, SERVICE, cidr, |_| {});
                self.endpoints[number] = endpoint.ok();
            }
        }
        for (number, (node, service)) in ASKED.into_iter().enumerate() {
            let runs = self.clients[number].as_ref();
            if runs.is_some_and(|it| it.process.exited().is_none()) {
                continue;
            }
            if let (Some(agent), Ok(pod)) = (&self.agents[node], self.client_pod(number))
                && let Ok(client) = agent.connect(&self.world, &pod, service, |_| {})
            {
                self.watches[number].follow(client.process.stdout_path().to_owned());
                self.clients[number] = Some(client);
            }
        }
    }

    /// Begins a blow; `step` names it.
    pub(super) fn begin(&mut self, step: usize, blow: Blow, lasts: Duration) -> Result<()> {
        match blow {
            Blow::KillAgent(node) | Blow::StopAgent(node) => {
                self.excuse_clients_of(node, lasts + END_DEADLINE);
                if let Some(agent) = &self.agents[node] {
                    match blow {
                        Blow::KillAgent(_) => agent.process.kill9(),
                        _ => agent.process.signal(Signal::SIGTERM),
                    }
                }
            }
            Blow::KillEndpoint(number) => {
                self.endpoints[number]
                    .take()
                    .inspect(|endpoint| endpoint.process.kill9());
            }
            Blow::KillClient(number) => {
                self.watches[number].unfollow();
                self.clients[number]
                    .take()
                    .inspect(|client| client.process.kill9());
            }
            Blow::Cut(from, to) => self.inject(step, from, to, Fault::DropAll)?,
            Blow::Lose(from, to) => self.inject(step, from, to, Fault::Loss { per_mille: 300 })?,
            Blow::BlockTunnels(from, to) => {
                self.inject(step, from, to, Fault::BlockUdp { port: 4789 })?;
            }
            Blow::Dns(domain) => {
                let name = registry_name(&format!("cluster-{domain}.example"));
                self.world.dns().fail(&name, NameFault::ServFail)?;
            }
            Blow::DeleteLink(client) => self.ip(client, &["link", "del", INTERFACE])?,
            Blow::DownLink(client) => self.ip(client, &["link", "set", INTERFACE, "down"])?,
            Blow::DeleteRoutes(client) => self.ip(client, &["route", "flush", "dev", INTERFACE])?,
        }
        Ok(())
    }

    /// Ends a blow.
    pub(super) fn end(&mut self, step: usize, blow: Blow) -> Result<()> {
        match blow {
            Blow::KillAgent(node) | Blow::StopAgent(node) => {
                // Another blow may have hit it meanwhile, and ended already.
                if let Some(agent) = &self.agents[node] {
                    let ended = agent.process.wait(END_DEADLINE);
                    ended.with_context(|| format!("the agent on {}", NODES[node]))?;
                    self.start_agent(node)?;
                }
            }
            Blow::Dns(domain) => {
                let name = registry_name(&format!("cluster-{domain}.example"));
                self.world.dns().heal(&name)?;
            }
            _ => self.faults.retain(|(of, _)| *of != step),
        }
        self.start_missing();
        Ok(())
    }

    fn inject(&mut self, step: usize, from: usize, to: usize, what: Fault) -> Result<()> {
        let (from, to) = (self.world.node(NODES[from])?, self.world.node(NODES[to])?);
        self.faults
            .push((step, self.world.inject(&from, &to, what)?));
        Ok(())
    }

    /// Runs `ip` in a client's pod; where there is no connection just now it has nothing to do.
    fn ip(&self, client: usize, words: &[&str]) -> Result<()> {
        let mut command = self.client_pod(client)?.command("ip")?;
        command.args(words).output().context("run ip")?;
        Ok(())
    }

    fn excuse_clients_of(&self, node: usize, time: Duration) {
        for (number, watch) in self.watches.iter().enumerate() {
            if ASKED[number].0 == node {
                watch.excuse(time);
            }
        }
    }

    /// What has gone wrong since the last call.
    pub(super) fn violations(&mut self) -> Vec<String> {
        let mut found: Vec<String> = self
            .watches
            .iter()
            .flat_map(Watch::take_violations)
            .collect();
        for (node, agent) in self.agents.iter().enumerate() {
            let panicked = agent.as_ref().map(|agent| agent.process.stderr());
            if panicked.is_some_and(|text| text.contains("panicked")) {
                found.push(format!("the agent on {} has panicked", NODES[node]));
            }
        }
        found
    }

    /// Waits until packets of all clients pass; the clients where they do not in time.
    pub(super) fn settles(&mut self, time: Duration) -> Vec<String> {
        let began = Instant::now();
        loop {
            self.start_missing();
            if self.watches.iter().all(Watch::passes) {
                return Vec::new();
            }
            if began.elapsed() > nsm_world::patient(time) {
                let silent = self.watches.iter().enumerate();
                let silent = silent.filter(|(_, watch)| !watch.passes());
                return silent
                    .map(|(number, watch)| {
                        format!("no packet of client {number} passes {time:?} after the last fault has gone: {}", watch.words())
                    })
                    .collect();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Agents that hold more than when they were looked at first.
    pub(super) fn growth(&mut self) -> Vec<String> {
        const FILES: usize = 40;
        const KIB: usize = 32 << 10;
        let mut found = Vec::new();
        for (node, agent) in self.agents.iter().enumerate() {
            let Some((pid, now)) = agent.as_ref().and_then(|agent| {
                let pid = agent.process.pid();
                Some((pid, size(pid)?))
            }) else {
                continue;
            };
            // One that has just started grows to its usual size.
            if !self.sizes.contains_key(&pid) && !agent.as_ref().is_some_and(is_ready) {
                continue;
            }
            let first = *self.sizes.entry(pid).or_insert(now);
            if now.files > first.files + FILES || now.kib > first.kib + KIB {
                found.push(format!(
                    "the agent on {} has grown from {first:?} to {now:?}",
                    NODES[node]
                ));
            }
        }
        found
    }

    /// Ends all; what is left of links and pins then.
    pub(super) fn tear_down(mut self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for client in self.clients.drain(..).flatten() {
            client.close(END_DEADLINE)?;
        }
        for endpoint in self.endpoints.drain(..).flatten() {
            endpoint.stop(END_DEADLINE)?;
        }
        for agent in self.agents.drain(..).flatten() {
            agent.drain(END_DEADLINE)?;
        }
        let left = self.world.leaks()?;
        if !left.links.is_empty() || !left.pins.is_empty() {
            let pins = left.pins.len();
            found.push(format!("left behind: {pins} pins, and {:?}", left.links));
        }
        Ok(found)
    }
}

fn size(pid: u32) -> Option<Size> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib = line.split_whitespace().next()?.parse().ok()?;
    Some(Size { files, kib })
}

fn is_ready(agent: &Agent) -> bool {
    agent.status().is_ok_and(|status| status["ready"] == true)
}
