//! The BPF programs: loaded, attached, and their maps as plain values.
//!
//! [`Bpf::load`] takes the object that is compiled into this crate, hooks its two programs to the underlay interfaces of the
//! calling thread's network namespace, and pins maps and links below [`BpfConfig::pin_dir`]. From then on
//! [`Bpf::add_tunnel`] is a few map writes: nothing is attached or loaded inside a Request, which would take milliseconds.
//!
//! Invariants:
//!
//! - Pins outlive the process. An agent that starts again adopts the maps when their layout is its own (counters go on), puts
//!   its programs in place of the old ones without a gap, and removes the links of interfaces it no longer wants.
//! - One agent a pin directory: a lock on the directory says so, and dies with the process.
//! - A failed [`Bpf::load`] leaves nothing behind that it made; what an earlier agent left stays.
//! - A slot is in use by one tunnel at most. It is zeroed before its tunnel can be seen by the programs, and the slot that was
//!   freed longest ago is used first, so that a late packet of the old tunnel does not count to the new one.
//!
//! How it fails: without rights or kernel support every call returns a [`BpfError`] that says what is missing; the agent then has no
//! dataplane. The programs of the underlay fail open, but for wrong sources; those of forwarding fail closed.

mod attach;
mod error;
mod fast;
mod forwarding;
mod links;
mod management;
mod pins;
mod role;
mod sessions;
mod slots;
mod sys;
mod tables;
mod underlay;
mod verifier;
mod watch;

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    path::PathBuf,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{ProgramError, SchedClassifier},
};
use nix::time::{ClockId, clock_gettime};
use nsm_core::{clock::Monotonic, link::Traffic, net::Vni};
use nsm_ebpf_common::{Tunnel, VXLAN_PORT};
use sha2::{Digest as _, Sha256};

pub use self::{
    attach::Hook,
    error::{BpfError, Capability, Predecessor, Predecessors},
    fast::PathsTaken,
    underlay::underlay_interfaces,
    verifier::VerifierLog,
};
use self::{
    attach::{Attachments, Block},
    fast::FastTables,
    forwarding::ForwardingTables,
    pins::PinDir,
    role::Role,
    tables::Tables,
    watch::Repairs,
};
pub(crate) use self::{
    forwarding::{Connected, LeadsTo, PairedEnd, PodEnds, ProbeRoute},
    links::Own,
    management::Hooked,
    sessions::{PinnedSessions, Sessions},
    tables::{CounterReader, address, ip_addr},
};

#[cfg(test)]
pub(crate) use self::sessions::LocalSessions;

/// The programs, as `cargo xtask build-ebpf` made them. Aligned, because the loader reads its headers in place.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../../ebpf/proxy-nsmgr.bpf.o");

static OBJECT_SHA256: LazyLock<String> = LazyLock::new(|| {
    Sha256::digest(OBJECT)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
});

/// Where the maps and links are pinned unless told otherwise.
pub const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/proxy-nsmgr";

/// What to load, and where.
#[derive(Clone, Debug)]
pub struct BpfConfig {
    /// A directory on a BPF filesystem, made when missing. One for each agent of a machine.
    pub pin_dir: PathBuf,
    /// The underlay interfaces; empty: those that [`underlay_interfaces`] finds.
    pub interfaces: Vec<String>,
    /// Addresses of our ends of tunnels: interfaces that hold one are underlay too. Used only when `interfaces` is empty.
    pub tunnel_addresses: Vec<IpAddr>,
    /// UDP destination ports of tunnels. [`Bpf::add_port`] adds to them.
    pub ports: Vec<u16>,
    /// Which hook to use; `None`: tcx where the kernel has it, else clsact.
    pub hook: Option<Hook>,
    /// Mount a BPF filesystem on `/sys/fs/bpf` when `pin_dir` lies there and none is mounted.
    pub mount_bpffs: bool,
    /// Every packet takes the slow path, through the node's whole IP stack and its firewall.
    pub slow_only: bool,
}

impl Default for BpfConfig {
    fn default() -> Self {
        Self {
            pin_dir: PathBuf::from(DEFAULT_PIN_DIR),
            interfaces: Vec::new(),
            tunnel_addresses: Vec::new(),
            ports: vec![VXLAN_PORT],
            hook: None,
            mount_bpffs: true,
            slow_only: false,
        }
    }
}

/// Which way a packet goes, seen from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// From the peer.
    In,
    /// To the peer.
    Out,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::In => "ingress",
            Self::Out => "egress",
        })
    }
}

/// The place of a tunnel's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u32);

impl Slot {
    #[cfg(test)]
    pub(crate) const fn at(number: u32) -> Self {
        Self(number)
    }

    /// The key in the COUNTERS map.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Now, on the clock of the kernel's stamps.
#[must_use]
pub fn now() -> Monotonic {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has CLOCK_MONOTONIC");
    Monotonic::default() + Duration::from(time)
}

/// A tunnel that the programs know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownTunnel {
    /// Its VNI.
    pub vni: u32,
    /// The peer's public address.
    pub peer: IpAddr,
    /// Where its counters are.
    pub slot: Slot,
}

/// The loaded programs and their maps. Shared freely between threads; calls take microseconds and exclude each other.
pub struct Bpf {
    state: Mutex<State>,
    hook: Hook,
    /// The interfaces are those that lead out, not those that were named.
    finds_interfaces: bool,
}

/// Packets of a VNI that this node does not have, from the address of a peer: one of the two is wrong about the VNI, or
/// something else uses the port between the same nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForeignVni {
    /// The VNI of the packets.
    pub vni: u32,
    /// The peer's address, as they came from it.
    pub peer: IpAddr,
    /// Packets so far.
    pub packets: u64,
    /// When the last one came, to a timer tick.
    pub last: Monotonic,
}

struct State {
    ebpf: Ebpf,
    tables: Tables,
    fast: FastTables,
    forwarding: ForwardingTables,
    attachments: Attachments,
    block: Block,
    sessions: Option<PinnedSessions>,
    pins: PinDir,
    repairs: Repairs,
}

/// What [`Bpf::load`] makes.
struct Loaded {
    ebpf: Ebpf,
    tables: Tables,
    fast: FastTables,
    forwarding: ForwardingTables,
    attachments: Attachments,
    sessions: PinnedSessions,
    hook: Hook,
}

impl Bpf {
    /// Loads the programs and attaches them to the underlay interfaces of the calling thread's network namespace.
    ///
    /// Takes 8 to 16 ms an interface and direction: the kernel waits for its readers.
    ///
    /// # Errors
    ///
    /// No BPF filesystem at the pin directory, another agent that uses it, missing rights, no such interface, a kernel that
    /// refuses the programs: each with what to do. Nothing stays behind.
    pub fn load(config: &BpfConfig) -> Result<Self, BpfError> {
        let mut pins = PinDir::open(&config.pin_dir, config.mount_bpffs)?;
        let adopted = pins.prepare_maps()?;
        let loaded = Self::load_into(config, &mut pins);
        if loaded.is_err() && !adopted {
            pins.remove_all();
        }
        let loaded = loaded?;
        let hook = loaded.hook;
        let state = State {
            ebpf: loaded.ebpf,
            tables: loaded.tables,
            fast: loaded.fast,
            forwarding: loaded.forwarding,
            block: Block::of(&config.pin_dir),
            attachments: loaded.attachments,
            sessions: Some(loaded.sessions),
            pins,
            repairs: Repairs::default(),
        };
        Ok(Self {
            state: Mutex::new(state),
            hook,
            finds_interfaces: config.interfaces.is_empty(),
        })
    }

    fn load_into(config: &BpfConfig, pins: &mut PinDir) -> Result<Loaded, BpfError> {
        let mut loader = EbpfLoader::new();
        for map in pins::MAPS {
            loader.map_pin_path(map, pins.map(map));
        }
        let mut ebpf = loader.load(OBJECT).map_err(error::loading)?;
        load_programs(&mut ebpf)?;
        pins.hold_maps()?;
        let forwarding = ForwardingTables::adopt(&mut ebpf)?;
        let mut tables = Tables::adopt(&mut ebpf, forwarding.slots())?;
        for port in &config.ports {
            tables.add_port(*port)?;
        }
        let fast = FastTables::adopt(&mut ebpf, config.slow_only)?;
        let sessions = PinnedSessions::take(&mut ebpf)?;

        // Last, so that no error finds programs attached.
        let interfaces = match config.interfaces.as_slice() {
            [] => underlay_interfaces(&config.tunnel_addresses)?,
            named => named.to_vec(),
        };
        let hook = attach::choose_hook(config.hook)?;
        let mut attachments = Attachments::new(hook);
        for interface in &interfaces {
            match attachments.attach(&mut ebpf, pins, Role::Underlay, interface) {
                // The source check is worth having without the counts; [`Self::look_after_hooks`] says what is missing.
                Ok(()) => {}
                Err(error) if error.is_of_egress() => {}
                Err(error) => {
                    attachments.undo(pins);
                    return Err(error);
                }
            }
        }
        attachments.remove_strays(pins, Role::Underlay);
        Ok(Loaded {
            ebpf,
            tables,
            fast,
            forwarding,
            attachments,
            sessions,
            hook,
        })
    }

    /// Hooks the programs to one more interface, for one that appears later. Does nothing when they are there already.
    ///
    /// # Errors
    ///
    /// No such interface, one without Ethernet headers, one whose place for the way out is held by others, missing rights.
    pub fn attach(&self, interface: &str) -> Result<(), BpfError> {
        let state = &mut *self.state();
        state
            .attachments
            .attach(&mut state.ebpf, &state.pins, Role::Underlay, interface)
    }

    /// Takes the programs off an interface. Does nothing when they are not there.
    ///
    /// # Errors
    ///
    /// When the kernel or the BPF filesystem refuses.
    pub fn detach(&self, interface: &str) -> Result<(), BpfError> {
        let state = &mut *self.state();
        state
            .attachments
            .detach(&state.pins, Role::Underlay, interface)
    }

    /// Where maps and links are pinned: there is one such directory for each agent of a machine.
    pub(crate) fn pin_dir(&self) -> PathBuf {
        self.state().pins.path().to_owned()
    }

    /// The interfaces that the programs are attached to.
    #[must_use]
    pub fn interfaces(&self) -> Vec<String> {
        self.state().attachments.interfaces(Role::Underlay)
    }

    /// The hook in use.
    #[must_use]
    pub const fn hook(&self) -> Hook {
        self.hook
    }

    /// Lets the programs count this tunnel and drop packets of its VNI from anybody else. It leads to no pod: what comes out of it is
    /// dropped. A tunnel that they know already keeps its slot and its counters.
    ///
    /// # Errors
    ///
    /// When all slots are taken, when `peer` cannot be a tunnel's end, when the kernel refuses.
    pub fn add_tunnel(&self, vni: Vni, peer: IpAddr) -> Result<Slot, BpfError> {
        self.state()
            .tables
            .add_tunnel(vni.get(), peer, Tunnel::counted)
    }

    /// Forgets a tunnel and frees its slot; whether there was one.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn remove_tunnel(&self, vni: Vni, peer: IpAddr) -> Result<bool, BpfError> {
        self.state().tables.remove_tunnel(vni.get(), peer)
    }

    /// All tunnels that the programs know, among them those that an earlier agent left: ordered by slot. Entries of the
    /// management VNI are not among them.
    #[must_use]
    pub fn tunnels(&self) -> Vec<KnownTunnel> {
        self.state().tables.tunnels()
    }

    /// How many slots are taken.
    #[must_use]
    pub fn slots_in_use(&self) -> usize {
        self.state().tables.slots_in_use()
    }

    /// What passed through the tunnel of a slot on the underlay since the slot was taken, of all CPUs together: packets of the wire, and
    /// bytes of whole outer frames.
    ///
    /// # Errors
    ///
    /// When the slot is not in use.
    pub fn counters(&self, slot: Slot) -> Result<Traffic, BpfError> {
        self.state().tables.counters(slot)
    }

    /// How often each [`nsm_ebpf_common::Reason`] occurred, by name, of all CPUs together.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn drops(&self) -> Result<BTreeMap<&'static str, u64>, BpfError> {
        self.state().tables.drops()
    }

    /// Lets the programs look at one more UDP destination port. Ports survive a restart like tunnels.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn add_port(&self, port: u16) -> Result<(), BpfError> {
        self.state().tables.add_port(port)
    }

    /// Lets the programs ignore a UDP destination port.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn remove_port(&self, port: u16) -> Result<(), BpfError> {
        self.state().tables.remove_port(port)
    }

    /// Removes everything from the kernel: links, maps, pins, the pin directory. The maps live on unseen until this value is
    /// dropped.
    ///
    /// # Errors
    ///
    /// When something could not be removed; everything else is.
    pub fn detach_and_unpin(&self) -> Result<(), BpfError> {
        let state = &mut *self.state();
        let detached = state.attachments.detach_all(&state.pins);
        let removed = state.pins.remove_all_checked();
        detached.and(removed)
    }

    /// SHA-256 of the object that this program carries, in hex.
    #[must_use]
    pub fn object_sha256() -> &'static str {
        &OBJECT_SHA256
    }

    /// A panic elsewhere leaves maps as some valid state: each change is ordered so.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives all programs of the object to the verifier.
fn load_programs(ebpf: &mut Ebpf) -> Result<(), BpfError> {
    let of_roles = Role::ALL.into_iter().flat_map(|role| {
        let directions = role.directions().iter();
        directions.map(move |direction| attach::program_name(role, *direction))
    });
    for name in of_roles.chain([attach::POD_INGRESS]) {
        let loaded = load(attach::classifier(ebpf, name));
        loaded.map_err(|source| error::loading_program(name, source))?;
    }
    Ok(())
}

/// How often a program is given to a verifier that is interrupted.
const LOAD_ATTEMPTS: usize = 5;

/// Loads a program. The verifier takes tens of milliseconds and gives up (EAGAIN) when a signal is pending, be it one that is
/// ignored in the end, such as that of a child's end.
fn load(program: &mut SchedClassifier) -> Result<(), ProgramError> {
    for _ in 1..LOAD_ATTEMPTS {
        match program.load() {
            Err(error) if error::os_error(&error) == Some(nix::libc::EAGAIN) => {
                tracing::debug!(%error, "the verifier was interrupted");
            }
            loaded => return loaded,
        }
    }
    program.load()
}

impl fmt::Debug for Bpf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bpf")
            .field("hook", &self.hook)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use aya::EbpfLoader;

    use super::{Bpf, BpfError, OBJECT, load_programs};

    /// Replaces `rN = r1`, by which a program keeps its context in a register of its own (6 to 9), by `rN = 0`.
    fn forget_context(instruction: &mut [u8; 8]) {
        if let [0xbf, registers @ 0x16..=0x19, 0, 0, 0, 0, 0, 0] = *instruction {
            *instruction = [0xb7, registers & 0x0f, 0, 0, 0, 0, 0, 0];
        }
    }

    #[test]
    #[ignore = "needs root: BPF"]
    fn a_refused_program_is_named_with_the_verifiers_last_lines() {
        let mut broken = OBJECT.to_vec();
        let (instructions, _) = broken.as_chunks_mut::<8>();
        instructions.iter_mut().for_each(forget_context);
        let mut ebpf = EbpfLoader::new().load(&broken).unwrap();
        let error = load_programs(&mut ebpf).unwrap_err();
        let text = error.to_string();
        let BpfError::Refused { program, log, .. } = error else {
            panic!("{text}");
        };
        assert_eq!(program, "underlay_ingress");
        assert!((2..=10).contains(&log.lines().len()), "{log}");
        let names_register = (6..=9).any(|number| text.contains(&format!("r{number}")));
        assert!(names_register, "the instruction: {text}");
        assert!(text.len() < 2500, "{} bytes", text.len());
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        for word in ["underlay_ingress", release.trim(), "processed"] {
            assert!(text.contains(word), "no {word}: {text}");
        }
    }

    #[test]
    fn the_manifest_describes_the_object() {
        let manifest = include_str!("../../../../ebpf/manifest.json");
        let expected = format!("\"object_sha256\": \"{}\"", Bpf::object_sha256());
        assert!(
            manifest.contains(&expected),
            "{manifest} does not hold {expected}"
        );
    }

    #[test]
    fn it_can_be_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Bpf>();
    }
}
