//! Who may use this agent to reach others: which callers of the network, and which addresses are dialled for them.
//!
//! A domain answers for its own names. A caller of the network that could name any domain would send Requests through us, and find out
//! what listens behind our addresses. Callers on this node may relay: they are its clients.

use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

use crate::net::special::of_address;

/// Where a call comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A socket of this node.
    Node,
    /// The network: the caller's address, where the transport has one.
    Network(Option<IpAddr>),
    /// A caller of the network that has proved its id. What it may ask for is decided by that, in
    /// [`Access::check_caller`](super::access::Access::check_caller), and its address plays no part.
    Proven {
        /// Whether it is of our own trust domain.
        is_own: bool,
    },
}

/// The callers of the network that the configuration names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Relays {
    /// Ranges whose hosts are of our domain: they may ask for names of others, and register.
    pub relay_for: Vec<IpNet>,
    /// Ranges whose hosts may register; empty: all may.
    pub registrants: Vec<IpNet>,
}

/// Why a call is not for this agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NotServed {
    /// Names of other domains are asked for by our own systems only.
    #[error("the caller asks for a name of another domain and is not in `relay_for`")]
    Relay,
    /// Registrations come from our own systems only.
    #[error("the caller registers an entry and is neither in `registrants` nor in `relay_for`")]
    Registrant,
}

impl Relays {
    /// Whether the caller may ask for names of other domains.
    ///
    /// # Errors
    /// It may not.
    pub fn check_relay(&self, source: Source) -> Result<(), NotServed> {
        if is_proven(source) || is_from(source, &self.relay_for) {
            return Ok(());
        }
        Err(NotServed::Relay)
    }

    /// Whether the caller may register names of our own domain.
    ///
    /// # Errors
    /// It may not.
    pub fn check_registrant(&self, source: Source) -> Result<(), NotServed> {
        let is_open = is_proven(source) || self.registrants.is_empty();
        if is_open || is_from(source, &self.registrants) || is_from(source, &self.relay_for) {
            return Ok(());
        }
        Err(NotServed::Registrant)
    }

    /// Whether the caller is none of our own: it gets no reasons that describe what lies behind us.
    #[must_use]
    pub fn is_stranger(&self, source: Source) -> bool {
        !is_from(source, &self.relay_for)
    }
}

const fn is_proven(source: Source) -> bool {
    matches!(source, Source::Proven { .. })
}

fn is_from(source: Source, ranges: &[IpNet]) -> bool {
    match source {
        Source::Node => true,
        Source::Proven { is_own } => is_own,
        Source::Network(None) => false,
        Source::Network(Some(address)) => {
            let address = address.to_canonical();
            ranges.iter().any(|range| range.contains(&address))
        }
    }
}

/// Why an address is not dialled.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{address} is {what}, which is dialled only where `dial_inside` or the configured URLs and hosts name it"
)]
pub struct Undialable {
    /// The address.
    pub address: IpAddr,
    /// What it is.
    pub what: &'static str,
}

/// Decides whether an address that another party named is dialled: by DNS, by a registry, or in a name. `is_own`: it is an address of
/// this node.
///
/// # Errors
/// It would lead back into this node or its links.
pub fn check_dial(address: IpAddr, is_own: bool, dial_inside: &[IpNet]) -> Result<(), Undialable> {
    let address = address.to_canonical();
    let what = match of_address(address) {
        Some(special) => special.as_str(),
        None if is_own => "an address of this node",
        None => return Ok(()),
    };
    if dial_inside.iter().any(|range| range.contains(&address)) {
        return Ok(());
    }
    Err(Undialable { address, what })
}
