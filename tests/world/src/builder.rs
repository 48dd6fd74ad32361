//! From a description to a world that stands.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::geteuid,
};

use crate::{
    Dns, RUN_DIR, World, WorldError, interrupt, leaks, netns,
    plan::{Cloud, DomainPlan, NodePlan, Plan},
    remove,
};

/// Ethernet's.
const DEFAULT_MTU: u32 = 1500;

/// The description of a world; see the crate's documentation.
#[derive(Debug)]
#[must_use]
pub struct Builder {
    name: String,
    cloud: Cloud,
    mtu: u32,
    domains: Vec<DomainPlan>,
    dns: bool,
    dns_program: Option<PathBuf>,
    /// The first mistake in the description; told by `build`.
    mistake: Option<WorldError>,
}

/// The description of a domain.
#[derive(Debug)]
#[must_use]
pub struct DomainBuilder {
    plan: DomainPlan,
    mistake: Option<WorldError>,
}

impl DomainBuilder {
    /// Adds a node. The first node of a domain is what its A record points to.
    pub fn node(mut self, name: &str) -> Self {
        self.plan.nodes.push(NodePlan {
            name: name.to_owned(),
            pods: Vec::new(),
        });
        self
    }

    /// Adds a pod to the node named last.
    pub fn pod(mut self, name: &str) -> Self {
        match self.plan.nodes.last_mut() {
            Some(node) => node.pods.push(name.to_owned()),
            None => {
                self.mistake
                    .get_or_insert(WorldError::PodWithoutNode(name.to_owned()));
            }
        }
        self
    }

    /// Publishes SRV records for registry and proxy with these ports; without them the domain has an A record only.
    pub fn srv(mut self, registry_port: u16, proxy_port: u16) -> Self {
        self.plan.srv = Some((registry_port, proxy_port));
        self
    }
}

impl Builder {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            cloud: Cloud::Packet,
            mtu: DEFAULT_MTU,
            domains: Vec::new(),
            dns: true,
            dns_program: None,
            mistake: None,
        }
    }

    /// How nodes come by public addresses; directly ([`Cloud::Packet`]) unless said otherwise.
    pub fn cloud(mut self, cloud: Cloud) -> Self {
        self.cloud = cloud;
        self
    }

    /// The MTU of every link of the underlay, 1500 unless said otherwise.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Adds a domain.
    pub fn domain(
        mut self,
        name: &str,
        describe: impl FnOnce(DomainBuilder) -> DomainBuilder,
    ) -> Self {
        let described = describe(DomainBuilder {
            plan: DomainPlan {
                name: name.to_owned(),
                nodes: Vec::new(),
                srv: None,
            },
            mistake: None,
        });
        self.mistake = self.mistake.or(described.mistake);
        self.domains.push(described.plan);
        self
    }

    /// Leaves out the DNS server, for worlds that name addresses.
    pub fn without_dns(mut self) -> Self {
        self.dns = false;
        self
    }

    /// The DNS server's program, where it is built already; else [`crate::binary`] finds or builds it.
    pub fn dns_program(mut self, program: &Path) -> Self {
        self.dns_program = Some(program.to_owned());
        self
    }

    /// Builds the world: namespaces, links, addresses, NAT, and the DNS server with every domain in its zone. Worlds of dead
    /// processes are swept up first.
    ///
    /// # Errors
    /// When the description has a mistake, rights or programs are missing, or the kernel refuses something. What was made
    /// until then is removed.
    pub fn build(self) -> Result<World, WorldError> {
        static COUNTER: AtomicUsize = AtomicUsize::new(0);
        if let Some(mistake) = self.mistake {
            return Err(mistake);
        }
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let plan = Plan {
            id: format!("{}-{}-{count}", self.name, std::process::id()),
            cloud: self.cloud,
            mtu: self.mtu,
            domains: self.domains,
        };
        plan.check(&self.name)?;
        let uid = geteuid();
        if !uid.is_root() {
            return Err(WorldError::NotRoot { uid: uid.as_raw() });
        }
        interrupt::install();
        prepare_host()?;
        let links_outside = leaks::links_outside()?;
        let run_dir = remove::create_run_dir(&plan.id).map_err(WorldError::io(format!(
            "create a directory for world {} in {RUN_DIR}",
            plan.id
        )))?;
        // From here on a failure drops the world, which removes what is there.
        let world = World::new(plan, run_dir, links_outside);
        {
            let _making = world.lock();
            make(&world)?;
        }
        if self.dns {
            let program = self
                .dns_program
                .map_or_else(|| crate::binary("nsm-world-dns"), Ok)?;
            world.set_dns(Dns::start(&world, &program)?);
        }
        Ok(world)
    }
}

fn make(world: &World) -> Result<(), WorldError> {
    let plan = world.plan();
    netns::ip(None, &plan.links())?;
    for (netns, lines) in plan.addressing() {
        netns::ip(Some(&netns), &lines)?;
    }
    for (netns, ruleset) in plan.nat() {
        netns::nft(&netns, &ruleset)?;
    }
    for router in plan.routers() {
        let forwarded = netns::inside(&netns::path(&router), forward_packets)?;
        forwarded.map_err(WorldError::io(format!("let {router} forward packets")))?;
    }
    for node in world.nodes() {
        let dir = node.run_dir();
        let content = format!("nameserver {}\n", node.dns_address());
        let written =
            fs::create_dir_all(&dir).and_then(|()| fs::write(node.resolv_conf(), content));
        written.map_err(WorldError::io(format!(
            "write {}",
            node.resolv_conf().display()
        )))?;
    }
    Ok(())
}

/// Lets the namespace of the calling thread forward packets.
fn forward_packets() -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    match fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Sweeps up stale worlds and sees to it that BPF objects can be pinned; one process at a time, for two that mount the BPF
/// file system at once hide each other's pins.
fn prepare_host() -> Result<(), WorldError> {
    const BPF_FS: &str = "/sys/fs/bpf";
    let lock = Path::new(RUN_DIR).join(".lock");
    let locked = fs::create_dir_all(RUN_DIR)
        .and_then(|()| File::create(&lock))
        .and_then(|file| {
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))
        });
    let _locked = locked.map_err(WorldError::io(format!("lock {}", lock.display())))?;
    remove::stale_worlds();
    let mounted = statfs(BPF_FS).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    if !mounted {
        let result = mount(
            Some("bpf"),
            BPF_FS,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        );
        result
            .map_err(io::Error::from)
            .map_err(WorldError::io(format!(
                "mount the BPF file system at {BPF_FS}"
            )))?;
    }
    Ok(())
}
