//! Hooking the programs to interfaces, by tcx or clsact.
//!
//! tcx (kernel 6.6): a BPF link for each interface and direction, pinned, so that it outlives the process and the next agent
//! can put its program in place of ours in one step. Ours is the first program on the hook: one behind a CNI's would not see
//! what that one decides about finally.
//!
//! clsact: a filter of our own priority and handle on the clsact qdisc. The kernel keeps it whoever dies; the next agent
//! replaces it at that place. The qdisc is left when the filter goes: others may have put theirs there.

mod filter;

use std::{collections::BTreeSet, fmt, mem, path::Path};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::{if_nameindex, if_nametoindex},
};

use super::{
    BpfError, Direction,
    error::{attaching, attaching_tc, is_missing, os_error, pinning_link},
    pins::PinDir,
};

/// Where in the kernel the programs hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// BPF links on the interface (kernel 6.6).
    Tcx,
    /// Filters of the clsact queueing discipline (kernel 4.5).
    Clsact,
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

/// Priority of our filter: before those that the kernel numbers (49152 and down), after those of others that insist on
/// being first. A priority can hold filters of one kind only, so a common one would collide.
const PRIORITY: u16 = 47;

/// Handle of our filter at that priority: "nsm".
const HANDLE: TcHandle = TcHandle::new(0x006e, 0x736d);

// linux/if_arp.h: interfaces whose packets start with an Ethernet header.
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_LOOPBACK: u16 = 772;

/// What an interface carries: it decides which programs belong on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// Tunnels' packets.
    Underlay,
    /// The management VNI.
    Management,
}

/// The program of a role and direction.
pub(super) fn program(ebpf: &mut Ebpf, role: Role, direction: Direction) -> &mut SchedClassifier {
    ebpf.program_mut(program_name(role, direction))
        .and_then(|program| program.try_into().ok())
        .expect("the object holds a classifier for each role and direction")
}

const fn program_name(role: Role, direction: Direction) -> &'static str {
    match (role, direction) {
        (Role::Underlay, Direction::In) => "underlay_ingress",
        (Role::Underlay, Direction::Out) => "underlay_egress",
        (Role::Management, Direction::In) => "management_ingress",
        (Role::Management, Direction::Out) => "management_egress",
    }
}

const fn attach_type(direction: Direction) -> TcAttachType {
    match direction {
        Direction::In => TcAttachType::Ingress,
        Direction::Out => TcAttachType::Egress,
    }
}

/// tcx where the kernel knows it, unless told otherwise.
pub(super) fn choose_hook(wanted: Option<Hook>) -> Result<Hook, BpfError> {
    if wanted == Some(Hook::Clsact) {
        return Ok(Hook::Clsact);
    }
    // Asking costs nothing and needs no kernel version, which says little where features are ported back.
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Ok(_) => Ok(Hook::Tcx),
        Err(error) if wanted == Some(Hook::Tcx) => Err(BpfError::NoTcx(Box::new(error))),
        Err(error) if os_error(&error) == Some(nix::libc::EINVAL) => Ok(Hook::Clsact),
        Err(error) => Err(attaching("lo", Direction::In, Hook::Tcx, error)),
    }
}

/// The interfaces that the programs hang on.
pub(super) struct Attachments {
    hook: Hook,
    attached: BTreeSet<(Role, String)>,
    /// What [`Self::undo`] takes off: hooked by this process where nothing was before.
    made: Vec<(Role, String, Direction)>,
}

impl Attachments {
    pub(super) const fn new(hook: Hook) -> Self {
        Self {
            hook,
            attached: BTreeSet::new(),
            made: Vec::new(),
        }
    }

    /// The interfaces of a role.
    pub(super) fn interfaces(&self, role: Role) -> Vec<String> {
        let of_role = self.attached.iter().filter(|(found, _)| *found == role);
        of_role.map(|(_, interface)| interface.clone()).collect()
    }

    pub(super) fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        pins: &PinDir,
        role: Role,
        interface: &str,
    ) -> Result<(), BpfError> {
        check_interface(interface)?;
        let before = self.made.len();
        for direction in [Direction::In, Direction::Out] {
            let program = program(ebpf, role, direction);
            let attached = match self.hook {
                Hook::Tcx => {
                    let pin = pins.link(role, interface, direction);
                    attach_tcx(program, pins, &pin, interface, direction)
                }
                Hook::Clsact => attach_clsact(program, interface, direction),
            };
            match attached {
                Ok(Made::New) => self.made.push((role, interface.to_owned(), direction)),
                Ok(Made::Replaced) => {}
                Err(error) => {
                    // Both directions or none.
                    for (role, interface, direction) in self.made.split_off(before) {
                        self.take_off(pins, role, &interface, direction);
                    }
                    return Err(error);
                }
            }
        }
        self.attached.insert((role, interface.to_owned()));
        Ok(())
    }

    /// Whether the programs of a role hang on an interface: others can take them off, and an interface of the same name may be another.
    pub(super) fn hangs(
        &self,
        ebpf: &mut Ebpf,
        role: Role,
        interface: &str,
    ) -> Result<bool, BpfError> {
        for direction in [Direction::In, Direction::Out] {
            let hangs = match self.hook {
                Hook::Tcx => program(ebpf, role, direction)
                    .info()
                    .and_then(|info| hangs_on(interface, direction, info.id()))
                    .map_err(|source| attaching(interface, direction, self.hook, source))?,
                Hook::Clsact => filter::is_there(interface, direction)?,
            };
            if !hangs {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn detach(
        &mut self,
        pins: &PinDir,
        role: Role,
        interface: &str,
    ) -> Result<(), BpfError> {
        if !self.attached.remove(&(role, interface.to_owned())) {
            return Ok(());
        }
        self.made.retain(|(_, made, _)| made != interface);
        self.detach_one(pins, role, interface)
    }

    pub(super) fn detach_all(&mut self, pins: &PinDir) -> Result<(), BpfError> {
        self.made.clear();
        let attached = mem::take(&mut self.attached);
        attached
            .iter()
            .map(|(role, interface)| self.detach_one(pins, *role, interface))
            .fold(Ok(()), Result::and)
    }

    fn detach_one(&self, pins: &PinDir, role: Role, interface: &str) -> Result<(), BpfError> {
        let both = [Direction::In, Direction::Out].map(|direction| match self.hook {
            Hook::Tcx => pins.remove_link(&pins.link(role, interface, direction)),
            Hook::Clsact => detach_clsact(role, interface, direction),
        });
        both.into_iter().fold(Ok(()), Result::and)
    }

    /// Takes off what this process hooked where nothing was before, on a path that already has an error to tell.
    pub(super) fn undo(&mut self, pins: &PinDir) {
        for (role, interface, direction) in mem::take(&mut self.made) {
            self.take_off(pins, role, &interface, direction);
        }
    }

    fn take_off(&self, pins: &PinDir, role: Role, interface: &str, direction: Direction) {
        let taken_off = match self.hook {
            Hook::Tcx => pins.remove_link(&pins.link(role, interface, direction)),
            Hook::Clsact => detach_clsact(role, interface, direction),
        };
        if let Err(error) = taken_off {
            tracing::warn!(interface, %direction, %error, "a program stays behind");
        }
    }

    /// Removes what an earlier agent hooked elsewhere, or in the other way, to interfaces of a role. Management links are looked
    /// at later than the underlay: until then, the reflector of an earlier agent goes on answering.
    pub(super) fn remove_strays(&self, pins: &PinDir, role: Role) {
        let ours = self.interfaces(role);
        let wanted: Vec<_> = match self.hook {
            Hook::Clsact => Vec::new(),
            Hook::Tcx => ours
                .iter()
                .flat_map(|name| {
                    [Direction::In, Direction::Out].map(|way| pins.link(role, name, way))
                })
                .collect(),
        };
        for link in pins.links(role) {
            if wanted.contains(&link) {
                continue;
            }
            tracing::info!(link = %link.display(), "removing the link of an earlier agent");
            if let Err(error) = pins.remove_link(&link) {
                tracing::warn!(link = %link.display(), %error, "a link stays behind");
            }
        }
        let Ok(interfaces) = if_nameindex() else {
            return;
        };
        for interface in &interfaces {
            let Ok(name) = interface.name().to_str() else {
                continue;
            };
            if self.hook == Hook::Clsact && ours.iter().any(|known| known == name) {
                continue;
            }
            for direction in [Direction::In, Direction::Out] {
                if let Err(error) = detach_clsact(role, name, direction) {
                    tracing::debug!(interface = name, %direction, %error, "cannot look for an old filter");
                }
            }
        }
    }
}

/// Whether something of ours was there before.
enum Made {
    New,
    Replaced,
}

fn attach_tcx(
    program: &mut SchedClassifier,
    pins: &PinDir,
    path: &Path,
    interface: &str,
    direction: Direction,
) -> Result<Made, BpfError> {
    let failed = |source| attaching(interface, direction, Hook::Tcx, source);
    let id = program.info().map_err(failed)?.id();
    if hangs_on(interface, direction, id).map_err(failed)? {
        return Ok(Made::Replaced);
    }
    match PinnedLink::from_pin(path) {
        Ok(old) => {
            let replaced = SchedClassifierLink::try_from(FdLink::from(old))
                .ok()
                .and_then(|link| program.attach_to_link(link).ok())
                .and_then(|link| program.take_link(link).ok());
            // A link stays with its interface: of one that is gone, or of another namespace's, only the pin is left.
            if replaced.is_some() && hangs_on(interface, direction, id).map_err(failed)? {
                return Ok(Made::Replaced);
            }
            pins.remove_link(path)?;
        }
        Err(error) if is_missing(&error) => {}
        Err(_) => pins.remove(path)?,
    }

    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let link = program
        .attach_with_options(interface, attach_type(direction), options)
        .and_then(|id| program.take_link(id))
        .map_err(failed)?;
    let link =
        FdLink::try_from(link).map_err(|source| pinning_link(interface, direction, source))?;
    link.pin(path)
        .map_err(|source| pinning_link(interface, direction, source))?;
    Ok(Made::New)
}

/// Whether the program hangs on the interface.
fn hangs_on(
    interface: &str,
    direction: Direction,
    program: u32,
) -> Result<bool, aya::programs::ProgramError> {
    let (_, programs) = SchedClassifier::query_tcx(interface, attach_type(direction))?;
    Ok(programs.iter().any(|info| info.id() == program))
}

fn attach_clsact(
    program: &mut SchedClassifier,
    interface: &str,
    direction: Direction,
) -> Result<Made, BpfError> {
    match tc::qdisc_add_clsact(interface) {
        Err(error) if os_error(&error) != Some(nix::libc::EEXIST) => {
            return Err(attaching_tc(interface, direction, error));
        }
        _ => {}
    }
    let attach_type = attach_type(direction);
    let failed = |source| attaching(interface, direction, Hook::Clsact, source);
    let old = SchedClassifierLink::attached(interface, attach_type, PRIORITY, HANDLE, None)
        .map_err(|error| attaching_tc(interface, direction, error.into()))?;
    if let Ok(link) = program.attach_to_link(old) {
        // Dropped, it would take the filter off.
        mem::forget(program.take_link(link).map_err(failed)?);
        return Ok(Made::Replaced);
    }
    let options = NlOptions {
        priority: PRIORITY,
        handle: HANDLE,
        classid: None,
    };
    let link = program
        .attach_with_options(interface, attach_type, TcAttachOptions::Netlink(options))
        .and_then(|link| program.take_link(link))
        .map_err(failed)?;
    mem::forget(link);
    Ok(Made::New)
}

/// Takes our filter off; one that is not there is fine.
fn detach_clsact(role: Role, interface: &str, direction: Direction) -> Result<(), BpfError> {
    let name = program_name(role, direction);
    match tc::qdisc_detach_program(interface, attach_type(direction), name) {
        Err(error)
            if !matches!(&error, tc::TcError::IoError(io) if io.kind() == std::io::ErrorKind::NotFound)
                && !matches!(
                    os_error(&error),
                    Some(nix::libc::ENODEV | nix::libc::EINVAL)
                ) =>
        {
            Err(attaching_tc(interface, direction, error))
        }
        _ => Ok(()),
    }
}

/// The interface exists here and has Ethernet headers.
fn check_interface(interface: &str) -> Result<(), BpfError> {
    if if_nametoindex(interface).is_err() {
        return Err(BpfError::NoInterface {
            interface: interface.to_owned(),
        });
    }
    let addresses = getifaddrs().map_err(|errno| BpfError::Underlay {
        from: "the interfaces of this network namespace",
        source: errno.into(),
    })?;
    // One without a hardware address is not listed with a type, and is no Ethernet interface either.
    let hardware = addresses
        .filter(|found| found.interface_name == interface)
        .find_map(|found| Some(found.address?.as_link_addr()?.hatype()));
    match hardware {
        Some(ARPHRD_ETHER | ARPHRD_LOOPBACK) => Ok(()),
        _ => Err(BpfError::NotEthernet {
            interface: interface.to_owned(),
        }),
    }
}
