//! The creation of a link of ours on the node.
//!
//! Each gets an interface index that no other link of the namespace has had: programs and their maps name links by index, and a link can go
//! at any moment, with its pod. The kernel gives a device that is moved into the namespace the index that it had before, where that is
//! free, so the indexes of the kernel's own choice come again. Those here are counted up, in a range where the kernel gives none.

use std::sync::atomic::{AtomicU32, Ordering};

use nix::{
    errno::Errno,
    time::{ClockId, clock_gettime},
};
use nsm_core::{
    link::{LinkAlias, NodeLink},
    net::IfName,
};
use rtnetlink::LinkUnspec;

use super::{
    LinkError,
    basics::{delete, disable_ipv6},
    message, observe,
};
use crate::netlink::{Netlink, NetlinkError, Refusal, Request};

/// The lowest index of ours; indexes have 31 bits.
const LOWEST: u32 = 1 << 30;

/// How many indexes are tried: another agent of the namespace may count where this one does.
const ATTEMPTS: usize = 64;

/// The number of the last index. It is never behind the tenths of a second since the start of the machine, so an agent that is started
/// again goes on behind what was used, unless ten links a second and more were made all the time. The maps are cleaned of what is gone
/// before an agent makes its first link.
static LAST: AtomicU32 = AtomicU32::new(0);

fn next_index() -> u32 {
    let tenths = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        u32::try_from(time.tv_sec() * 10 + time.tv_nsec() / 100_000_000).unwrap_or_default()
    });
    let next = |last: u32| last.max(tenths).wrapping_add(1);
    let (Ok(last) | Err(last)) = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| {
        Some(next(last))
    });
    LOWEST + next(last) % LOWEST
}

/// What the kernel refused of a creation. Nothing of the link is left.
#[derive(Debug)]
pub(super) enum Refused {
    /// To make it.
    Creation(Refusal),
    /// To take it up.
    Up(Refusal),
    /// Anything else.
    Other(LinkError),
}

/// Makes a link of the node's namespace, where `netlink` and the calling thread are: marked as ours, without IPv6, up.
///
/// Creation and alias are one call of the kernel: a killed agent leaves a link that is known to be ours, or none.
pub(super) fn create(
    netlink: &mut Netlink,
    name: &IfName,
    alias: &LinkAlias,
    creation: impl Fn(u32) -> Request,
) -> Result<Result<NodeLink, Refused>, NetlinkError> {
    let text = name.as_str();
    let mut attempts = 0;
    let marked = loop {
        let index = next_index();
        let requests = vec![
            creation(index),
            message::set_alias_at(index, &alias.to_string()),
            message::no_addresses(LinkUnspec::new_with_index(index)),
        ];
        let mut answers = netlink.transact(requests)?.into_iter();
        let mut next = || answers.next().unwrap_or_else(|| Ok(Vec::new()));
        match next() {
            Ok(_) => break next(),
            Err(kernel) if kernel.errno == Errno::EEXIST && attempts < ATTEMPTS => {
                // Of the index, or of the name.
                let (request, flags) = message::get_link(index);
                if netlink.ask(request, flags)?.is_err() {
                    return Ok(Err(Refused::Creation(kernel)));
                }
                attempts += 1;
            }
            Err(kernel) => return Ok(Err(Refused::Creation(kernel))),
        }
    };
    disable_ipv6(name);
    let requests = vec![message::set_up_named(text), message::get_link_named(text)];
    let mut answers = netlink.transact(requests)?.into_iter();
    let mut next = || answers.next().unwrap_or_else(|| Ok(Vec::new()));
    let (taken_up, shown) = (next(), next());
    let completed = marked
        .map_err(|kernel| other(name, "mark as ours", kernel))
        .and_then(|_| taken_up.map_err(Refused::Up))
        .and_then(|_| shown.map_err(|kernel| other(name, "look at", kernel)))
        .and_then(|shown| {
            let link = shown.iter().find_map(observe::node_link_of);
            link.ok_or_else(|| Refused::Other(not_shown(name)))
        });
    if completed.is_err()
        && let Err(error) = delete(netlink, message::delete_link_named(text), text)
    {
        tracing::error!(%error, interface = text, "a link that could not be completed stays");
    }
    Ok(completed)
}

fn other(name: &IfName, action: &str, kernel: Refusal) -> Refused {
    Refused::Other(LinkError::refused(
        format!("{action} link `{name}`"),
        kernel,
    ))
}

pub(super) fn not_shown(name: &IfName) -> LinkError {
    NetlinkError::Malformed(format!("link `{name}` is not shown with its attributes")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_comes_once() {
        let (first, second) = (next_index(), next_index());
        assert!(LOWEST < first && first < second, "{first} {second}");
        assert!(i32::try_from(second).is_ok());
    }
}
