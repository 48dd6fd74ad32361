//! The worlds that are measured in.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};
use nsm_world::{Agent, Endpoint, Node, Pod, Process, World, wait_until};

use super::programs::Programs;
use crate::bench::processes;

const CLIENT_DOMAIN: &str = "cluster-1.example";
const ENDPOINT_DOMAIN: &str = "cluster-2.example";
const SERVICE: &str = "icmp-responder";
const ENDPOINT_CIDR: &str = "172.16.1.0/24";

/// Two domains with an agent each, DNS between them, and an endpoint. What is dropped first stands first.
pub(super) struct Domains {
    _endpoint: Endpoint,
    pub(super) client_agent: Agent,
    pub(super) endpoint_agent: Agent,
    pub(super) client_pod: Pod,
    pub(super) endpoint_pod: Pod,
    pub(super) world: World,
}

impl Domains {
    pub(super) fn build(programs: &Programs) -> Result<Self> {
        Self::build_with(programs, &[])
    }

    /// With these flags for both agents.
    pub(super) fn build_with(programs: &Programs, flags: &[&str]) -> Result<Self> {
        let world = two_nodes("bench")
            .dns_program(&programs.dns)
            .build()
            .context("build a world")?;
        let start = |node: &str| -> Result<Agent> {
            let agent = Agent::start(&world, &world.node(node)?, &programs.agent, |command| {
                command.args(flags);
            })?;
            Ok(agent)
        };
        let (client_agent, endpoint_agent) = (start("node-1")?, start("node-2")?);
        client_agent.wait_ready()?;
        endpoint_agent.wait_ready()?;
        let (client_pod, endpoint_pod) = (world.pod("client")?, world.pod("endpoint")?);
        let endpoint =
            endpoint_agent.endpoint(&world, &endpoint_pod, SERVICE, ENDPOINT_CIDR, |_| {})?;
        Ok(Self {
            _endpoint: endpoint,
            client_agent,
            endpoint_agent,
            client_pod,
            endpoint_pod,
            world,
        })
    }

    /// The endpoint's service as the client names it.
    pub(super) fn service() -> String {
        format!("{SERVICE}@{ENDPOINT_DOMAIN}")
    }
}

/// Two domains of one node and one pod each.
pub(super) fn two_nodes(name: &str) -> nsm_world::Builder {
    World::builder(name)
        .domain(CLIENT_DOMAIN, |domain| {
            domain.node("node-1").pod("client").srv(5005, 5006)
        })
        .domain(ENDPOINT_DOMAIN, |domain| {
            domain.node("node-2").pod("endpoint").srv(5005, 5006)
        })
}

/// Two agents without a datapath, on two addresses of one loopback interface.
pub(super) struct Pair {
    pub(super) client_agent: Process,
    pub(super) endpoint_agent: Process,
    node: Node,
    load: std::path::PathBuf,
    pub(super) world: World,
}

const CLIENT_IP: &str = "127.0.0.1";
const ENDPOINT_IP: &str = "127.0.0.2";

impl Pair {
    pub(super) fn start(programs: &Programs) -> Result<Self> {
        let world = World::builder("bench-pair")
            .domain(CLIENT_DOMAIN, |domain| domain.node("node"))
            .without_dns()
            .build()
            .context("build a world")?;
        let node = world.node("node")?;
        let start = |name: &str, ip: &str| -> Result<Process> {
            let mut command = node.command(&programs.agent)?;
            let config = node.run_dir().join(format!("{name}.yaml"));
            fs::write(&config, configuration(&node, name, ip))
                .with_context(|| format!("write {}", config.display()))?;
            deafen(&mut command);
            // Both agents and the load are on one node. Variables, because agents of earlier revisions do not have these keys.
            command.env("NSM_RELAY_FOR", EVERYWHERE);
            command.env("NSM_DIAL_INSIDE", EVERYWHERE);
            command.arg("agent").arg("--config").arg(&config);
            Ok(world.spawn(name, command)?)
        };
        let pair = Self {
            client_agent: start("client-agent", CLIENT_IP)?,
            endpoint_agent: start("endpoint-agent", ENDPOINT_IP)?,
            load: programs.load.clone(),
            node,
            world,
        };
        for agent in [&pair.client_agent, &pair.endpoint_agent] {
            pair.wait_ready(programs, agent)?;
        }
        Ok(pair)
    }

    /// `nsm-load SUBCOMMAND` through both agents.
    pub(super) fn load(&self, subcommand: &str) -> Result<Command> {
        let mut command = self.node.command(&self.load)?;
        command
            .arg(subcommand)
            .args(["--registry", &format!("tcp://{CLIENT_IP}:5005")])
            .args(["--proxy", &format!("tcp://{CLIENT_IP}:5006")])
            .args(["--endpoint-registry", &format!("tcp://{ENDPOINT_IP}:5005")])
            .args(["--domain", ENDPOINT_IP]);
        Ok(command)
    }

    /// Runs pairs of Request and Close, and returns what `nsm-load` measured.
    pub(super) fn pairs(&self, pairs: u64, warm_up: u64, in_flight: usize) -> Result<Pairs> {
        let mut command = self.load("pairs")?;
        command
            .args(["--pairs", &pairs.to_string()])
            .args(["--warm-up", &warm_up.to_string()])
            .args(["--in-flight", &in_flight.to_string()]);
        processes::run_json(&self.world, "load", command, super::LOAD_DEADLINE)
    }

    /// What `status --json` says of an agent.
    pub(super) fn status(&self, programs: &Programs, agent: &Process) -> Result<serde_json::Value> {
        let mut status = Command::new(&programs.agent);
        status
            .args(["status", "--json", "--admin"])
            .arg(admin(&self.node, agent.name()));
        let output = status.output().context("run status")?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn wait_ready(&self, programs: &Programs, agent: &Process) -> Result<()> {
        let ready = || self.status(programs, agent).ok()?["ready"].as_bool();
        wait_until(
            format!("{} to be ready", agent.name()),
            super::READY_DEADLINE,
            || agent.exited().is_some() || ready() == Some(true),
        )
        .with_context(|| self.world.logs())?;
        anyhow::ensure!(
            agent.exited().is_none(),
            "{} ended:\n{}",
            agent.name(),
            self.world.logs()
        );
        Ok(())
    }
}

/// What `nsm-load pairs` says.
#[derive(Debug, serde::Deserialize)]
pub(super) struct Pairs {
    pub(super) pairs: u64,
    pub(super) warm_up: u64,
    pub(super) failed: u64,
    pub(super) pairs_per_second: f64,
    pub(super) pair_p50_ms: f64,
    pub(super) pair_p99_ms: f64,
    pub(super) endpoint_holds: u64,
}

/// All addresses.
const EVERYWHERE: &str = "0.0.0.0/0,::/0";

/// Our caller's own configuration would override the file's.
fn deafen(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"NSM_") {
            command.env_remove(name);
        }
    }
}

fn admin(node: &Node, name: &str) -> String {
    format!("unix://{}/{name}-admin.sock", node.run_dir().display())
}

fn configuration(node: &Node, name: &str, ip: &str) -> String {
    format!(
        "name: {name}\n\
         domain: {name}.example\n\
         listen:\n\
        \x20 metrics: \"off\"\n\
        \x20 nsmgr: \"unix://{run}/{name}.sock\"\n\
        \x20 admin: \"{admin}\"\n\
        \x20 proxy: \"tcp://{ip}:5006\"\n\
        \x20 registry: \"tcp://{ip}:5005\"\n\
         forwarder: false\n\
         tunnel:\n\
        \x20 ip: \"{ip}\"\n\
         bpf:\n\
        \x20 enabled: false\n",
        run = node.run_dir().display(),
        admin = admin(node, name),
    )
}
