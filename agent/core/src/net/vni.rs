//! VXLAN network identifiers, and which of them this node may still use.
//!
//! A VNI and UDP port exist once on a node, whatever the peer (design.md section 4): the kernel refuses a second link. The pool is
//! therefore kept per node, not per peer. The side that serves picks the VNI; the side that asked can find it taken and asks again.
//!
//! Two nodes can serve each other at the same moment. So that they do not pick the same VNI for one pair of addresses, the server
//! takes an even one where the client's address is not above its own, and an odd one otherwise (NSM's rule).
//!
//! The pool holds what is used or was used a moment ago; its size follows the number of connections.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
    time::{Duration, SystemTime},
};

/// How long a released VNI is not handed out again: twice NSM's Request timeout of 15 s. By then the Close has reached the peer or has
/// failed, and no packet of the old connection is under way that the new one could take for its own.
pub const QUARANTINE: Duration = Duration::from_secs(30);

/// How many VNIs of one parity there are, zero and the odd one out not counted: the bound of a search that finds nothing.
const OF_ONE_PARITY: u32 = Vni::MAX / 2;

/// Why there is no such VNI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VniError {
    /// The number does not fit 24 bits, or is zero.
    #[error("VNI {0} is out of range: a VNI is 1 to {max} (RFC 7348: 24 bits, and 0 is not used)", max = Vni::MAX)]
    OutOfRange(u64),
    /// The text is no number.
    #[error("VNI `{0}` is no number: a VNI is a decimal number from 1 to {max}", max = Vni::MAX)]
    NotANumber(String),
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

/// A VXLAN network identifier, 1 to 16,777,215.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// The largest VNI.
    pub const MAX: u32 = 0xff_ffff;

    /// The default management VNI (RFC 8971 section 3).
    pub const MANAGEMENT: Self = Self(1);

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = VniError;

    fn try_from(number: u32) -> Result<Self, VniError> {
        if (1..=Self::MAX).contains(&number) {
            Ok(Self(number))
        } else {
            Err(VniError::OutOfRange(number.into()))
        }
    }
}

impl FromStr for Vni {
    type Err = VniError;

    fn from_str(text: &str) -> Result<Self, VniError> {
        // `parse` alone would take a sign.
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(VniError::NotANumber(text.to_owned()));
        }
        let number = text
            .parse::<u64>()
            .map_err(|_| VniError::NotANumber(text.to_owned()))?;
        u32::try_from(number)
            .map_err(|_| VniError::OutOfRange(number))?
            .try_into()
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The VNIs of a node that are in use, and those that were a moment ago.
#[derive(Debug, Clone)]
pub struct VniPool {
    management: Vni,
    /// How many VNIs of each parity may be handed out.
    of_one_parity: u32,
    in_use: HashSet<Vni>,
    quarantined: HashMap<Vni, SystemTime>,
    /// `quarantined` in the order of release. Can hold entries that are no longer true: `quarantined` decides.
    releases: VecDeque<(SystemTime, Vni)>,
}

impl Default for VniPool {
    fn default() -> Self {
        Self::new(Vni::MANAGEMENT)
    }
}

impl VniPool {
    /// A pool in which nothing is used but the management VNI.
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

    /// A pool that is soon exhausted.
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
    /// [`VniError::Exhausted`] when none of the parity is free.
    pub fn allocate(
        &mut self,
        local: IpAddr,
        remote: IpAddr,
        now: SystemTime,
        mut random: impl FnMut() -> u32,
    ) -> Result<Vni, VniError> {
        self.end_quarantines(now);
        let even = is_even(local, remote);
        let start = random() % self.of_one_parity;
        // Each step that fails meets a VNI of the pool or the management VNI, so the walk is as short as the pool is small.
        let walk = (0..self.of_one_parity).map(|step| (start + step) % self.of_one_parity);
        let found = walk
            .map(|n| Vni(2 * n + if even { 2 } else { 1 }))
            .find(|vni| self.is_free(*vni));
        match found {
            Some(vni) => {
                self.in_use.insert(vni);
                Ok(vni)
            }
            None => Err(VniError::Exhausted {
                parity: if even { "even" } else { "odd" },
                in_use: self.in_use.len(),
                quarantined: self.quarantined.len(),
            }),
        }
    }

    /// Marks a VNI that the peer picked as used.
    ///
    /// One in quarantine may be claimed: the link that had it is gone, the peer chose it with knowledge of its own side, and a Request
    /// that is repeated after a failure gets the same VNI from the peer again.
    ///
    /// # Errors
    /// [`VniError::Taken`] when a connection of this node has it, [`VniError::Reserved`] for the management VNI.
    pub fn claim(&mut self, vni: Vni, now: SystemTime) -> Result<(), VniError> {
        self.end_quarantines(now);
        if vni == self.management {
            return Err(VniError::Reserved(vni));
        }
        if !self.in_use.insert(vni) {
            return Err(VniError::Taken(vni));
        }
        self.quarantined.remove(&vni);
        Ok(())
    }

    /// Marks a VNI as used again that the client has from an earlier life of this node's agent: its end of the tunnel stands, and ours
    /// may. One that this node would not have chosen for the two addresses is not taken: both could choose it at the same moment.
    ///
    /// # Errors
    /// As [`Self::claim`]; [`VniError::Taken`] too when it is of the wrong parity.
    pub fn reclaim(
        &mut self,
        vni: Vni,
        local: IpAddr,
        remote: IpAddr,
        now: SystemTime,
    ) -> Result<(), VniError> {
        if is_even(local, remote) != vni.0.is_multiple_of(2) {
            return Err(VniError::Taken(vni));
        }
        self.claim(vni, now)
    }

    /// Gives a VNI back. One that is not in use stays as it is, so that this can be called again.
    pub fn release(&mut self, vni: Vni, now: SystemTime) {
        self.end_quarantines(now);
        if self.in_use.remove(&vni) {
            self.quarantined.insert(vni, now);
            self.releases.push_back((now, vni));
        }
    }

    /// Whether a VNI was released a moment ago: packets of the connection that had it may still be under way.
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
