//! Which VXLAN network identifiers are free on this node.
//!
//! The kernel has one table of (VNI, UDP port) for each network namespace and refuses a second link. The pool is therefore kept per
//! node and not per peer. The server picks the VNI; a client on whose node that VNI is taken asks again.
//!
//! Two nodes can serve each other at the same moment. To keep them from picking the same VNI for one pair of addresses, the server
//! takes an even one where the client's address is not above its own, and an odd one otherwise (NSM's rule).
//!
//! The pool holds the VNIs that are in use or in quarantine; its size follows the number of connections.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::{IpAddr, Ipv6Addr},
    time::{Duration, SystemTime},
};

use crate::net::Vni;

/// How long a released VNI is not handed out again: twice NSM's Request timeout of 15 s. By then the Close has reached the peer or has
/// failed, and no packet of the old connection is in flight that could enter the new one.
pub const QUARANTINE: Duration = Duration::from_secs(30);

/// How many VNIs of one parity there are, zero and the odd one out not counted: the bound of a search that finds nothing.
const OF_ONE_PARITY: u32 = Vni::MAX / 2;

/// Why the pool refuses a VNI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VniPoolError {
    /// A connection on this node has it.
    #[error("VNI {0} is in use on this node: ask the peer for another")]
    Taken(Vni),
    /// It is the management VNI.
    #[error(
        "VNI {0} is reserved for management on this node: ask the peer for another, or configure another management VNI"
    )]
    Reserved(Vni),
    /// All of this parity are in use or in quarantine.
    #[error("no {parity} VNI is free: {in_use} are in use, {quarantined} were released less than {} s ago; close connections of this node", QUARANTINE.as_secs())]
    Exhausted {
        /// `even` or `odd`.
        parity: &'static str,
        /// VNIs in use on this node, of both parities.
        in_use: usize,
        /// VNIs in quarantine, of both parities.
        quarantined: usize,
    },
}

/// The VNIs of a node that are in use or in quarantine.
#[derive(Debug, Clone)]
pub struct VniPool {
    management: Vni,
    /// How many VNIs of each parity may be handed out.
    of_one_parity: u32,
    in_use: HashSet<Vni>,
    quarantined: HashMap<Vni, SystemTime>,
    /// `quarantined` in the order of release. It can hold outdated entries: `quarantined` decides.
    releases: VecDeque<(SystemTime, Vni)>,
}

impl Default for VniPool {
    fn default() -> Self {
        Self::new(Vni::MANAGEMENT)
    }
}

impl VniPool {
    /// A pool in which only the management VNI is used.
    #[must_use]
    pub fn new(management: Vni) -> Self {
        Self {
            management,
            of_one_parity: OF_ONE_PARITY,
            in_use: HashSet::new(),
            quarantined: HashMap::new(),
            releases: VecDeque::new(),
        }
    }

    /// A pool of few VNIs, for tests of its exhaustion.
    #[cfg(test)]
    pub(crate) fn small(of_one_parity: u32) -> Self {
        Self {
            of_one_parity,
            ..Self::default()
        }
    }

    /// Picks a VNI for a connection that this node serves and marks it as used. `local` is this node's tunnel address, `remote` the
    /// client's. `random` is asked once; it makes the choice hard to foresee and spreads it.
    ///
    /// # Errors
    /// [`VniPoolError::Exhausted`] when none of the parity is free.
    pub fn allocate(
        &mut self,
        local: IpAddr,
        remote: IpAddr,
        now: SystemTime,
        mut random: impl FnMut() -> u32,
    ) -> Result<Vni, VniPoolError> {
        self.end_quarantines(now);
        let even = is_even(local, remote);
        let start = random() % self.of_one_parity;
        // Only a VNI of the pool or the management VNI costs another step, so the walk is at most as long as the pool.
        let walk = (0..self.of_one_parity).map(|step| (start + step) % self.of_one_parity);
        let found = walk
            .filter_map(|n| Vni::try_from(2 * n + if even { 2 } else { 1 }).ok())
            .find(|vni| self.is_free(*vni));
        match found {
            Some(vni) => {
                self.in_use.insert(vni);
                Ok(vni)
            }
            None => Err(VniPoolError::Exhausted {
                parity: if even { "even" } else { "odd" },
                in_use: self.in_use.len(),
                quarantined: self.quarantined.len(),
            }),
        }
    }

    /// Marks a VNI that the peer picked as used.
    ///
    /// One in quarantine may be claimed: its link is gone, the peer chose it and has checked its own side, and a Request that is repeated after
    /// a failure gets the same VNI from the peer again.
    ///
    /// # Errors
    /// [`VniPoolError::Taken`] when a connection of this node has it, [`VniPoolError::Reserved`] for the management VNI.
    pub fn claim(&mut self, vni: Vni, now: SystemTime) -> Result<(), VniPoolError> {
        self.end_quarantines(now);
        if vni == self.management {
            return Err(VniPoolError::Reserved(vni));
        }
        if !self.in_use.insert(vni) {
            return Err(VniPoolError::Taken(vni));
        }
        self.quarantined.remove(&vni);
        Ok(())
    }

    /// Marks a VNI as used again that an earlier agent of this node chose: the client's end of the tunnel exists, and ours may. A VNI
    /// of the other parity is refused: both nodes could choose it at the same moment.
    ///
    /// # Errors
    /// As [`Self::claim`]; [`VniPoolError::Taken`] too when it is of the wrong parity.
    pub fn reclaim(
        &mut self,
        vni: Vni,
        local: IpAddr,
        remote: IpAddr,
        now: SystemTime,
    ) -> Result<(), VniPoolError> {
        if is_even(local, remote) != vni.get().is_multiple_of(2) {
            return Err(VniPoolError::Taken(vni));
        }
        self.claim(vni, now)
    }

    /// Gives a VNI back. A VNI that is not in use is left as it is, so a second call does no harm.
    pub fn release(&mut self, vni: Vni, now: SystemTime) {
        self.end_quarantines(now);
        if self.in_use.remove(&vni) {
            self.quarantined.insert(vni, now);
            self.releases.push_back((now, vni));
        }
    }

    /// Whether a VNI is in quarantine: packets of the connection that had it may still be in flight.
    pub fn is_quarantined(&mut self, vni: Vni, now: SystemTime) -> bool {
        self.end_quarantines(now);
        self.quarantined.contains_key(&vni)
    }

    /// How many VNIs are in use, the management VNI not counted.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.in_use.len()
    }

    fn is_free(&self, vni: Vni) -> bool {
        vni != self.management
            && !self.in_use.contains(&vni)
            && !self.quarantined.contains_key(&vni)
    }

    fn end_quarantines(&mut self, now: SystemTime) {
        while let Some(&(released, vni)) = self.releases.front() {
            // A release in the future means that the clock was set back; it must not hold VNIs for as long as that.
            let over = now
                .duration_since(released)
                .map_or(true, |age| age >= QUARANTINE);
            if !over {
                break;
            }
            self.releases.pop_front();
            if self.quarantined.get(&vni) == Some(&released) {
                self.quarantined.remove(&vni);
            }
        }
    }
}

/// Whether the server at `local` takes even VNIs for a client at `remote`.
fn is_even(local: IpAddr, remote: IpAddr) -> bool {
    mapped(remote) <= mapped(local)
}

/// One order for both families: IPv4 as IPv6 has it mapped, as NSM compares them.
fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}
