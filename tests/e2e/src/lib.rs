//! What the end-to-end scenarios share: two domains with an agent each, and a footprint to compare before and after.
//!
//! A scenario is a function in `tests/`. It starts a [`Pair`] or, with the endpoint, a [`Served`], does one thing, and ends with
//! [`Pair::assert_clean`] or [`Served::close`].
//! An ERROR or a panic in an agent's log fails it as well, for ERROR means that a person must act.
#![forbid(unsafe_code)]

pub mod forged;
pub mod metrics;
pub mod pings;
mod served;
pub mod trust;

use std::{
    collections::BTreeSet,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nsm_world::{
    Agent, Client, Cloud, Endpoint, Fault, FaultGuard, Link, Pod, World, binary, patient,
    wait_until,
};
use serde_json::Value;

pub use self::served::{Served, close};

/// The service that every scenario asks for, and where it is.
pub const SERVICE: &str = "icmp-responder";
/// The service with the domain it is in, as the client asks.
pub const REMOTE_SERVICE: &str = "icmp-responder@cluster-2.example";
/// What the endpoint gives out.
pub const CIDR: &str = "172.16.1.0/24";

/// Long enough for a machine that builds something at the same time; nothing takes it when all is well.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Two domains of one node each: `node-1` with the pods `client-0` and on, `node-2` with the pod `endpoint`.
#[derive(Debug)]
pub struct Pair {
    /// The agent of `cluster-1.example`.
    pub near: Agent,
    /// The agent of `cluster-2.example`.
    pub far: Agent,
    /// Dropped last.
    pub world: World,
}

/// VXLAN's management VNI (RFC 8971): a session with a peer stays some seconds longer than the last connection to it.
const MANAGEMENT_VNI: u32 = 1;

/// What agents hold for connections in the kernel and in their books.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint {
    /// Links that agents made: namespace, name and VNI.
    pub links: BTreeSet<(String, String, Option<u32>)>,
    /// Pinned BPF objects.
    pub pins: BTreeSet<String>,
    /// Tunnel slots that BPF counts on, of both nodes.
    pub slots: usize,
    /// Entries of the maps that lead to them, of both nodes: a slot may have several.
    pub entries: usize,
    /// Connections in the agents' status, of both nodes.
    pub connections: usize,
}

impl Pair {
    /// Builds the world and waits until both agents are ready.
    ///
    /// # Errors
    /// When anything of it fails.
    pub fn start(name: &str, cloud: Cloud, clients: usize) -> Result<Self> {
        Self::start_in(Self::world(name, cloud, clients)?)
    }

    /// Starts the agents of a pair in its world, and waits until both are ready.
    ///
    /// # Errors
    /// When one does not become so.
    pub fn start_in(world: World) -> Result<Self> {
        Self::start_with(world, |_| {})
    }

    /// As [`Self::start_in`], with both agents' commands adjusted.
    ///
    /// # Errors
    /// When one does not become ready.
    pub fn start_with(world: World, adjust: impl Fn(&mut Command)) -> Result<Self> {
        let program = binary("proxy-nsmgr")?;
        let start = |node: &str| Agent::start(&world, &world.node(node)?, &program, &adjust);
        let (near, far) = (start("node-1")?, start("node-2")?);
        near.wait_ready()?;
        far.wait_ready()?;
        Ok(Self { near, far, world })
    }

    /// The world of a pair, without its agents.
    ///
    /// # Errors
    /// When it cannot be built.
    pub fn world(name: &str, cloud: Cloud, clients: usize) -> Result<World> {
        let world = World::builder(name)
            .cloud(cloud)
            .domain("cluster-1.example", |domain| {
                let pods = (0..clients).map(|n| format!("client-{n}"));
                pods.fold(domain.node("node-1"), |domain, pod| domain.pod(&pod))
            })
            .domain("cluster-2.example", |domain| {
                domain.node("node-2").pod("endpoint")
            });
        Ok(world.build()?)
    }

    /// The pod `client-<n>`.
    ///
    /// # Errors
    /// When there is none.
    pub fn client_pod(&self, n: usize) -> Result<Pod> {
        Ok(self.world.pod(&format!("client-{n}"))?)
    }

    /// Starts the endpoint in the far domain.
    ///
    /// # Errors
    /// When it does not register.
    pub fn endpoint(&self) -> Result<Endpoint> {
        let pod = self.world.pod("endpoint")?;
        Ok(self
            .far
            .endpoint(&self.world, &pod, SERVICE, CIDR, |_| {})?)
    }

    /// Starts a client for the pod `client-<n>`, and waits for its connection: the client and its `connected` event.
    ///
    /// # Errors
    /// When it is refused or takes too long.
    pub fn connect(&self, n: usize) -> Result<(Client, Value)> {
        let client =
            self.near
                .connect(&self.world, &self.client_pod(n)?, REMOTE_SERVICE, |_| {})?;
        let connected = client.wait_for_event("connected", PATIENCE)?;
        Ok((client, connected))
    }

    /// Runs `proxy-nsmgr connect` for `client-0` where it must fail, and returns its error text.
    ///
    /// # Errors
    /// When it does not fail within `deadline`.
    pub fn refused(
        &self,
        service: &str,
        deadline: Duration,
        adjust: impl FnOnce(&mut Command),
    ) -> Result<String> {
        let client = self
            .near
            .connect(&self.world, &self.client_pod(0)?, service, adjust)?;
        let status = client
            .process
            .wait(deadline)
            .with_context(|| format!("connect {service}"))?;
        let said = client.process.stderr();
        ensure!(!status.success(), "connect {service} was not refused");
        ensure!(
            !said.contains("panicked"),
            "connect {service} panicked: {said}"
        );
        Ok(said)
    }

    /// Pings the endpoint of a `connected` event from the pod `client-<n>`: all of `count` are answered.
    ///
    /// # Errors
    /// When one is not.
    pub fn assert_pings(&self, n: usize, connected: &Value, count: u32) -> Result<()> {
        let address = endpoint_address(connected)?;
        let answered = ping(&self.client_pod(n)?, &address, count, &[])?;
        ensure!(
            answered == count,
            "{answered} of {count} pings of client {n} were answered"
        );
        Ok(())
    }

    /// From now on, and until the guards are dropped, underlay packets above `max` bytes are lost in both directions, those of the
    /// control plane too.
    ///
    /// # Errors
    /// When the fault cannot be injected.
    pub fn narrow(&self, max: u16) -> Result<[FaultGuard; 2]> {
        let (near, far) = (self.near.node(), self.far.node());
        let hole = Fault::MtuBlackHole { max };
        Ok([
            self.world.inject(near, far, hole)?,
            self.world.inject(far, near, hole)?,
        ])
    }

    /// Waits until the MTU of the only connection fits a path of `max` bytes at both ends: less what VXLAN adds, and the search ends
    /// when it is close.
    ///
    /// # Errors
    /// When it does not in [`PATIENCE`].
    pub fn mtu_follows(&self, max: u64) -> Result<()> {
        for agent in [&self.near, &self.far] {
            connection(agent, "the MTU to follow", |it| {
                let mtu = it["mtu"].as_u64();
                mtu.is_some_and(|mtu| (max - 54..=max - 50).contains(&mtu))
            })?;
        }
        Ok(())
    }

    /// Ends all processes: each ends by itself, and no link or pin is left.
    ///
    /// # Errors
    /// With what is left, or had to be killed.
    pub fn assert_nothing_left(&self) -> Result<()> {
        let killed = self.world.stop_processes(PATIENCE);
        ensure!(killed.is_empty(), "had to be killed: {killed:?}");
        let left = self.world.leaks()?;
        ensure!(left.links.is_empty() && left.pins.is_empty(), "{left:?}");
        Ok(())
    }

    /// What both agents hold now.
    ///
    /// # Errors
    /// When something cannot be looked at.
    pub fn footprint(&self) -> Result<Footprint> {
        let leaks = self.world.leaks()?;
        let mut footprint = Footprint {
            links: leaks
                .links
                .into_iter()
                .filter(Link::is_of_connection)
                .map(|link| (link.netns, link.name, link.vni))
                .collect(),
            pins: leaks
                .pins
                .iter()
                .map(|pin| pin.display().to_string())
                .collect(),
            slots: 0,
            entries: 0,
            connections: 0,
        };
        for agent in [&self.near, &self.far] {
            let status = agent.status()?;
            footprint.connections += status["connections"].as_array().map_or(0, Vec::len);
            let tunnels = map_entries(&agent.node().pin_dir().join("TUNNELS"))?;
            let management = tunnels.iter().filter(|entry| is_management(entry));
            let management: BTreeSet<_> = management.filter_map(slot).collect();
            let mut slots: Vec<_> = tunnels.iter().filter_map(slot).collect();
            slots.retain(|slot| !management.contains(slot));
            footprint.entries += slots.len();
            footprint.slots += BTreeSet::from_iter(slots).len();
        }
        Ok(footprint)
    }

    /// Waits until both agents hold what they held `before`, and checks their logs.
    ///
    /// # Errors
    /// When something more is held after [`PATIENCE`], or an agent logged an ERROR or a panic.
    pub fn assert_clean(&self, before: &Footprint) -> Result<()> {
        let mut now = before.clone();
        let clean = wait_until("the agents to hold what they held before", PATIENCE, || {
            self.footprint().is_ok_and(|found| {
                now = found;
                now == *before
            })
        });
        if clean.is_err() {
            bail!(
                "left behind: {now:#?}\nbefore: {before:#?}\n{}",
                self.world.logs()
            );
        }
        self.assert_quiet()
    }

    /// Checks that no agent logged an ERROR or a panic.
    ///
    /// # Errors
    /// With the line.
    pub fn assert_quiet(&self) -> Result<()> {
        for agent in [&self.near, &self.far] {
            let log = agent.process.stdout() + &agent.process.stderr();
            let bad = log
                .lines()
                .find(|line| line.contains("ERROR") || line.contains("panicked at"));
            if let Some(line) = bad {
                bail!("agent {} logged: {line}", agent.node().name());
            }
        }
        Ok(())
    }
}

/// Starts an agent on a node, with its command adjusted, and waits until it is ready.
///
/// # Errors
/// When it does not become so.
pub fn started(world: &World, node: &str, adjust: impl FnOnce(&mut Command)) -> Result<Agent> {
    let agent = Agent::start(world, &world.node(node)?, &binary("proxy-nsmgr")?, adjust)?;
    agent.wait_ready()?;
    Ok(agent)
}

/// Waits until no connection has a link: links go a moment after the answer to a Close.
///
/// # Errors
/// When one is left after [`PATIENCE`].
pub fn links_go(world: &World) -> Result<()> {
    let mut left = Vec::new();
    let gone = wait_until("the links of connections to go", PATIENCE, || {
        left = world.leaks().map(|leaks| leaks.links).unwrap_or_default();
        !left.iter().any(Link::is_of_connection)
    });
    gone.with_context(|| format!("{left:?}"))
}

/// The only connection in an agent's status, once it is as `wanted`.
///
/// # Errors
/// When it is not in [`PATIENCE`], with the last status.
pub fn connection(agent: &Agent, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    let found = wait_until(what, PATIENCE, || {
        let mut status = agent.status().unwrap_or_default();
        // A connection that is being healed can be away for a moment.
        last = match status.pointer_mut("/connections/0") {
            Some(first) => first.take(),
            None => Value::Null,
        };
        wanted(&last)
    });
    found.with_context(|| format!("{}: {last:#}", agent.node().name()))?;
    Ok(last)
}

/// The health of the only connection's path, once it is as `wanted`.
///
/// # Errors
/// As [`connection`].
pub fn health(agent: &Agent, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut connection = connection(agent, what, |it| wanted(&it["health"]))?;
    Ok(connection["health"].take())
}

/// The events of this name that a client has written so far.
#[must_use]
pub fn events(client: &Client, name: &str) -> Vec<Value> {
    let lines = client.process.stdout();
    let events = lines
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    events
        .filter(|event: &Value| event["event"] == name)
        .collect()
}

/// Waits for the `n`-th event of this name, 1 being the first.
///
/// # Errors
/// When it does not come in [`PATIENCE`], with all that the client wrote.
pub fn nth_event(client: &Client, name: &str, n: usize) -> Result<Value> {
    let end = Instant::now() + patient(PATIENCE);
    loop {
        if let Some(event) = events(client, name).into_iter().nth(n - 1) {
            return Ok(event);
        }
        ensure!(
            Instant::now() < end,
            "no {name} number {n}: {}",
            client.process.stdout()
        );
        // Finer than what is measured.
        thread::sleep(Duration::from_millis(2));
    }
}

/// The endpoint's address in a client's `connected` event, without the prefix length.
///
/// # Errors
/// When it has none.
pub fn endpoint_address(connected: &Value) -> Result<String> {
    address(connected, "dst_addresses")
}

/// The client's own address, as [`endpoint_address`].
///
/// # Errors
/// When it has none.
pub fn client_address(connected: &Value) -> Result<String> {
    address(connected, "src_addresses")
}

fn address(connected: &Value, which: &str) -> Result<String> {
    let first = connected["connection"][which][0].as_str();
    let first = first.with_context(|| format!("no {which} in {connected}"))?;
    Ok(first.split('/').next().unwrap_or(first).to_owned())
}

/// Pings from a pod, and returns how many of `count` were answered.
///
/// # Errors
/// When ping cannot be run.
pub fn ping(pod: &Pod, address: &str, count: u32, arguments: &[&str]) -> Result<u32> {
    let mut command = pod.command("ping")?;
    command
        .args(["-c", &count.to_string(), "-i", "0.01", "-W", "1"])
        .args(arguments)
        .arg(address);
    let output = command.output().context("start ping")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    // The test's output is shown only if it fails; which pings were lost tells why.
    println!("ping from {}: {said}", pod.name());
    let summary = |line: &str| {
        line.split_once(" received")?
            .0
            .rsplit(' ')
            .next()?
            .parse()
            .ok()
    };
    text.lines().find_map(summary).context(said)
}

/// The entries of a pinned map, as bpftool shows them.
///
/// # Errors
/// When bpftool cannot be run, or there is no such map.
pub fn map_entries(pin: &Path) -> Result<Vec<Value>> {
    let mut command = Command::new("bpftool");
    let output = command
        .args(["--json", "map", "dump", "pinned"])
        .arg(pin)
        .output()
        .context("start bpftool")?;
    ensure!(
        output.status.success(),
        "bpftool map dump {}: {output:?}",
        pin.display()
    );
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("bpftool map dump {} is no list", pin.display()))
}

/// The slot of an entry of TUNNELS.
fn slot(entry: &Value) -> Option<u64> {
    entry["formatted"]["value"]["slot"].as_u64()
}

/// Whether an entry of TUNNELS counts a peer's management VNI.
fn is_management(entry: &Value) -> bool {
    entry["formatted"]["key"]["vni"].as_u64() == Some(MANAGEMENT_VNI.into())
}
