//! A world of three namespaces: two nodes on networks of their own, a router between them that forwards, filters and drops.

use std::{
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    path::PathBuf,
    process::{self, Command},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{HashMap, Map, MapData};
use nix::{
    libc,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use nsm_core::{
    liveness::{
        PathId, Reflector,
        sbfd::{Change, Discriminator, Proof, State, Timing},
    },
    net::Vni,
};
use nsm_dataplane::{
    bpf::{Bpf, BpfConfig},
    forward::TunnelDevices,
    liveness::{Event, Events, Health, HealthConfig, Peer, Report},
    netns::Netns,
};
use nsm_ebpf_common::{forward::ProbePath, sbfd::frame};

/// Longer than anything takes on a busy machine; nothing waits it out unless it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Runs a test in a thread with network and mount namespaces of its own and a BPF filesystem on `/sys/fs/bpf`; all of them are
/// gone with it.
pub(crate) fn sandbox<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let ran = thread::Builder::new()
        .name("sandbox".to_owned())
        .spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("unshare");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
            mount(
                Some("bpf"),
                "/sys/fs/bpf",
                Some("bpf"),
                MsFlags::empty(),
                none,
            )
            .expect("bpffs");
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("runtime")
                .block_on(test());
        })
        .expect("spawn")
        .join();
    if let Err(panic) = ran {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a program in the namespaces of the calling thread, and gives back what it wrote.
pub(crate) fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program)
        .args(words)
        .output()
        .unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {words:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

pub(crate) fn ip(words: &str) {
    run("ip", &words.split_whitespace().collect::<Vec<_>>());
}

/// `nft` with this text.
pub(crate) fn nft(text: &str) {
    run("nft", &[text]);
}

/// A new namespace; gone with its handles and what is in it.
pub(crate) fn netns() -> Netns {
    let outer = Netns::current().expect("own namespace");
    unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
    let new = Netns::current().expect("new namespace");
    ip("link set lo up");
    setns(outer.as_fd(), CloneFlags::CLONE_NEWNET).expect("back");
    new
}

pub(crate) fn within<T>(netns: &Netns, act: impl FnOnce() -> T) -> T {
    let outer = Netns::current().expect("own namespace");
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).expect("into");
    let result = act();
    setns(outer.as_fd(), CloneFlags::CLONE_NEWNET).expect("back");
    result
}

/// The three namespaces.
pub(crate) struct World {
    pub(crate) nodes: [Netns; 2],
    pub(crate) router: Netns,
}

impl World {
    /// Nodes 10.1.0.1 and 10.2.0.1, fd00:1::1 and fd00:2::1; the router is on `to1` and `to2`.
    pub(crate) fn new() -> Self {
        let router = netns();
        let nodes = [netns(), netns()];
        within(&router, || {
            for path in [
                "/proc/sys/net/ipv4/ip_forward",
                "/proc/sys/net/ipv6/conf/all/forwarding",
            ] {
                std::fs::write(path, "1").expect("forwarding");
            }
            for (number, node) in (1..).zip(&nodes) {
                let path = format!("/proc/{}/fd/{}", process::id(), node.as_fd().as_raw_fd());
                ip(&format!(
                    "link add to{number} type veth peer name eth0 netns {path}"
                ));
                ip(&format!("addr add 10.{number}.0.254/24 dev to{number}"));
                ip(&format!(
                    "-6 addr add fd00:{number}::fe/64 dev to{number} nodad"
                ));
                ip(&format!("link set to{number} up"));
            }
        });
        for (number, node) in (1..).zip(&nodes) {
            within(node, || {
                ip(&format!("addr add 10.{number}.0.1/24 dev eth0"));
                ip(&format!("-6 addr add fd00:{number}::1/64 dev eth0 nodad"));
                ip("link set eth0 up");
                ip(&format!("route add default via 10.{number}.0.254"));
                ip(&format!("-6 route add default via fd00:{number}::fe"));
            });
        }
        Self { nodes, router }
    }

    /// A second link of node 1 to the router, `eth1` and `to3`, which no route leads over yet.
    pub(crate) fn second_way(&self) {
        within(&self.router, || {
            let node = &self.nodes[0];
            let path = format!("/proc/{}/fd/{}", process::id(), node.as_fd().as_raw_fd());
            ip(&format!(
                "link add to3 type veth peer name eth1 netns {path}"
            ));
            ip("addr add 10.3.0.254/24 dev to3");
            ip("link set to3 up");
        });
        within(&self.nodes[0], || {
            ip("addr add 10.3.0.1/24 dev eth1");
            ip("link set eth1 up");
        });
    }

    /// The router drops what these words of nft match.
    pub(crate) fn drop_between(&self, matches: &str) {
        within(&self.router, || {
            nft(&format!(
                "add table inet fault; \
                 add chain inet fault forward {{ type filter hook forward priority 0; }}; \
                 add rule inet fault forward {matches} drop"
            ));
        });
    }

    pub(crate) fn mend(&self) {
        within(&self.router, || nft("delete table inet fault"));
    }
}

/// Where a node's programs hang.
pub(crate) use nsm_dataplane::bpf::Hook as By;

pub(crate) const TCX: By = By::Tcx;
pub(crate) const CLSACT: By = By::Clsact;

/// A node that runs.
pub(crate) struct Node {
    pub(crate) number: usize,
    pub(crate) netns: Netns,
    pub(crate) bpf: Arc<Bpf>,
    pub(crate) devices: Arc<TunnelDevices>,
    pub(crate) health: Health,
    pub(crate) events: Events,
}

pub(crate) fn pin_dir(number: usize) -> PathBuf {
    format!("/sys/fs/bpf/node{number}").into()
}

pub(crate) fn health_config(netns: &Netns) -> HealthConfig {
    HealthConfig {
        domain: "test.example".to_owned(),
        vni: Vni::MANAGEMENT,
        port: 4789,
        local: None,
        timing: Timing::default(),
        namespace: Some(netns.clone()),
        orphan_grace: Duration::from_secs(60),
    }
}

impl Node {
    pub(crate) fn start(world: &World, number: usize, by: By) -> Self {
        Self::start_with(world, number, by, |_| {})
    }

    pub(crate) fn start_with(
        world: &World,
        number: usize,
        by: By,
        change: impl FnOnce(&mut HealthConfig),
    ) -> Self {
        Self::start_on(world, number, by, &[], change)
    }

    /// On these interfaces of the underlay; none: those that lead out.
    pub(crate) fn start_on(
        world: &World,
        number: usize,
        by: By,
        interfaces: &[&str],
        change: impl FnOnce(&mut HealthConfig),
    ) -> Self {
        let netns = world.nodes[number - 1].clone();
        let config = BpfConfig {
            pin_dir: pin_dir(number),
            interfaces: interfaces.iter().copied().map(str::to_owned).collect(),
            mount_bpffs: false,
            hook: Some(by),
            ..BpfConfig::default()
        };
        let bpf = Arc::new(within(&netns, || Bpf::load(&config)).expect("BPF"));
        let mut config = health_config(&netns);
        change(&mut config);
        let devices = Arc::new(TunnelDevices::new(Arc::clone(&bpf), &*config.domain));
        let (health, events) = Health::start(config, Arc::clone(&devices)).expect("health");
        Self {
            number,
            netns,
            bpf,
            devices,
            health,
            events,
        }
    }

    /// How others are to watch this node.
    pub(crate) fn spec(&self, family: u8) -> PathId {
        let address = match family {
            4 => format!("10.{}.0.1", self.number),
            _ => format!("fd00:{}::1", self.number),
        };
        PathId {
            address: addr(&address),
            port: 4789,
            reflector: Reflector {
                discriminator: self.health.discriminator(),
                vni: Vni::MANAGEMENT,
            },
        }
    }

    pub(crate) fn drops(&self) -> Vec<(&'static str, u64)> {
        let drops = self.bpf.drops().expect("drops");
        drops.into_iter().filter(|(_, count)| *count != 0).collect()
    }

    /// How often one reason occurred.
    pub(crate) fn dropped(&self, reason: &str) -> u64 {
        let is_it = |(name, _): &(&str, u64)| *name == reason;
        self.drops()
            .into_iter()
            .find(is_it)
            .map_or(0, |(_, count)| count)
    }

    /// The next time that the session changes to this state.
    pub(crate) async fn becomes(&mut self, wanted: State) -> Box<Report> {
        let wait = async {
            loop {
                if let Event::Session {
                    change: Change::State { to, .. },
                    report,
                } = self.events.recv().await.expect("events")
                    && to == wanted
                {
                    return report;
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .unwrap_or_else(|_| panic!("node {} did not see {wanted:?}", self.number))
    }

    /// The changes of state that were told since they were asked for.
    pub(crate) fn state_changes(&mut self) -> Vec<Change> {
        std::iter::from_fn(|| self.events.try_recv().ok())
            .filter_map(|event| match event {
                Event::Session { change, .. } => Some(change),
                Event::ForeignVni(_) => None,
            })
            .filter(|change| matches!(change, Change::State { .. }))
            .collect()
    }

    pub(crate) async fn end(self) {
        self.health.close().await.expect("closed");
        self.devices.close(&self.netns).expect("removed");
        within(&self.netns, || self.bpf.detach_and_unpin()).expect("unpinned");
    }
}

/// Takes the programs off an interface, as somebody might who does not know what they are.
pub(crate) fn unhook(node: &Node, by: By, interface: &str) {
    match by {
        By::Tcx => {
            // A link ends with the last who holds it, which is its pin.
            let pins = std::fs::read_dir(pin_dir(node.number)).expect("pins");
            let pins = pins.map(|pin| pin.expect("a pin").path());
            let of_interface: Vec<_> = pins
                .filter(|pin| pin.to_string_lossy().contains(interface))
                .collect();
            assert!(!of_interface.is_empty(), "no pin of {interface}");
            for pin in of_interface {
                std::fs::remove_file(pin).expect("unpinned");
            }
        }
        By::Clsact => within(&node.netns, || {
            run("tc", &["qdisc", "del", "dev", interface, "clsact"]);
        }),
    }
}

/// Two nodes that watch each other.
pub(crate) async fn pair(world: &World, by: By, family: u8) -> ([Node; 2], [Peer; 2]) {
    let nodes = [1, 2].map(|number| Node::start(world, number, by));
    let peers = join(&nodes, family).await;
    (nodes, peers)
}

pub(crate) async fn join(nodes: &[Node; 2], family: u8) -> [Peer; 2] {
    let [one, two] = nodes;
    [
        one.health.join(two.spec(family)).await.expect("joined"),
        two.health.join(one.spec(family)).await.expect("joined"),
    ]
}

/// Both sessions are up. The probes of the one that joined first may all have come before the other knew it.
pub(crate) async fn both_up(nodes: &mut [Node; 2], peers: &[Peer; 2]) {
    for (node, peer) in nodes.iter_mut().zip(peers) {
        eventually("a proof", async || {
            match peer.prove().await.expect("proof") {
                Proof::Reached => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        node.becomes(State::Up).await;
    }
}

/// Two nodes that watch each other, with both sessions up.
pub(crate) async fn up(world: &World, by: By, family: u8) -> ([Node; 2], [Peer; 2]) {
    let (mut nodes, peers) = pair(world, by, family).await;
    both_up(&mut nodes, &peers).await;
    (nodes, peers)
}

/// Runs a test for each place of the programs, on two nodes whose sessions are up over IPv4, in a world of their own.
pub(crate) fn two_up<F>(places: &'static [By], test: F)
where
    F: AsyncFn(World, By, [Node; 2], [Peer; 2]) + Send + 'static,
{
    two_up_in(|_| {}, places, test);
}

/// As [`two_up`], in a world that is prepared before the nodes start.
pub(crate) fn two_up_in<F>(prepare: fn(&World), places: &'static [By], test: F)
where
    F: AsyncFn(World, By, [Node; 2], [Peer; 2]) + Send + 'static,
{
    sandbox(move || async move {
        for &by in places {
            let world = World::new();
            prepare(&world);
            let (nodes, peers) = up(&world, by, 4).await;
            test(world, by, nodes, peers).await;
        }
    });
}

/// Ends nodes in their order.
pub(crate) async fn end(nodes: [Node; 2]) {
    for node in nodes {
        node.end().await;
    }
}

/// Waits for a condition; the last thing seen says why it never came.
pub(crate) async fn eventually<T>(
    what: &str,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match look().await {
            Ok(found) => return found,
            Err(seen) => assert!(start.elapsed() < PATIENCE, "{what} did not come: {seen}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn addr(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A discriminator.
pub(crate) fn discriminator(number: u32) -> Discriminator {
    Discriminator::new(number).expect("not 0")
}

/// The names of a namespace's links, but for the loopback.
pub(crate) fn link_names(netns: &Netns) -> Vec<String> {
    let table = within(netns, || {
        std::fs::read_to_string("/proc/thread-self/net/dev").expect("table")
    });
    let names = table
        .lines()
        .skip(2)
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    let mut names: Vec<String> = names.filter(|name| name != "lo").collect();
    names.sort();
    names
}

/// The peers to whom a node's programs send probes, each as often as it has Ethernet addresses.
pub(crate) fn probed(number: usize) -> Vec<IpAddr> {
    let map = MapData::from_pin(pin_dir(number).join("PROBE_PATHS")).expect("a pinned map");
    let map = Map::from_map_data(map).expect("a map");
    let paths = HashMap::<_, u64, ProbePath>::try_from(map).expect("a hash");
    let mut peers: Vec<IpAddr> = paths
        .iter()
        .map(|entry| entry.expect("an entry").1.remote)
        .map(|remote| std::net::Ipv6Addr::from(remote).to_canonical())
        .collect();
    peers.sort();
    peers
}

/// Frames on an interface, as they are: heard in both directions, and sent.
pub(crate) struct Tap(OwnedFd);

impl Tap {
    /// On an interface of a namespace.
    pub(crate) fn open(netns: &Netns, interface: &str) -> Self {
        within(netns, || {
            let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            // SAFETY: takes numbers.
            let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            // SAFETY: just opened, and nobody else's.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            // SAFETY: plain integers, for which zero is a value.
            let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            to.sll_family = libc::AF_PACKET as u16;
            to.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            let index = nix::net::if_::if_nametoindex(interface).expect("the interface");
            to.sll_ifindex = index.cast_signed();
            let length = size_of_val(&to) as libc::socklen_t;
            // SAFETY: the address is valid for the call, with its length.
            let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const to).cast(), length) };
            assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
            Self(fd)
        })
    }

    /// Sends a frame; waits while the queue is full.
    pub(crate) fn send(&self, frame: &[u8]) {
        loop {
            // SAFETY: reads the frame, with its length.
            let sent =
                unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
            if sent == frame.len() as isize {
                return;
            }
            let error = std::io::Error::last_os_error();
            let full = matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN));
            assert!(full, "{error}");
            thread::yield_now();
        }
    }

    /// The next frame, if there is one.
    fn poll(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        // SAFETY: writes at most as many bytes as the buffer has.
        let got = unsafe {
            libc::recv(
                self.0.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                0,
            )
        };
        buffer.truncate(usize::try_from(got).ok()?);
        Some(buffer)
    }

    /// The next frame for which the answer is something.
    pub(crate) async fn find<T>(&self, what: &str, wanted: impl Fn(&[u8]) -> Option<T>) -> T {
        eventually(what, async || {
            while let Some(frame) = self.poll() {
                if let Some(found) = wanted(&frame) {
                    return Ok(found);
                }
            }
            Err("other frames".to_owned())
        })
        .await
    }
}

/// Length of Ethernet, IPv4, UDP and VXLAN before the inner frame.
pub(crate) const OUTER: usize = 14 + 20 + 8 + 8;

/// The S-BFD packet in a VXLAN frame over IPv4 of the probe VNI.
pub(crate) fn sbfd_in(frame: &[u8]) -> Option<frame::Packet> {
    let vxlan = frame.get(OUTER - 8..OUTER)?;
    let is_management = frame[12..14] == [0x08, 0x00] && vxlan == [0x08, 0, 0, 0, 0, 0, 1, 0];
    let inner = &frame[OUTER..];
    let head = inner.first_chunk().filter(|_| is_management)?;
    frame::parse::<{ frame::HEAD_V4 }>(head, inner.len() as u32)
}

/// A frame as heard, without its outer UDP checksum: on these links it is left for a card to complete, which there is none of.
pub(crate) fn sendable(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[14 + 20 + 6..14 + 20 + 8].fill(0);
    frame
}
