//! How what the agent has is shared out among its callers: connections, streams, memory and so on.
//!
//! | rank | who | may hold |
//! |---|---|---|
//! | own | administrators of the node, the NSMgr on the forwarder's socket, addresses in `relay_for` | what there is |
//! | node | everybody else on the node | three quarters of it, and with the network seven eighths |
//! | network | everybody else | likewise |
//!
//! A holder that is not our own has a limit for itself, too. The last quarter of what a rank may have is for those that hold little: the
//! first few to come cannot take what the others need. Hosts of the network count together there with their neighbours, an IPv4 network of
//! 24 bits or an IPv6 network of 48: who has one of these has all its addresses.

use std::{collections::HashMap, hash::Hash, net::IpAddr};

use super::{
    Caller, NetnsCookie, Owner, Transport,
    relay::{Relays, Source},
};

/// The part of everything that a holder gets also of the last quarter.
const LITTLE: usize = 64;

/// What comes before what when there is little.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rank {
    /// The node's own systems, and our domain's.
    Own,
    /// A process of the node.
    Node,
    /// A host of the network.
    Network,
}

/// Who holds something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Holder {
    owner: Owner,
    rank: Rank,
}

impl Holder {
    /// The caller of a call.
    #[must_use]
    pub fn of(caller: &Caller, relays: &Relays) -> Self {
        match caller.transport {
            Transport::Forwarder(_) => Self::our_own(),
            Transport::Tcp(address) => Self::at(address, relays),
            Transport::Unix(process) => Self {
                owner: caller.owner(),
                rank: if process.is_administrator {
                    Rank::Own
                } else {
                    Rank::Node
                },
            },
        }
    }

    /// Our own systems where they need no distinction, as the NSMgr that our forwarder works for.
    #[must_use]
    pub const fn our_own() -> Self {
        Self {
            owner: Owner::Nsmgr,
            rank: Rank::Own,
        }
    }

    /// A process of the node of which no more is read than its socket shows.
    #[must_use]
    pub const fn process(user: Option<u32>, home: Option<NetnsCookie>) -> Self {
        Self {
            owner: Owner::Process {
                user,
                namespace: None,
                home,
            },
            rank: Rank::Node,
        }
    }

    /// The network whose addresses are taken to be one party's; none of a process, and of a host without an address.
    fn neighbours(&self) -> Option<IpAddr> {
        match self.owner {
            Owner::Network(address) => address.map(neighbours),
            _ => None,
        }
    }

    /// Its rank.
    #[must_use]
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// A host of the network.
    #[must_use]
    pub fn at(address: Option<IpAddr>, relays: &Relays) -> Self {
        let rank = if relays.is_stranger(Source::Network(address)) {
            Rank::Network
        } else {
            Rank::Own
        };
        Self {
            owner: Owner::Network(address.map(site)),
            rank,
        }
    }
}

/// An address as it counts: every host of an IPv6 network has 2^64 addresses and chooses among them.
fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// The network of an address that providers give to one customer: an IPv4 network of 24 bits, or an IPv6 site of 48 (RFC 6177).
fn neighbours(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() >> 8 << 8).into()),
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 80 << 80).into()),
    }
}

/// How much of something there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// For all holders together.
    pub all: usize,
    /// For one holder that is not our own.
    pub of_one: usize,
}

/// Why a holder gets no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoShare {
    /// It has as much as one may have.
    OfOne,
    /// The rest is kept for others.
    Reserved,
    /// There is no more.
    All,
}

/// Who holds how much of something.
#[derive(Debug, Default)]
pub struct Shares {
    of_one: HashMap<Holder, usize>,
    /// By network of neighbours.
    of_neighbours: HashMap<IpAddr, usize>,
    own: usize,
    node: usize,
    network: usize,
}

impl Shares {
    /// Gives `amount` to a holder.
    ///
    /// # Errors
    /// The limit that forbids it. Nothing is given then.
    pub fn take(&mut self, holder: Holder, amount: usize, limit: Limit) -> Result<(), NoShare> {
        if amount > limit.all.saturating_sub(self.all()) {
            return Err(NoShare::All);
        }
        if holder.rank != Rank::Own {
            let held = self.of(holder).saturating_add(amount);
            if held > limit.of_one {
                return Err(NoShare::OfOne);
            }
            let near = holder
                .neighbours()
                .and_then(|it| self.of_neighbours.get(&it));
            // What a holder has is among what its neighbours have.
            let counted = near.map_or(held, |near| near.saturating_add(amount));
            let is_little = counted <= (limit.all / LITTLE).max(1);
            if !self.has_room(holder.rank, amount, limit.all, is_little) {
                return Err(NoShare::Reserved);
            }
        }
        *self.of_one.entry(holder).or_default() += amount;
        if let Some(neighbours) = holder.neighbours() {
            *self.of_neighbours.entry(neighbours).or_default() += amount;
        }
        *self.of_rank(holder.rank) += amount;
        Ok(())
    }

    /// Takes `amount` back from a holder, which has it.
    pub fn give_back(&mut self, holder: Holder, amount: usize) {
        *self.of_rank(holder.rank) -= amount;
        reduce(&mut self.of_one, &holder, amount);
        if let Some(neighbours) = holder.neighbours() {
            reduce(&mut self.of_neighbours, &neighbours, amount);
        }
    }

    /// How much one holder has.
    #[must_use]
    pub fn of(&self, holder: Holder) -> usize {
        self.of_one.get(&holder).copied().unwrap_or_default()
    }

    /// How much all have.
    #[must_use]
    pub const fn all(&self) -> usize {
        self.own + self.node + self.network
    }

    /// How many have some.
    #[must_use]
    pub fn holders(&self) -> usize {
        self.of_one.len()
    }

    /// Whether strangers may have so much more.
    fn has_room(&self, rank: Rank, amount: usize, all: usize, is_little: bool) -> bool {
        let most = all - all / 4;
        let most = if is_little { most } else { most - most / 4 };
        self.all() + amount <= all - all / 8 && self.had_by(rank) + amount <= most
    }

    const fn had_by(&self, rank: Rank) -> usize {
        match rank {
            Rank::Own => self.own,
            Rank::Node => self.node,
            Rank::Network => self.network,
        }
    }

    const fn of_rank(&mut self, rank: Rank) -> &mut usize {
        match rank {
            Rank::Own => &mut self.own,
            Rank::Node => &mut self.node,
            Rank::Network => &mut self.network,
        }
    }
}

/// Takes `amount` off; what has nothing left is forgotten.
fn reduce<K: Eq + Hash>(held: &mut HashMap<K, usize>, whose: &K, amount: usize) {
    if let Some(left) = held.get_mut(whose) {
        *left -= amount;
        if *left == 0 {
            held.remove(whose);
        }
    }
}
