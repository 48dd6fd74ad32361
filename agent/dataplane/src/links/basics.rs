//! What every call that changes links needs: a socket in a namespace, and the removal of a link.

use nix::errno::Errno;

use super::LinkError;
use crate::{
    netlink::{Netlink, Refusal, Request},
    netns::Netns,
};

/// A socket in the namespace. The calling thread stays there.
pub(super) fn open_in(netns: &Netns) -> Result<Netlink, LinkError> {
    netns.enter()?;
    Ok(Netlink::open()?)
}

/// Deletes a link; a success when it is gone already.
pub(super) fn delete(
    netlink: &mut Netlink,
    (request, flags): Request,
    name: &str,
) -> Result<(), LinkError> {
    match netlink.ask(request, flags)? {
        Ok(_)
        | Err(Refusal {
            errno: Errno::ENODEV,
            ..
        }) => Ok(()),
        Err(kernel) => Err(LinkError::refused(format!("delete link `{name}`"), kernel)),
    }
}
