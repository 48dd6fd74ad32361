//! What the measurements share: nodes in namespaces, and processes that spin.

use std::{
    env,
    net::IpAddr,
    os::fd::AsFd as _,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use nsm_core::{
    liveness::{PathId, Reflector, sbfd::Timing},
    net::Vni,
};
use nsm_dataplane::{
    bpf::{Bpf, BpfConfig},
    forward::TunnelDevices,
    liveness::{Events, Health, HealthConfig},
    netns::Netns,
};

pub(crate) type Failure = Box<dyn std::error::Error>;

/// Runs in network and mount namespaces of its own, with a BPF filesystem that nobody else sees.
pub(crate) fn sandbox(measure: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        none,
    )?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(measure)
}

/// The numbers among the arguments, as `name=value`.
pub(crate) fn number(name: &str, otherwise: usize) -> usize {
    let prefix = format!("{name}=");
    env::args()
        .find_map(|word| word.strip_prefix(&prefix)?.parse().ok())
        .unwrap_or(otherwise)
}

/// A node that runs.
pub(crate) struct Node {
    netns: Netns,
    devices: Arc<TunnelDevices>,
    pub(crate) health: Health,
    pub(crate) events: Events,
}

impl Node {
    /// Ends the node with all that it has in the kernel.
    pub(crate) async fn end(self) -> Result<(), Failure> {
        self.health.close().await?;
        self.devices.close(&self.netns)?;
        Ok(())
    }
}

/// Starts a node.
pub(crate) fn start(
    netns: &Netns,
    number: usize,
    interfaces: Vec<String>,
) -> Result<Node, Failure> {
    let config = BpfConfig {
        pin_dir: format!("/sys/fs/bpf/node{number}").into(),
        interfaces,
        mount_bpffs: false,
        ..BpfConfig::default()
    };
    let bpf = Arc::new(within(netns, || Ok(Bpf::load(&config)?))?);
    let devices = Arc::new(TunnelDevices::new(bpf, "cost.example"));
    let config = HealthConfig {
        domain: "cost.example".to_owned(),
        vni: Vni::MANAGEMENT,
        port: 4789,
        local: None,
        timing: Timing::default(),
        namespace: Some(netns.clone()),
        orphan_grace: Duration::from_secs(60),
    };
    let (health, events) = Health::start(config, Arc::clone(&devices))?;
    Ok(Node {
        netns: netns.clone(),
        devices,
        health,
        events,
    })
}

/// How others are to watch a node at an address.
pub(crate) fn spec(node: &Node, address: IpAddr) -> PathId {
    PathId {
        address,
        port: 4789,
        reflector: Reflector {
            discriminator: node.health.discriminator(),
            vni: Vni::MANAGEMENT,
        },
    }
}

/// A process that spins; ended with the value, and by itself if that never happens.
pub(crate) struct Busy(Child);

impl Busy {
    pub(crate) fn start(seconds: u64) -> Result<Self, Failure> {
        let mut command = Command::new("setsid");
        let seconds = seconds.to_string();
        command.args(["timeout", &seconds, "sh", "-c", "while :; do :; done"]);
        Ok(Self(command.stdin(Stdio::null()).spawn()?))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // TERM, which `timeout` hands on to what it runs.
        let pid = self.0.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &pid]).status();
        let _ = self.0.wait();
    }
}

/// A new network namespace.
pub(crate) fn netns() -> Result<Netns, Failure> {
    let outer = Netns::current()?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    let new = Netns::current()?;
    ip("link set lo up")?;
    setns(outer.as_fd(), CloneFlags::CLONE_NEWNET)?;
    Ok(new)
}

/// Acts in a namespace.
pub(crate) fn within<T>(
    netns: &Netns,
    act: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let outer = Netns::current()?;
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
    let result = act();
    setns(outer.as_fd(), CloneFlags::CLONE_NEWNET)?;
    result
}

/// `ip` with these words.
pub(crate) fn ip(words: &str) -> Result<(), Failure> {
    let status = Command::new("ip").args(words.split_whitespace()).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("ip {words}: {status}").into())
    }
}
