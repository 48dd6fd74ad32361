//! Hooking the programs to interfaces, by tcx or clsact.
//!
//! tcx (kernel 6.6): a BPF link for each interface and direction, pinned, so that it outlives the process and the next agent
//! can put its program in place of ours in one step. Ours is attached as the first program of the hook: one behind a CNI's would
//! not see what that one decides about finally. What is put before ours later, by either hook, is a fault
//! ([`Attachments::check_order`]).
//!
//! clsact: a filter of our own priority and handle on the clsact qdisc. The kernel keeps it whoever dies; the next agent
//! replaces it at that place. The qdisc is left when the filter goes: others may have put theirs there.
//!
//! A program hangs only if the kernel names it, by its id, on this interface and in this direction ([`Attachments::hangs`]). That is
//! asked after each attachment and whenever the hooks are looked after.

mod block;
mod clsact;
mod tcx;

use std::{collections::BTreeSet, fmt, mem};

use aya::{
    Ebpf,
    programs::{ProgramError, SchedClassifier, TcAttachType},
};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::{if_nameindex, if_nametoindex},
};

pub(super) use self::block::{Block, BlockFound};
use super::{
    BpfError, Direction,
    error::{Predecessors, attaching},
    pins::PinDir,
    role::Role,
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

// linux/if_arp.h: interfaces whose packets start with an Ethernet header.
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_LOOPBACK: u16 = 772;

/// The index of the loopback, the first interface of every network namespace.
const LOOPBACK: u32 = 1;

/// The program at the node's ends of pod links.
pub(super) const POD_INGRESS: &str = "pod_ingress";

/// The program of a role and direction.
pub(super) fn program(ebpf: &mut Ebpf, role: Role, direction: Direction) -> &mut SchedClassifier {
    classifier(ebpf, program_name(role, direction))
}

/// A program by its name in the object.
pub(super) fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .expect("the object holds a classifier of each name")
}

pub(super) const fn program_name(role: Role, direction: Direction) -> &'static str {
    match (role, direction) {
        (Role::Underlay, Direction::In) => "underlay_ingress",
        (Role::Underlay, Direction::Out) => "underlay_egress",
        (Role::External, _) => "external_ingress",
        (Role::Probe, _) => "probe_egress",
    }
}

const fn attach_type(direction: Direction) -> TcAttachType {
    match direction {
        Direction::In => TcAttachType::Ingress,
        Direction::Out => TcAttachType::Egress,
    }
}

/// tcx where the kernel has it, unless the configuration names a hook.
pub(super) fn choose_hook(wanted: Option<Hook>) -> Result<Hook, BpfError> {
    if wanted == Some(Hook::Clsact) {
        return Ok(Hook::Clsact);
    }
    // Asking costs nothing and needs no kernel version, which says little where features are ported back.
    match tcx::programs(LOOPBACK, Direction::In) {
        Ok(_) => Ok(Hook::Tcx),
        Err(error) if wanted == Some(Hook::Tcx) => Err(BpfError::NoTcx(error)),
        Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok(Hook::Clsact),
        Err(error) => {
            let error = ProgramError::IOError(error);
            Err(attaching("lo", Direction::In, Hook::Tcx, error))
        }
    }
}

/// The interfaces that the programs hang on.
pub(super) struct Attachments {
    hook: Hook,
    attached: BTreeSet<(Role, String)>,
    /// What [`Self::undo`] takes off: hooked by this process where nothing was before. A set, which a repair does not make longer.
    made: BTreeSet<(Role, String, Direction)>,
}

impl Attachments {
    pub(super) const fn new(hook: Hook) -> Self {
        Self {
            hook,
            attached: BTreeSet::new(),
            made: BTreeSet::new(),
        }
    }

    /// The interfaces of a role.
    pub(super) fn interfaces(&self, role: Role) -> Vec<String> {
        let of_role = self.attached.iter().filter(|(found, _)| *found == role);
        of_role.map(|(_, interface)| interface.clone()).collect()
    }

    /// Hooks the programs of a role to an interface; what hangs there already stays.
    ///
    /// # Errors
    ///
    /// Nothing that this call hooked stays behind, but for one that [`BpfError::is_of_egress`]: then the program of what comes in
    /// hangs on the underlay, and the interface is one of [`Self::interfaces`].
    pub(super) fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        pins: &PinDir,
        role: Role,
        interface: &str,
    ) -> Result<(), BpfError> {
        check_interface(interface)?;
        let mut made = Vec::new();
        let mut attach_both = || {
            for &direction in role.directions() {
                if self.attach_one(ebpf, pins, role, interface, direction)? == Made::New {
                    made.push(direction);
                }
            }
            Ok(())
        };
        let attached: Result<(), BpfError> = attach_both();
        // The source check needs the way in only.
        let stays = match &attached {
            Ok(()) => true,
            Err(error) => role == Role::Underlay && error.is_of_egress(),
        };
        if stays {
            self.attached.insert((role, interface.to_owned()));
            let made = made.into_iter();
            self.made
                .extend(made.map(|direction| (role, interface.to_owned(), direction)));
        } else {
            for direction in made {
                self.take_off(pins, role, interface, direction);
            }
        }
        attached
    }

    fn attach_one(
        &self,
        ebpf: &mut Ebpf,
        pins: &PinDir,
        role: Role,
        interface: &str,
        direction: Direction,
    ) -> Result<Made, BpfError> {
        if self.hangs_one(ebpf, role, interface, direction)? {
            return Ok(Made::Before);
        }
        let program = program(ebpf, role, direction);
        let made = match self.hook {
            Hook::Tcx => {
                let pin = pins.link(role, interface, direction);
                tcx::attach(program, pins, &pin, interface, direction)?
            }
            Hook::Clsact => clsact::attach(program, interface, direction)?,
        };
        if self.hangs_one(ebpf, role, interface, direction)? {
            return Ok(made);
        }
        self.take_off(pins, role, interface, direction);
        Err(BpfError::Misplaced {
            interface: interface.to_owned(),
            direction,
            hook: self.hook,
        })
    }

    /// Whether the programs of a role hang on an interface, each in its direction: others can take them off or put theirs in their
    /// place, and an interface of the same name may be another.
    pub(super) fn hangs(
        &self,
        ebpf: &mut Ebpf,
        role: Role,
        interface: &str,
    ) -> Result<bool, BpfError> {
        for &direction in role.directions() {
            if !self.hangs_one(ebpf, role, interface, direction)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn hangs_one(
        &self,
        ebpf: &mut Ebpf,
        role: Role,
        interface: &str,
        direction: Direction,
    ) -> Result<bool, BpfError> {
        let id = self.program_id(ebpf, role, interface, direction)?;
        match self.hook {
            Hook::Tcx => tcx::hangs(interface, direction, id),
            Hook::Clsact => clsact::hangs(interface, direction, id),
        }
    }

    /// Checks that the kernel asks the programs of a role first about the packets of an interface. Others can put theirs before them at
    /// any time.
    ///
    /// # Errors
    ///
    /// [`BpfError::Behind`] where it does not. Nothing is changed: two that both want to be first would take turns for ever.
    pub(super) fn check_order(
        &self,
        ebpf: &mut Ebpf,
        role: Role,
        interface: &str,
    ) -> Result<(), BpfError> {
        for &direction in role.directions() {
            let id = self.program_id(ebpf, role, interface, direction)?;
            let ahead = match self.hook {
                Hook::Tcx => tcx::ahead(interface, direction, id)?,
                // The kernel asks tcx first.
                Hook::Clsact => [
                    tcx::all(interface, direction)?,
                    clsact::ahead(interface, direction, id)?,
                ]
                .concat(),
            };
            if !ahead.is_empty() {
                return Err(BpfError::Behind {
                    interface: interface.to_owned(),
                    direction,
                    ahead: Predecessors(ahead),
                });
            }
        }
        Ok(())
    }

    fn program_id(
        &self,
        ebpf: &mut Ebpf,
        role: Role,
        interface: &str,
        direction: Direction,
    ) -> Result<u32, BpfError> {
        let info = program(ebpf, role, direction).info();
        info.map(|info| info.id())
            .map_err(|source| attaching(interface, direction, self.hook, source))
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
        self.made
            .retain(|(of, made, _)| *of != role || made != interface);
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
        let detached = role.directions().iter().map(|&direction| match self.hook {
            Hook::Tcx => pins.remove_link(&pins.link(role, interface, direction)),
            Hook::Clsact => clsact::detach(program_name(role, direction), interface, direction),
        });
        detached.fold(Ok(()), Result::and)
    }

    /// Takes off what this process hooked where nothing was before, on a path that already has an error to report.
    pub(super) fn undo(&mut self, pins: &PinDir) {
        for (role, interface, direction) in mem::take(&mut self.made) {
            self.take_off(pins, role, &interface, direction);
        }
    }

    fn take_off(&self, pins: &PinDir, role: Role, interface: &str, direction: Direction) {
        let taken_off = match self.hook {
            Hook::Tcx => pins.remove_link(&pins.link(role, interface, direction)),
            Hook::Clsact => clsact::detach(program_name(role, direction), interface, direction),
        };
        if let Err(error) = taken_off {
            tracing::warn!(interface, %direction, %error, "a program stays behind");
        }
    }

    /// Removes what an earlier agent hooked elsewhere, or in the other way, to interfaces of a role. External devices and probe links are
    /// looked at later than the underlay: until then, the reflector of an earlier agent goes on answering.
    pub(super) fn remove_strays(&self, pins: &PinDir, role: Role) {
        let ours = self.interfaces(role);
        let wanted: Vec<_> = match self.hook {
            Hook::Clsact => Vec::new(),
            Hook::Tcx => ours
                .iter()
                .flat_map(|name| {
                    let directions = role.directions().iter();
                    directions.map(move |way| pins.link(role, name, *way))
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
            for &direction in role.directions() {
                if let Err(error) = clsact::detach(program_name(role, direction), name, direction) {
                    tracing::debug!(interface = name, %direction, %error, "cannot look for an old filter");
                }
            }
        }
    }
}

/// Whether something of ours was there before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    New,
    /// The program itself, or an earlier one whose place it took.
    Before,
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
