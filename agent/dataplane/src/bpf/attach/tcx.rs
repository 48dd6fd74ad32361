//! Programs on tcx: a pinned BPF link for each interface and direction.

use std::{io, path::Path};

use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier,
    links::{FdLink, PinnedLink},
    tc::{SchedClassifierLink, TcAttachOptions},
};
use nix::net::if_::if_nametoindex;

use super::{Hook, Made, attach_type};
use crate::bpf::{
    BpfError, Direction, Predecessor,
    error::{attaching, is_missing, pinning_link},
    pins::PinDir,
    sys,
};

/// Hooks a program that does not hang yet, in place of an earlier agent's where there is one.
pub(super) fn attach(
    program: &mut SchedClassifier,
    pins: &PinDir,
    path: &Path,
    interface: &str,
    direction: Direction,
) -> Result<Made, BpfError> {
    let failed = |source| attaching(interface, direction, Hook::Tcx, source);
    let id = program.info().map_err(failed)?.id();
    match PinnedLink::from_pin(path) {
        Ok(old) => {
            let replaced = SchedClassifierLink::try_from(FdLink::from(old))
                .ok()
                .and_then(|link| program.attach_to_link(link).ok())
                .and_then(|link| program.take_link(link).ok());
            // A link stays with its interface: of one that is gone, or of another namespace's, only the pin is left.
            if replaced.is_some() && hangs(interface, direction, id)? {
                return Ok(Made::Before);
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

/// Whether the program hangs on an interface of the calling thread's network namespace.
pub(super) fn hangs(interface: &str, direction: Direction, program: u32) -> Result<bool, BpfError> {
    Ok(programs_of(interface, direction)?.contains(&program))
}

/// The programs that run before this one, if it hangs on an interface of the calling thread's network namespace.
pub(super) fn ahead(
    interface: &str,
    direction: Direction,
    program: u32,
) -> Result<Vec<Predecessor>, BpfError> {
    let mut programs = programs_of(interface, direction)?;
    let place = programs.iter().position(|found| *found == program);
    programs.truncate(place.unwrap_or(0));
    Ok(programs.into_iter().map(Predecessor::Program).collect())
}

/// All programs on an interface; none where the kernel has no tcx.
pub(super) fn all(interface: &str, direction: Direction) -> Result<Vec<Predecessor>, BpfError> {
    match programs_of(interface, direction) {
        Err(BpfError::Attach { source, .. }) if is_unknown(&source) => Ok(Vec::new()),
        found => Ok(found?.into_iter().map(Predecessor::Program).collect()),
    }
}

/// Whether the kernel does not know the hook.
fn is_unknown(error: &ProgramError) -> bool {
    matches!(error, ProgramError::IOError(error) if error.raw_os_error() == Some(nix::libc::EINVAL))
}

fn programs_of(interface: &str, direction: Direction) -> Result<Vec<u32>, BpfError> {
    let Ok(index) = if_nametoindex(interface) else {
        return Ok(Vec::new());
    };
    programs(index, direction).map_err(|source| {
        let source = ProgramError::IOError(source);
        attaching(interface, direction, Hook::Tcx, source)
    })
}

/// The programs on an interface, by identifier. The error is EINVAL where the kernel has no tcx.
pub(super) fn programs(ifindex: u32, direction: Direction) -> io::Result<Vec<u32>> {
    // enum bpf_attach_type of linux/bpf.h.
    const BPF_TCX_INGRESS: u32 = 46;
    const BPF_TCX_EGRESS: u32 = 47;
    let hook = match direction {
        Direction::In => BPF_TCX_INGRESS,
        Direction::Out => BPF_TCX_EGRESS,
    };
    sys::programs_on_tcx(ifindex, hook)
}
