//! Who may name which network namespace: processes of one node that are not what they say.
//!
//! The callers are this workspace's own client behind util-linux's `unshare` and `setpriv`, which give it another user, other
//! namespaces and fewer rights, as a container runtime does.

use std::{
    io::{ErrorKind, Read as _},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{CIDR, PATIENCE, SERVICE, close, endpoint_address, ping, started};
use nsm_world::{Agent, Client, Endpoint, Pod, World, binary};

/// A refusal needs no network: what takes longer hangs.
const QUICKLY: Duration = Duration::from_secs(8);

/// `nobody` and `nogroup`.
const NOBODY: &[&str] = &[
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
];

/// The user 0 of a container: mount, pid and IPC namespaces of its own, and no capability.
const CONTAINER_ROOT: &[&str] = &[
    "unshare",
    "--mount",
    "--pid",
    "--ipc",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "setpriv",
    "--bounding-set=-all",
    "--inh-caps=-all",
];

/// One node with an endpoint and two tenants.
struct Node {
    agent: Agent,
    _endpoint: Endpoint,
    tenant: Pod,
    neighbour: Pod,
    world: World,
}

impl Node {
    fn start(name: &str, adjust: impl FnOnce(&mut Command)) -> Result<Self> {
        let world = World::builder(name)
            .domain("cluster-1.example", |domain| {
                let node = domain.node("node-1");
                node.pod("tenant").pod("neighbour").pod("endpoint")
            })
            .build()?;
        let agent = started(&world, "node-1", adjust)?;
        let pod = world.pod("endpoint")?;
        let endpoint = agent.endpoint(&world, &pod, SERVICE, CIDR, |_| {})?;
        Ok(Self {
            agent,
            _endpoint: endpoint,
            tenant: world.pod("tenant")?,
            neighbour: world.pod("neighbour")?,
            world,
        })
    }

    /// A client in the tenant's namespace, run by `wrapper`, that asks for a link in `netns`.
    fn asks(&self, wrapper: &[&str], netns: &Path) -> Result<Client> {
        let mut command = self.tenant.command(wrapper.first().context("a wrapper")?)?;
        command
            .args(&wrapper[1..])
            .arg(binary("proxy-nsmgr")?)
            .args(["connect", SERVICE, "--json", "--name", "tenant"])
            .args(["--connect-to", &self.agent.nsmgr_url(), "--netns"])
            .arg(netns);
        let process = self.world.spawn("tenant", command)?;
        Ok(Client { process })
    }

    /// The same must be refused, and leave nothing.
    fn refuses(&self, wrapper: &[&str], netns: &Path) -> Result<String> {
        let before = self.world.leaks()?.links;
        let client = self.asks(wrapper, netns)?;
        let status = client.process.wait(QUICKLY).with_context(|| {
            let netns = netns.display();
            format!(
                "{wrapper:?} got a link in {netns}: {}",
                client.process.stdout()
            )
        })?;
        let said = client.process.stderr();
        ensure!(!status.success(), "{wrapper:?} was not refused");
        ensure!(said.contains("PermissionDenied"), "{wrapper:?}: {said}");
        ensure!(
            self.world.leaks()?.links == before,
            "{wrapper:?} left links"
        );
        Ok(said)
    }

    /// The same must be granted, and work.
    fn serves(&self, wrapper: &[&str], netns: &Path) -> Result<()> {
        let client = self.asks(wrapper, netns)?;
        let connected = client.wait_for_event("connected", PATIENCE)?;
        let address = endpoint_address(&connected)?;
        ensure!(ping(&self.tenant, &address, 3, &[])? == 3, "{wrapper:?}");
        // The whole group: `unshare` passes no signal on to what it started.
        let group = format!("-{}", client.process.pid());
        let asked = Command::new("kill")
            .args(["-TERM", "--", &group])
            .status()?;
        ensure!(asked.success(), "cannot signal {group}");
        let ended = client.process.wait(PATIENCE)?;
        ensure!(ended.success(), "{wrapper:?}: {}", client.process.stderr());
        Ok(())
    }
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_neighbours_namespace_is_not_had_by_opening_it() -> Result<()> {
    let node = Node::start("neighbour", |_| {})?;
    for wrapper in [NOBODY, CONTAINER_ROOT] {
        let said = node.refuses(wrapper, &node.neighbour.netns())?;
        ensure!(said.contains("CAP_SYS_ADMIN"), "{said}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn the_nodes_namespace_is_nobodys() -> Result<()> {
    let node = Node::start("nodes-own", |_| {})?;
    let netns = node.agent.node().netns();
    for wrapper in [NOBODY, CONTAINER_ROOT, &["env"]] {
        let said = node.refuses(wrapper, &netns)?;
        ensure!(said.contains("the node's own network namespace"), "{said}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn the_nodes_namespace_is_root_of_the_nodes_where_the_configuration_allows_it() -> Result<()> {
    let node = Node::start("allowed", |command| {
        command.args(["--node-namespace", "true"]);
    })?;
    let netns = node.agent.node().netns();
    for wrapper in [NOBODY, CONTAINER_ROOT] {
        node.refuses(wrapper, &netns)?;
    }
    let client = node.asks(&["env", "NSM_MAX_TOKEN_LIFETIME=3s"], &netns)?;
    client.wait_for_event("connected", PATIENCE)?;
    // Its own link is one of the node's now, and is not in the way of a refresh.
    client.wait_for_event("refreshed", PATIENCE)?;
    close(&client)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn every_user_has_a_link_in_its_own_namespace() -> Result<()> {
    let node = Node::start("own", |_| {})?;
    let own = Path::new("/proc/self/ns/net");
    for wrapper in [&["env"], NOBODY, CONTAINER_ROOT] {
        node.serves(wrapper, own)
            .with_context(|| format!("{wrapper:?}"))?;
    }
    // Root of the node may name any pod's.
    node.serves(&["env"], &node.tenant.netns())
}

/// Sets how many files a process may have open.
fn limit_files(pid: u32, files: usize) -> Result<()> {
    let set = Command::new("prlimit")
        .arg(format!("--pid={pid}"))
        .arg(format!("--nofile={files}:{files}"))
        .status()?;
    ensure!(set.success(), "cannot let process {pid} open {files} files");
    Ok(())
}

/// More than an agent may have open at the usual limit.
const FLOOD: usize = 1_100;

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn idle_sockets_of_one_user_stop_nobody_else() -> Result<()> {
    let node = Node::start("flood", |_| {})?;
    limit_files(node.agent.process.pid(), 1024)?;
    limit_files(std::process::id(), 2 * FLOOD)?;
    let url = node.agent.nsmgr_url();
    let path = url.strip_prefix("unix://").context("a socket")?;
    // All from the network namespace of this test: one source.
    let mut idle: Vec<_> = (0..FLOOD)
        .map(|_| UnixStream::connect(path))
        .collect::<Result<_, _>>()?;
    node.agent.status()?;
    node.serves(NOBODY, Path::new("/proc/self/ns/net"))?;
    // Those that were kept are closed, too: they never began.
    for stream in &mut idle {
        stream.set_read_timeout(Some(PATIENCE))?;
        match stream.read(&mut [0; 64]) {
            // The server's own settings come before anything of ours.
            Ok(count) => ensure!(count < 64 && stream.read(&mut [0; 64])? == 0, "it goes on"),
            Err(error) => ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}"),
        }
    }
    node.agent.status()?;
    Ok(())
}
