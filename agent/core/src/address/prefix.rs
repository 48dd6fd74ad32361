//! Addresses for point-to-point connections, out of an endpoint's prefixes.
//!
//! Each connection gets two host addresses of one prefix: `dst` for the endpoint and `src` for the client, the lowest that are free
//! (NSM's `point2pointipam`). Where a prefix has addresses that mean more than one host, they are left out: network and broadcast of an
//! IPv4 prefix up to /30, the subnet-router anycast address of an IPv6 prefix up to /126 (RFC 4291 section 2.6.1). In /31 and /127 both
//! addresses are hosts (RFC 3021, RFC 6164).
//!
//! Free addresses are held as ranges, so a /64 costs no more than a /24.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

/// Why there are no addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// No prefix at all.
    #[error("no prefix is configured: give one such as 172.16.1.0/24")]
    Empty,
    /// A prefix with one address.
    #[error(
        "prefix {0} has no two addresses: a connection needs one for the client and one for the endpoint, give a shorter prefix"
    )]
    TooSmall(IpNet),
    /// Two prefixes with addresses in common.
    #[error("prefixes {first} and {second} overlap: remove one")]
    Overlap {
        /// The prefix that came first.
        first: IpNet,
        /// The prefix that came second.
        second: IpNet,
    },
    /// All addresses are in use or excluded.
    #[error(
        "no two addresses are free in {}: {in_use} connections use it and {excluded} prefixes are excluded by the client; close connections or give the endpoint another prefix",
        list(.prefixes)
    )]
    Exhausted {
        /// The endpoint's prefixes.
        prefixes: Vec<IpNet>,
        /// Connections with addresses.
        in_use: usize,
        /// How many prefixes the client excluded.
        excluded: usize,
    },
    /// Not a pair of host addresses of one prefix.
    #[error("{} and {} are no two host addresses of one prefix of {}", .pair.src, .pair.dst, list(.prefixes))]
    NotOurs {
        /// The pair.
        pair: Pair,
        /// The endpoint's prefixes.
        prefixes: Vec<IpNet>,
    },
    /// An address of the pair is another connection's.
    #[error("{} and {} cannot be had again: one of them is in use", .0.src, .0.dst)]
    Taken(Pair),
}

fn list(prefixes: &[IpNet]) -> String {
    prefixes
        .iter()
        .map(IpNet::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// The addresses of a connection, each as /32 or /128.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pair {
    /// The client's.
    pub src: IpNet,
    /// The endpoint's.
    pub dst: IpNet,
}

impl Pair {
    /// Whether one of the addresses is excluded, so that a refresh must get others.
    #[must_use]
    pub fn is_excluded(&self, excluded: &[IpNet]) -> bool {
        excluded
            .iter()
            .any(|net| net.contains(&self.src.addr()) || net.contains(&self.dst.addr()))
    }
}

/// A prefix with its free addresses as ranges, first to last.
#[derive(Debug, Clone)]
struct Block {
    net: IpNet,
    free: BTreeMap<u128, u128>,
}

/// The addresses of an endpoint's prefixes.
#[derive(Debug, Clone)]
pub struct PrefixPool {
    blocks: Vec<Block>,
    /// The pairs in use, client's address to endpoint's.
    pairs: HashMap<IpAddr, IpAddr>,
}

impl PrefixPool {
    /// A pool in which every host address is free. Prefixes are used in the order given.
    ///
    /// # Errors
    /// No prefix, one without two addresses, or two that overlap.
    pub fn new(cidr: Vec<IpNet>) -> Result<Self, PrefixError> {
        if cidr.is_empty() {
            return Err(PrefixError::Empty);
        }
        let mut blocks: Vec<Block> = Vec::with_capacity(cidr.len());
        for net in cidr.iter().map(IpNet::trunc) {
            if net.prefix_len() == net.max_prefix_len() {
                return Err(PrefixError::TooSmall(net));
            }
            if let Some(first) = blocks
                .iter()
                .map(|block| block.net)
                .find(|first| first.contains(&net) || net.contains(first))
            {
                return Err(PrefixError::Overlap { first, second: net });
            }
            blocks.push(Block {
                net,
                free: BTreeMap::from([hosts(net)]),
            });
        }
        Ok(Self {
            blocks,
            pairs: HashMap::new(),
        })
    }

    /// Takes the two lowest addresses of the first prefix that has two which are neither in use nor excluded.
    ///
    /// # Errors
    /// [`PrefixError::Exhausted`] when no prefix has.
    pub fn allocate(&mut self, excluded: &[IpNet]) -> Result<Pair, PrefixError> {
        for block in &mut self.blocks {
            let walls = walls(block.net, excluded);
            let mut free = Hosts {
                free: &block.free,
                walls: &walls,
                next: Some(0),
            };
            if let (Some(dst), Some(src)) = (free.next(), free.next()) {
                block.take(dst);
                block.take(src);
                let (src, dst) = (block.address(src), block.address(dst));
                self.pairs.insert(src, dst);
                return Ok(Pair {
                    src: src.into(),
                    dst: dst.into(),
                });
            }
        }
        Err(PrefixError::Exhausted {
            prefixes: self.prefixes(),
            in_use: self.pairs.len(),
            excluded: excluded.len(),
        })
    }

    /// Takes a pair that a connection had before, as a refresh after a restart names it.
    ///
    /// # Errors
    /// The pair is not of this pool, or in use.
    pub fn reserve(&mut self, pair: Pair) -> Result<(), PrefixError> {
        let (src, dst) = (pair.src.addr(), pair.dst.addr());
        let is_host = |net: IpNet| net.prefix_len() == net.max_prefix_len();
        let block = self
            .blocks
            .iter_mut()
            .find(|block| block.has_host(src) && block.has_host(dst));
        let Some(block) = block.filter(|_| is_host(pair.src) && is_host(pair.dst) && src != dst)
        else {
            return Err(PrefixError::NotOurs {
                pair,
                prefixes: self.prefixes(),
            });
        };
        if !(block.is_free(number(src)) && block.is_free(number(dst))) {
            return Err(PrefixError::Taken(pair));
        }
        block.take(number(src));
        block.take(number(dst));
        self.pairs.insert(src, dst);
        Ok(())
    }

    /// Gives a pair back. One that is not in use stays as it is, so that this can be called again.
    pub fn release(&mut self, pair: &Pair) {
        let (src, dst) = (pair.src.addr(), pair.dst.addr());
        if self.pairs.get(&src) != Some(&dst) {
            return;
        }
        self.pairs.remove(&src);
        if let Some(block) = self
            .blocks
            .iter_mut()
            .find(|block| block.net.contains(&src))
        {
            block.give(number(src));
            block.give(number(dst));
        }
    }

    /// How many pairs are in use.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.pairs.len()
    }

    fn prefixes(&self) -> Vec<IpNet> {
        self.blocks.iter().map(|block| block.net).collect()
    }
}

impl Block {
    fn address(&self, number: u128) -> IpAddr {
        match self.net {
            IpNet::V4(_) => Ipv4Addr::from(
                u32::try_from(number).expect("the hosts of an IPv4 prefix have 32 bits"),
            )
            .into(),
            IpNet::V6(_) => Ipv6Addr::from(number).into(),
        }
    }

    fn has_host(&self, address: IpAddr) -> bool {
        let (first, last) = hosts(self.net);
        self.net.contains(&address) && (first..=last).contains(&number(address))
    }

    fn is_free(&self, number: u128) -> bool {
        self.range_of(number).is_some()
    }

    fn range_of(&self, number: u128) -> Option<(u128, u128)> {
        self.free
            .range(..=number)
            .next_back()
            .map(|(&first, &last)| (first, last))
            .filter(|(_, last)| *last >= number)
    }

    /// Cuts a free address out of its range.
    fn take(&mut self, number: u128) {
        let Some((first, last)) = self.range_of(number) else {
            return;
        };
        self.free.remove(&first);
        if first < number {
            self.free.insert(first, number - 1);
        }
        if number < last {
            self.free.insert(number + 1, last);
        }
    }

    /// Puts an address back that is in use, and joins it with its neighbours.
    fn give(&mut self, number: u128) {
        let below = number.checked_sub(1).and_then(|below| self.range_of(below));
        let above = number.checked_add(1).and_then(|above| self.range_of(above));
        if let Some((first, _)) = above {
            self.free.remove(&first);
        }
        self.free.insert(
            below.map_or(number, |range| range.0),
            above.map_or(number, |range| range.1),
        );
    }
}

/// Free addresses in rising order, those behind walls left out.
struct Hosts<'a> {
    free: &'a BTreeMap<u128, u128>,
    walls: &'a [(u128, u128)],
    /// The lowest address not looked at yet; none behind the last of all.
    next: Option<u128>,
}

impl Iterator for Hosts<'_> {
    type Item = u128;

    fn next(&mut self) -> Option<u128> {
        loop {
            let from = self.next?;
            // The range that `from` lies in, else the one above it.
            let within = self
                .free
                .range(..=from)
                .next_back()
                .filter(|(_, last)| **last >= from);
            let (&first, _) = within.or_else(|| self.free.range(from..).next())?;
            let candidate = first.max(from);
            let wall = self.walls.partition_point(|(_, last)| *last < candidate);
            if let Some((_, last)) = self
                .walls
                .get(wall)
                .filter(|(first, _)| *first <= candidate)
            {
                self.next = last.checked_add(1);
            } else {
                self.next = candidate.checked_add(1);
                return Some(candidate);
            }
        }
    }
}

/// The excluded prefixes that touch a prefix, as ranges that are sorted and apart from each other.
fn walls(net: IpNet, excluded: &[IpNet]) -> Vec<(u128, u128)> {
    let touching = excluded
        .iter()
        .filter(|other| net.contains(*other) || other.contains(&net));
    let mut ranges: Vec<_> = touching
        .map(|other| (number(other.network()), number(other.broadcast())))
        .collect();
    ranges.sort_unstable();
    let mut walls: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match walls.last_mut() {
            // Prefixes either hold each other or are apart.
            Some(wall) if first <= wall.1 => wall.1 = wall.1.max(last),
            _ => walls.push((first, last)),
        }
    }
    walls
}

/// The first and last address of a prefix that one host can have.
fn hosts(net: IpNet) -> (u128, u128) {
    let (first, last) = (number(net.network()), number(net.broadcast()));
    match net {
        _ if net.max_prefix_len() - net.prefix_len() <= 1 => (first, last),
        IpNet::V4(_) => (first + 1, last - 1),
        IpNet::V6(_) => (first + 1, last),
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}
