//! What can go wrong with BPF, and what the operator can do.

use std::{error::Error, fmt, fs, io, net::IpAddr, path::PathBuf};

use aya::{
    EbpfError,
    maps::MapError,
    programs::{ProgramError, links::LinkError, tc::TcError},
};

use super::{Direction, Hook, Slot, VerifierLog};

/// A right that the kernel asks for (capabilities(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// CAP_BPF: load programs, make and pin maps.
    Bpf,
    /// CAP_PERFMON: programs that compute with packet pointers.
    Perfmon,
    /// CAP_NET_ADMIN: load classifiers, attach to interfaces.
    NetAdmin,
    /// CAP_SYS_ADMIN: mount a BPF filesystem.
    SysAdmin,
}

impl Capability {
    /// Its bit in the capability sets.
    const fn number(self) -> u32 {
        match self {
            Self::NetAdmin => 12,
            Self::SysAdmin => 21,
            Self::Perfmon => 38,
            Self::Bpf => 39,
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bpf => "CAP_BPF",
            Self::Perfmon => "CAP_PERFMON",
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::SysAdmin => "CAP_SYS_ADMIN",
        })
    }
}

/// Why a call to [`super::Bpf`] failed.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The pin directory is not on a BPF filesystem.
    #[error(
        "{} is not on a BPF filesystem: run `mount -t bpf bpf /sys/fs/bpf` on the host (in a container, mount the \
         host's /sys/fs/bpf), or choose a pin directory on one", dir.display()
    )]
    NoBpffs {
        /// The pin directory.
        dir: PathBuf,
    },
    /// A BPF filesystem could not be mounted.
    #[error("cannot mount a BPF filesystem on {}{}", dir.display(), lacks(.missing))]
    Mount {
        /// Where.
        dir: PathBuf,
        /// The rights that this process lacks.
        missing: Vec<Capability>,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pin directory could not be made or read.
    #[error("cannot {action} {}", path.display())]
    Pin {
        /// What was tried.
        action: &'static str,
        /// The directory or pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process uses the pin directory.
    #[error("{} is in use by another agent: stop it, or give this one a pin directory of its own", dir.display())]
    InUse {
        /// The pin directory.
        dir: PathBuf,
    },
    /// The kernel refused for lack of rights.
    #[error(
        "the kernel refuses to {action}{}; where the capabilities are there, look for a seccomp profile or a \
         user namespace around this process", lacks(.missing)
    )]
    NotPermitted {
        /// What was tried.
        action: String,
        /// The capabilities that this process lacks of those it needs.
        missing: Vec<Capability>,
        /// What the kernel said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The kernel did not take the object.
    #[error("cannot load the BPF object: this kernel may be older than 6.1 or built without BPF")]
    Load(#[source] Box<EbpfError>),
    /// The kernel's verifier refused a program.
    #[error(
        "Linux {kernel} refuses the BPF program {program}: use a kernel that the README names, or report this; the verifier's \
         last lines: {log}"
    )]
    Refused {
        /// The program.
        program: &'static str,
        /// Release of the kernel.
        kernel: String,
        /// What the verifier said last.
        log: VerifierLog,
        /// The error of the system call.
        source: io::Error,
    },
    /// The kernel has no tcx, which was asked for.
    #[error(
        "this kernel has no tcx (it came with 6.6): choose clsact, or leave the choice to the agent"
    )]
    NoTcx(#[source] io::Error),
    /// There is no such interface in this network namespace.
    #[error("there is no interface {interface} in this network namespace")]
    NoInterface {
        /// Its name.
        interface: String,
    },
    /// The interface has no Ethernet headers, which the programs start at.
    #[error(
        "interface {interface} has no Ethernet headers (tun, WireGuard and IP-in-IP have none): tunnel traffic on it \
         cannot be counted; name the interface below it"
    )]
    NotEthernet {
        /// Its name.
        interface: String,
    },
    /// The programs could not be attached.
    #[error("cannot attach to {hook} {direction} of {interface}")]
    Attach {
        /// The interface.
        interface: String,
        /// The direction.
        direction: Direction,
        /// The hook.
        hook: Hook,
        /// What the kernel said.
        source: Box<ProgramError>,
    },
    /// An `ingress` qdisc stands where clsact would, and has no place for programs on the way out.
    #[error(
        "{interface} has an `ingress` qdisc, which has no egress: what comes in is counted and its source checked, what leaves is \
         not counted; run `tc qdisc del dev {interface} ingress`, which takes that qdisc's filters along, and the agent \
         puts clsact there, which serves both"
    )]
    NoEgress {
        /// The interface.
        interface: String,
    },
    /// The place of our filter is held by another kind of filter.
    #[error(
        "priority {priority} of {interface} {direction} holds filters of kind {kind}, and only one kind can be there: run \
         `tc filter del dev {interface} {direction} pref {priority}`, or move them to another priority{}", once_free(*.direction)
    )]
    PriorityTaken {
        /// The interface.
        interface: String,
        /// The direction.
        direction: Direction,
        /// The priority.
        priority: u16,
        /// The kind of filter that is there.
        kind: String,
    },
    /// A program was hooked, and the kernel does not show it there.
    #[error(
        "the program for {direction} of {interface} was hooked by {hook} and does not hang there: another program may take it off; \
         `bpftool net` and `tc filter show dev {interface} {direction}` show what is there"
    )]
    Misplaced {
        /// The interface.
        interface: String,
        /// The direction.
        direction: Direction,
        /// The hook.
        hook: Hook,
    },
    /// The program of pod links could not be put on a link; 0: on any.
    #[error(
        "the BPF program of pod links cannot be put on, or looked for at, {}: {source}; `tc qdisc show clsact` shows what is there",
        of_link(*link)
    )]
    PodLink {
        /// The index of the node's end.
        link: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Tunnels use too many UDP ports.
    #[error(
        "UDP port {port} has no external VXLAN device: there are {capacity} ports at most; use fewer ports in `tunnel.peer_ports`"
    )]
    DevicesExhausted {
        /// The port.
        port: u16,
        /// Ports there are.
        capacity: u32,
    },
    /// Others decide about packets before ours.
    #[error(
        "{ahead} on {direction} of {interface} comes before our program: what it lets pass, drops or redirects for good is not \
         counted, and its source is not checked there; `bpftool net` and `tc filter show dev {interface} {direction}` show it: put \
         it behind ours, or take it off"
    )]
    Behind {
        /// The interface.
        interface: String,
        /// The direction.
        direction: Direction,
        /// What is before ours, in the order of the kernel.
        ahead: Predecessors,
    },
    /// Our programs are put back again and again.
    #[error(
        "the BPF programs were gone from {interface} again and again within a minute, and are put back each time: what passes in between is \
         neither counted nor checked; find what takes them off (`tc monitor`, `bpftool net`), and stop it"
    )]
    TakenOff {
        /// The interface.
        interface: String,
    },
    /// A link could not be pinned.
    #[error("cannot pin the link of {interface} {direction}")]
    PinLink {
        /// The interface.
        interface: String,
        /// The direction.
        direction: Direction,
        /// What the kernel said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The underlay interfaces could not be found.
    #[error("cannot find the underlay interfaces from {from}: name them in the configuration")]
    Underlay {
        /// What was read.
        from: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// What hangs on an interface could not be read.
    #[error("cannot read which filters interface `{interface}` has")]
    Filters {
        /// The interface.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The object does not hold a map that it must.
    #[error("the BPF object holds no map {map}: it was not built from this source")]
    NoSuchMap {
        /// The map.
        map: &'static str,
    },
    /// A map could not be read or written.
    #[error("cannot {action} the BPF map {map}")]
    Map {
        /// The map.
        map: &'static str,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// A map could not be seen in place.
    #[error("cannot see the BPF map {map} in memory: this kernel may be older than 5.5")]
    MapMemory {
        /// The map.
        map: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The number of CPUs is unknown.
    #[error("cannot read the number of CPUs from {file}")]
    Cpus {
        /// The file.
        file: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// All slots are taken.
    #[error("no slot is free for VNI {vni} to {peer}: all {capacity} are in use")]
    SlotsExhausted {
        /// The VNI.
        vni: u32,
        /// The peer.
        peer: IpAddr,
        /// Slots there are.
        capacity: u32,
    },
    /// All slots are taken, and a connection between two pods of this node needs some.
    #[error(
        "no slot is free for a connection between two pods of this node: all {capacity} are in use; close unused connections"
    )]
    PairSlotsExhausted {
        /// Slots there are.
        capacity: u32,
    },
    /// No connection uses the slot.
    #[error("slot {0} is not in use")]
    NoSlot(Slot),
    /// The address cannot be the other end of a tunnel.
    #[error("{peer} cannot be the peer of VNI {vni}: a tunnel ends at one host's address")]
    NotAPeer {
        /// The VNI.
        vni: u32,
        /// The address.
        peer: IpAddr,
    },
}

/// What the kernel asks about a packet before it asks our program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// A program on tcx, by its number.
    Program(u32),
    /// A filter of clsact.
    Filter {
        /// Its priority.
        priority: u16,
        /// Its kind.
        kind: String,
    },
}

impl fmt::Display for Predecessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program(id) => write!(f, "program {id} on tcx"),
            Self::Filter { priority, kind } => write!(f, "filter `{kind}` of priority {priority}"),
        }
    }
}

/// Several, as a list for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Predecessors(pub Vec<Predecessor>);

impl fmt::Display for Predecessors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&all.join(", "))
    }
}

impl BpfError {
    /// Whether the pod link that a program was to be put on is gone.
    #[must_use]
    pub fn is_of_missing_link(&self) -> bool {
        matches!(self, Self::PodLink { source, .. } if source.raw_os_error() == Some(nix::libc::ENODEV))
    }

    /// Only what leaves an interface is without its program: what comes in can be counted and checked all the same.
    pub(super) const fn is_of_egress(&self) -> bool {
        matches!(
            self,
            Self::NoEgress { .. }
                | Self::PriorityTaken {
                    direction: Direction::Out,
                    ..
                }
                | Self::Misplaced {
                    direction: Direction::Out,
                    ..
                }
        )
    }
}

/// A pod link by its index; 0: all of them.
fn of_link(link: u32) -> String {
    match link {
        0 => "the node's ends of pod links".to_owned(),
        link => format!("the interface with index {link}"),
    }
}

/// What follows once our priority is free. An agent that found it taken on ingress at its start has no dataplane.
const fn once_free(direction: Direction) -> &'static str {
    match direction {
        Direction::In => "; if the agent has no dataplane, then start the agent again",
        Direction::Out => "; until then, what leaves is not counted",
    }
}

/// What it takes to load and attach the programs.
const TO_LOAD: &[Capability] = &[Capability::Bpf, Capability::Perfmon, Capability::NetAdmin];

/// The kernel did not take the object.
pub(super) fn loading(source: EbpfError) -> BpfError {
    not_permitted("load BPF programs", TO_LOAD, source)
        .unwrap_or_else(|source| BpfError::Load(Box::new(source)))
}

/// The kernel did not take a program.
pub(super) fn loading_program(program: &'static str, source: ProgramError) -> BpfError {
    match source {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => not_permitted("load BPF programs", TO_LOAD, io_error).unwrap_or_else(|source| {
            BpfError::Refused {
                program,
                kernel: kernel_release(),
                log: VerifierLog::tail_of(&verifier_log.to_string()),
                source,
            }
        }),
        other => loading(other.into()),
    }
}

fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(
        |_| "(release unknown)".to_owned(),
        |release| release.trim_end().to_owned(),
    )
}

/// The kernel did not attach a program.
pub(super) fn attaching(
    interface: &str,
    direction: Direction,
    hook: Hook,
    source: ProgramError,
) -> BpfError {
    let action = format!("attach BPF programs to {interface}");
    not_permitted(&action, TO_LOAD, source).unwrap_or_else(|source| BpfError::Attach {
        interface: interface.to_owned(),
        direction,
        hook,
        source: Box::new(source),
    })
}

pub(super) fn attaching_tc(interface: &str, direction: Direction, source: TcError) -> BpfError {
    attaching(interface, direction, Hook::Clsact, source.into())
}

pub(super) fn pinning_link(
    interface: &str,
    direction: Direction,
    source: impl Error + Send + Sync + 'static,
) -> BpfError {
    BpfError::PinLink {
        interface: interface.to_owned(),
        direction,
        source: Box::new(source),
    }
}

/// Turns `source` into [`BpfError::NotPermitted`] when that is what it is about, else gives it back.
fn not_permitted<E>(action: &str, needed: &[Capability], source: E) -> Result<BpfError, E>
where
    E: Error + Send + Sync + 'static,
{
    if !matches!(
        os_error(&source),
        Some(nix::libc::EPERM | nix::libc::EACCES)
    ) {
        return Err(source);
    }
    // EACCES is also how the verifier refuses a program: with all rights there, it was that.
    let missing = missing_of(needed);
    if missing.is_empty() && os_error(&source) == Some(nix::libc::EACCES) {
        return Err(source);
    }
    Ok(BpfError::NotPermitted {
        action: action.to_owned(),
        missing,
        source: Box::new(source),
    })
}

/// The number of the system call's error at the bottom of `error`.
pub(super) fn os_error(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(number) = own_os_error(error) {
            return Some(number);
        }
        cause = error.source();
    }
    None
}

/// That of `error` itself. Aya's errors forward to what they hold, and so hide it from a walk along the sources.
fn own_os_error(error: &(dyn Error + 'static)) -> Option<i32> {
    let of_tc = |error: &TcError| match error {
        TcError::NetlinkError(error) => error.raw_os_error(),
        TcError::IoError(error) => error.raw_os_error(),
        _ => None,
    };
    let of_map = |error: &MapError| match error {
        MapError::IoError(error) => error.raw_os_error(),
        _ => None,
    };
    if let Some(error) = error.downcast_ref::<io::Error>() {
        error.raw_os_error()
    } else if let Some(error) = error.downcast_ref::<TcError>() {
        of_tc(error)
    } else if let Some(error) = error.downcast_ref::<MapError>() {
        of_map(error)
    } else {
        match error.downcast_ref::<ProgramError>()? {
            ProgramError::TcError(error) => of_tc(error),
            ProgramError::NetlinkError(error) => error.raw_os_error(),
            ProgramError::MapError(error) => of_map(error),
            ProgramError::IOError(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

/// Which of these rights the calling thread lacks.
pub(super) fn missing_of(needed: &[Capability]) -> Vec<Capability> {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    match effective(&status) {
        Some(held) => needed
            .iter()
            .copied()
            .filter(|cap| held >> cap.number() & 1 == 0)
            .collect(),
        None => Vec::new(),
    }
}

/// The effective capabilities from the text of /proc/<pid>/status.
fn effective(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn lacks(capabilities: &[Capability]) -> String {
    if capabilities.is_empty() {
        return String::new();
    }
    let names: Vec<String> = capabilities.iter().map(ToString::to_string).collect();
    let (last, others) = names
        .split_last()
        .map_or(("", &[][..]), |(last, others)| (last, others));
    let and = if others.is_empty() { "" } else { " and " };
    format!(": this process lacks {}{and}{last}", others.join(", "))
}

/// Links are only ever looked at to be taken over; one that cannot be is made anew.
pub(super) fn is_missing(error: &LinkError) -> bool {
    os_error(error) == Some(nix::libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_status() {
        let status = "Name:\tx\nCapEff:\t0000008000001000\nCapBnd:\t000001ffffffffff\n";
        let held = effective(status).unwrap();
        assert_eq!(
            held,
            1 << Capability::Bpf.number() | 1 << Capability::NetAdmin.number()
        );
        assert_eq!(effective("CapEff:\tx\n"), None);
        assert_eq!(effective(""), None);
    }

    #[test]
    fn a_refusal_names_the_missing_right() {
        let error = BpfError::NotPermitted {
            action: "load BPF programs".to_owned(),
            missing: vec![Capability::Bpf, Capability::Perfmon, Capability::NetAdmin],
            source: Box::new(io::Error::from_raw_os_error(nix::libc::EPERM)),
        };
        let text = error.to_string();
        assert!(
            text.contains("lacks CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"),
            "{text}"
        );
    }

    #[test]
    fn the_system_error_is_found_below_others() {
        let error = ProgramError::from(MapError::from(io::Error::from_raw_os_error(22)));
        assert_eq!(os_error(&error), Some(22));
        assert_eq!(os_error(&MapError::KeyNotFound), None);
    }
}
