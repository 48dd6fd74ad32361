//! Programs on clsact: a filter of our own priority and handle for each interface and direction.
//!
//! An `ingress` qdisc stands at the same place as clsact and has the handle of clsact, but only one list of filters. The kernel puts a
//! filter for egress into that list without an error, where it then runs on what comes in. What is there is therefore read before a
//! filter is put on, and the way out is never asked of an `ingress` qdisc.

use std::{io, mem};

use aya::programs::{
    SchedClassifier,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{self as route, TcAttribute, TcFilterBpfOption, TcMessage, TcOption},
};
use nix::net::if_::if_nametoindex;

use super::{Hook, Made, attach_type};
use crate::{
    bpf::{
        BpfError, Direction, Predecessor,
        error::{attaching, attaching_tc, os_error},
    },
    netlink::Netlink,
};

/// Priority of our filter: before those that the kernel numbers (49152 and down), after those of others that insist on
/// being first. A priority can hold filters of one kind only, so a common one would collide.
pub(super) const PRIORITY: u16 = 47;

/// Handle of our filter at that priority: "nsm".
pub(super) const HANDLE: TcHandle = TcHandle::new(0x006e, 0x736d);

pub(super) const CLSACT: &str = "clsact";
const INGRESS: &str = "ingress";
pub(super) const BPF: &str = "bpf";

/// Hooks a program that does not hang yet, in place of an earlier agent's where there is one.
pub(super) fn attach(
    program: &mut SchedClassifier,
    interface: &str,
    direction: Direction,
) -> Result<Made, BpfError> {
    match tc::qdisc_add_clsact(interface) {
        // A qdisc is there: the next lines read which one.
        Err(error) if os_error(&error) != Some(nix::libc::EEXIST) => {
            return Err(attaching_tc(interface, direction, error));
        }
        _ => {}
    }
    if direction == Direction::Out && qdisc(interface)?.as_deref() == Some(INGRESS) {
        return Err(BpfError::NoEgress {
            interface: interface.to_owned(),
        });
    }
    if let Some(kind) = kind_at_our_priority(interface, direction)?.filter(|kind| kind != BPF) {
        return Err(BpfError::PriorityTaken {
            interface: interface.to_owned(),
            direction,
            priority: PRIORITY,
            kind,
        });
    }
    let attach_type = attach_type(direction);
    let failed = |source| attaching(interface, direction, Hook::Clsact, source);
    let old = SchedClassifierLink::attached(interface, attach_type, PRIORITY, HANDLE, None)
        .map_err(|error| attaching_tc(interface, direction, error.into()))?;
    if let Ok(link) = program.attach_to_link(old) {
        // Dropped, it would take the filter off.
        mem::forget(program.take_link(link).map_err(failed)?);
        return Ok(Made::Before);
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

/// Takes the filter of a program of this name off; one that is not there is fine.
pub(super) fn detach(name: &str, interface: &str, direction: Direction) -> Result<(), BpfError> {
    match tc::qdisc_detach_program(interface, attach_type(direction), name) {
        Err(error)
            if !matches!(&error, tc::TcError::IoError(io) if io.kind() == io::ErrorKind::NotFound)
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

/// Whether the program hangs on an interface of the calling thread's network namespace: at our place, and where packets of this
/// direction pass.
///
/// An `ingress` qdisc lists its filters for both directions, so a program of the way out that is listed for the way in does not hang
/// where it should. Only filters of this interface are read: the kernel lists qdiscs of all interfaces or none, and a node has thousands.
pub(super) fn hangs(interface: &str, direction: Direction, program: u32) -> Result<bool, BpfError> {
    let is_listed = |direction| -> Result<bool, BpfError> {
        let filters = filters(interface, direction)?;
        Ok(filters.iter().any(|filter| is_ours(filter, program)))
    };
    Ok(is_listed(direction)? && (direction == Direction::In || !is_listed(Direction::In)?))
}

/// Whether a filter is at our place and runs the program.
fn is_ours(filter: &TcMessage, program: u32) -> bool {
    let ours = TcFilterBpfOption::ProgId(program);
    is_at_our_priority(filter)
        && u32::from(filter.header.handle) == u32::from(HANDLE)
        && options(filter).any(|option| matches!(option, TcOption::Bpf(it) if *it == ours))
}

/// The filters that the kernel asks before the one with this program, if that hangs on an interface of the calling thread's network
/// namespace. It lists them in the order in which it asks them. Those of other chains are asked only where one of these leads there.
pub(super) fn ahead(
    interface: &str,
    direction: Direction,
    program: u32,
) -> Result<Vec<Predecessor>, BpfError> {
    let filters = filters(interface, direction)?;
    let Some(place) = filters.iter().position(|filter| is_ours(filter, program)) else {
        return Ok(Vec::new());
    };
    // Each priority is listed once by itself, without a handle.
    let ahead = filters[..place]
        .iter()
        .filter(|filter| u32::from(filter.header.handle) != 0 && chain(filter) == 0);
    let ahead = ahead.map(|filter| Predecessor::Filter {
        priority: priority(filter),
        kind: kind(filter).unwrap_or_default(),
    });
    let mut ahead: Vec<_> = ahead.collect();
    // Some kinds list their tables beside their filters.
    ahead.dedup();
    Ok(ahead)
}

/// The kind of the filters at our priority, if there are any.
fn kind_at_our_priority(interface: &str, direction: Direction) -> Result<Option<String>, BpfError> {
    let filters = filters(interface, direction)?;
    Ok(filters
        .iter()
        .find(|it| is_at_our_priority(it))
        .and_then(kind))
}

fn is_at_our_priority(filter: &TcMessage) -> bool {
    priority(filter) == PRIORITY
}

/// The upper half of the header's last field (tc(8): `pref`).
fn priority(filter: &TcMessage) -> u16 {
    (filter.header.info >> 16) as u16
}

fn chain(filter: &TcMessage) -> u32 {
    let chain = filter
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            TcAttribute::Chain(chain) => Some(*chain),
            _ => None,
        });
    chain.unwrap_or_default()
}

/// The kind of the qdisc at the place that clsact and `ingress` share. The kernel lists those of all interfaces; the answer to a question for one
/// would also go to every program that follows changes of qdiscs.
fn qdisc(interface: &str) -> Result<Option<String>, BpfError> {
    let Some(message) = message(interface, route::TcHandle::UNSPEC) else {
        return Ok(None);
    };
    let index = message.header.index;
    let found = dump(interface, &RouteNetlinkMessage::GetQueueDiscipline(message))?;
    Ok(found.iter().find_map(|found| match found {
        RouteNetlinkMessage::NewQueueDiscipline(qdisc)
            if qdisc.header.parent == route::TcHandle::CLSACT && qdisc.header.index == index =>
        {
            kind(qdisc)
        }
        _ => None,
    }))
}

/// The filters on an interface in a direction; of an `ingress` qdisc the same in both.
fn filters(interface: &str, direction: Direction) -> Result<Vec<TcMessage>, BpfError> {
    let parent = route::TcHandle {
        major: route::TcHandle::CLSACT.major,
        minor: match direction {
            Direction::In => route::TcHandle::MIN_INGRESS,
            Direction::Out => route::TcHandle::MIN_EGRESS,
        },
    };
    let Some(message) = message(interface, parent) else {
        return Ok(Vec::new());
    };
    let found = dump(interface, &RouteNetlinkMessage::GetTrafficFilter(message))?;
    let filters = found.into_iter().filter_map(|found| match found {
        RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter),
        _ => None,
    });
    Ok(filters.collect())
}

/// A request about a place on an interface, if there is such an interface.
fn message(interface: &str, parent: route::TcHandle) -> Option<TcMessage> {
    let index = if_nametoindex(interface).ok()?;
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = parent;
    Some(message)
}

fn dump(
    interface: &str,
    request: &RouteNetlinkMessage,
) -> Result<Vec<RouteNetlinkMessage>, BpfError> {
    let failed = |source| BpfError::Filters {
        interface: interface.to_owned(),
        source,
    };
    Netlink::open()
        .map_err(failed)?
        .dump(request)
        .map_err(|error| failed(io::Error::other(error)))
}

pub(super) fn kind(message: &TcMessage) -> Option<String> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            TcAttribute::Kind(kind) => Some(kind.clone()),
            _ => None,
        })
}

pub(super) fn options(message: &TcMessage) -> impl Iterator<Item = &TcOption> {
    let options = message
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        });
    options.flatten()
}
