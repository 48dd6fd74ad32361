//! Which addresses a connection gets.
//!
//! One pair of each family that the endpoint has prefixes of: the client's address and this end's
//! (NSM's `point2pointipam`, which gives one pair in all). A pair stays with its connection over
//! refreshes until the client excludes it. A connection that comes with addresses of ours, which
//! we do not know of, had them before we were restarted: it gets them again where they are free.

use std::net::AddrParseError;

use ipnet::IpNet;
use nsm_core::address::prefix::{Pair, PrefixError, PrefixPool};
use nsm_proto::connectioncontext::{IpContext, Route};

/// Why a connection gets no addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AddressError {
    /// A prefix that the client excludes is none.
    #[error("excluded_prefixes: {0:?} is no prefix: write one such as 172.16.0.0/16")]
    BadExclusion(String),
    /// None are left.
    #[error(transparent)]
    Pool(#[from] PrefixError),
}

/// The addresses of the endpoint.
#[derive(Debug)]
pub(crate) struct Addresses {
    /// One pool a family.
    pools: Vec<PrefixPool>,
}

/// The pairs of one connection, one for each pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease(Vec<Pair>);

impl Addresses {
    /// All addresses of `prefixes`, each free.
    ///
    /// # Errors
    ///
    /// No prefix, one too small for a pair, or two that overlap.
    pub(crate) fn new(prefixes: &[IpNet]) -> Result<Self, PrefixError> {
        let (v4, v6): (Vec<_>, Vec<_>) = prefixes
            .iter()
            .partition(|prefix| matches!(prefix, IpNet::V4(_)));
        let pools = [v4, v6]
            .into_iter()
            .filter(|family| !family.is_empty())
            .map(PrefixPool::new)
            .collect::<Result<Vec<_>, _>>()?;
        if pools.is_empty() {
            return Err(PrefixError::Empty);
        }
        Ok(Self { pools })
    }

    /// Gives a connection its addresses and writes them into its context. `held` is what it has.
    ///
    /// # Errors
    ///
    /// A bad exclusion, or no addresses left. Nothing is changed then: `held` stays as it is.
    pub(crate) fn assign(
        &mut self,
        held: Option<&Lease>,
        context: &mut IpContext,
    ) -> Result<Lease, AddressError> {
        let excluded = context
            .excluded_prefixes
            .iter()
            .map(|text| prefix(text).map_err(|_| AddressError::BadExclusion(text.clone())))
            .collect::<Result<Vec<_>, _>>()?;
        let mut lease = Lease(Vec::with_capacity(self.pools.len()));
        for (index, pool) in self.pools.iter_mut().enumerate() {
            let kept = held
                .and_then(|held| held.0.get(index))
                .filter(|pair| !pair.is_excluded(&excluded));
            let pair = match kept {
                Some(pair) => Ok(*pair),
                None if held.is_none() => match recover(pool, context, &excluded) {
                    Some(pair) => Ok(pair),
                    None => pool.allocate(&excluded),
                },
                None => pool.allocate(&excluded),
            };
            match pair {
                Ok(pair) => lease.0.push(pair),
                Err(error) => {
                    self.release_changed(&lease, held);
                    return Err(error.into());
                }
            }
        }
        if let Some(held) = held {
            for pair in held.0.iter().filter(|pair| !lease.0.contains(pair)) {
                withdraw(context, pair);
            }
            self.release_changed(held, Some(&lease));
        }
        // This end's addresses and routes are its own choice: a client could route anything into its namespace.
        context.dst_ip_addrs.clear();
        context.dst_routes.clear();
        for pair in &lease.0 {
            write(context, pair);
        }
        Ok(lease)
    }

    /// Gives the addresses of a connection back.
    pub(crate) fn release(&mut self, lease: &Lease) {
        self.release_changed(lease, None);
    }

    /// Gives back what is in `lease` and not in `kept`.
    fn release_changed(&mut self, lease: &Lease, kept: Option<&Lease>) {
        for (index, (pool, pair)) in self.pools.iter_mut().zip(&lease.0).enumerate() {
            if kept.and_then(|kept| kept.0.get(index)) != Some(pair) {
                pool.release(pair);
            }
        }
    }

    /// How many connections have addresses.
    #[cfg(test)]
    pub(crate) fn in_use(&self) -> Vec<usize> {
        self.pools.iter().map(PrefixPool::in_use).collect()
    }
}

/// The pair that the context names, where it is of this pool, free and not excluded.
fn recover(pool: &mut PrefixPool, context: &IpContext, excluded: &[IpNet]) -> Option<Pair> {
    let hosts = |texts: &[String]| -> Vec<IpNet> {
        texts.iter().filter_map(|text| prefix(text).ok()).collect()
    };
    let (sources, destinations) = (hosts(&context.src_ip_addrs), hosts(&context.dst_ip_addrs));
    sources
        .iter()
        .flat_map(|&src| destinations.iter().map(move |&dst| Pair { src, dst }))
        .filter(|pair| !pair.is_excluded(excluded))
        .find(|pair| pool.reserve(*pair).is_ok())
}

fn write(context: &mut IpContext, pair: &Pair) {
    let (src, dst) = (pair.src.to_string(), pair.dst.to_string());
    add_route(&mut context.src_routes, &dst);
    add_route(&mut context.dst_routes, &src);
    add(&mut context.src_ip_addrs, src);
    add(&mut context.dst_ip_addrs, dst);
}

fn withdraw(context: &mut IpContext, pair: &Pair) {
    let (src, dst) = (pair.src.to_string(), pair.dst.to_string());
    context.src_routes.retain(|route| route.prefix != dst);
    context.src_ip_addrs.retain(|address| *address != src);
}

fn add(addresses: &mut Vec<String>, address: String) {
    if !addresses.contains(&address) {
        addresses.push(address);
    }
}

fn add_route(routes: &mut Vec<Route>, prefix: &str) {
    if !routes.iter().any(|route| route.prefix == prefix) {
        routes.push(Route {
            prefix: prefix.to_owned(),
            next_hop: String::new(),
        });
    }
}

/// A prefix, or an address as the prefix of one host.
fn prefix(text: &str) -> Result<IpNet, AddrParseError> {
    match text.parse::<IpNet>() {
        Ok(prefix) => Ok(prefix),
        Err(_) => text.parse::<std::net::IpAddr>().map(IpNet::from),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pools(prefixes: &[&str]) -> Addresses {
        let prefixes: Vec<IpNet> = prefixes.iter().map(|text| text.parse().unwrap()).collect();
        Addresses::new(&prefixes).unwrap()
    }

    fn excluding(prefixes: &[&str]) -> IpContext {
        IpContext {
            excluded_prefixes: prefixes.iter().map(|text| (*text).to_owned()).collect(),
            ..IpContext::default()
        }
    }

    #[test]
    fn a_connection_gets_a_pair_of_each_family() {
        let mut addresses = pools(&["172.16.1.0/24", "fd00::/64"]);
        let mut context = IpContext::default();
        addresses.assign(None, &mut context).unwrap();
        assert_eq!(context.dst_ip_addrs, ["172.16.1.1/32", "fd00::1/128"]);
        assert_eq!(context.src_ip_addrs, ["172.16.1.2/32", "fd00::2/128"]);
        let prefixes = |routes: &[Route]| -> Vec<String> {
            routes.iter().map(|route| route.prefix.clone()).collect()
        };
        assert_eq!(prefixes(&context.src_routes), context.dst_ip_addrs);
        assert_eq!(prefixes(&context.dst_routes), context.src_ip_addrs);
        assert_eq!(addresses.in_use(), [1, 1]);
    }

    #[test]
    fn a_refresh_keeps_the_addresses() {
        let mut addresses = pools(&["172.16.1.0/24"]);
        let mut context = IpContext::default();
        let lease = addresses.assign(None, &mut context).unwrap();
        let first = context.clone();
        assert_eq!(addresses.assign(Some(&lease), &mut context).unwrap(), lease);
        assert_eq!(context, first);
        addresses.release(&lease);
        addresses.release(&lease);
        assert_eq!(addresses.in_use(), [0]);
    }

    #[test]
    fn what_is_excluded_later_is_exchanged() {
        let mut addresses = pools(&["172.16.1.0/24", "fd00::/64"]);
        let mut context = IpContext::default();
        let lease = addresses.assign(None, &mut context).unwrap();
        context.excluded_prefixes = vec!["172.16.1.0/28".to_owned()];
        let lease = addresses.assign(Some(&lease), &mut context).unwrap();
        assert_eq!(context.dst_ip_addrs, ["172.16.1.16/32", "fd00::1/128"]);
        assert_eq!(context.src_ip_addrs, ["fd00::2/128", "172.16.1.17/32"]);
        assert_eq!(context.src_routes.len(), 2);
        assert_eq!(addresses.in_use(), [1, 1]);
        addresses.release(&lease);
        assert_eq!(addresses.in_use(), [0, 0]);
    }

    #[test]
    fn a_failure_changes_nothing() {
        let mut addresses = pools(&["172.16.1.0/24", "fd00::/64"]);
        let mut context = excluding(&["fd00::/16"]);
        let error = addresses.assign(None, &mut context).unwrap_err();
        assert!(matches!(
            error,
            AddressError::Pool(PrefixError::Exhausted { .. })
        ));
        assert_eq!(addresses.in_use(), [0, 0]);
        assert_eq!(context, excluding(&["fd00::/16"]));

        let mut context = IpContext::default();
        let lease = addresses.assign(None, &mut context).unwrap();
        let before = context.clone();
        context.excluded_prefixes = vec!["172.16.1.0/28".to_owned(), "fd00::/64".to_owned()];
        addresses.assign(Some(&lease), &mut context).unwrap_err();
        assert_eq!(context.src_ip_addrs, before.src_ip_addrs);
        assert_eq!(addresses.in_use(), [1, 1]);
        let error = addresses
            .assign(None, &mut excluding(&["everything"]))
            .unwrap_err();
        assert!(error.to_string().contains("\"everything\""), "{error}");
    }

    #[test]
    fn a_connection_from_before_a_restart_gets_its_addresses_again() {
        let before = IpContext {
            src_ip_addrs: vec!["10.0.0.1/32".to_owned(), "172.16.1.9/32".to_owned()],
            dst_ip_addrs: vec!["172.16.1.8/32".to_owned()],
            ..IpContext::default()
        };
        let mut addresses = pools(&["172.16.1.0/24"]);
        let mut context = before.clone();
        addresses.assign(None, &mut context).unwrap();
        assert_eq!(context.dst_ip_addrs, ["172.16.1.8/32"]);
        assert_eq!(context.src_ip_addrs, before.src_ip_addrs);
        // Somebody else has them now.
        let mut context = before.clone();
        addresses.assign(None, &mut context).unwrap();
        assert_eq!(context.dst_ip_addrs, ["172.16.1.1/32"]);
    }

    #[test]
    fn a_client_chooses_nothing_of_this_end() {
        let mut addresses = pools(&["172.16.1.0/24"]);
        let foreign = |prefix: &str| Route {
            prefix: prefix.to_owned(),
            next_hop: String::new(),
        };
        let mut context = IpContext {
            dst_ip_addrs: vec!["10.96.0.1/32".to_owned()],
            dst_routes: vec![foreign("0.0.0.0/1"), foreign("128.0.0.0/1")],
            ..IpContext::default()
        };
        addresses.assign(None, &mut context).unwrap();
        assert_eq!(context.dst_ip_addrs, ["172.16.1.1/32"]);
        assert_eq!(context.dst_routes, [foreign("172.16.1.2/32")]);
    }

    #[test]
    fn prefixes_that_cannot_serve_are_refused() {
        let new = |prefixes: &[&str]| {
            let prefixes: Vec<IpNet> = prefixes.iter().map(|text| text.parse().unwrap()).collect();
            Addresses::new(&prefixes).map(|_| ())
        };
        assert_eq!(new(&[]), Err(PrefixError::Empty));
        assert!(matches!(
            new(&["172.16.1.1/32"]),
            Err(PrefixError::TooSmall(_))
        ));
        assert!(matches!(
            new(&["172.16.0.0/16", "172.16.1.0/24"]),
            Err(PrefixError::Overlap { .. })
        ));
    }

    proptest! {
        /// Whatever is asked for and given back, no address is given twice and none is lost.
        #[test]
        fn no_address_is_given_twice(steps in proptest::collection::vec((0usize..6, 0u8..8), 0..60)) {
            let mut addresses = pools(&["172.16.1.0/28", "fd00::/124"]);
            let mut held: Vec<Option<(Lease, IpContext)>> = vec![None; 6];
            for (slot, what) in steps {
                let old = held[slot].take();
                if what == 0 {
                    if let Some((lease, _)) = old {
                        addresses.release(&lease);
                    }
                    continue;
                }
                let (lease, mut context) = old.map_or((None, IpContext::default()), |(l, c)| (Some(l), c));
                context.excluded_prefixes = vec![format!("172.16.1.{}/30", (what % 4) * 4)];
                held[slot] = match addresses.assign(lease.as_ref(), &mut context) {
                    Ok(lease) => Some((lease, context)),
                    Err(_) => lease.map(|lease| (lease, context)),
                };
                let mut all: Vec<_> = held.iter().flatten()
                    .flat_map(|(lease, _)| lease.0.iter().flat_map(|pair| [pair.src, pair.dst]))
                    .collect();
                let count = all.len();
                all.sort();
                all.dedup();
                prop_assert_eq!(all.len(), count);
                let open = held.iter().flatten().count();
                prop_assert_eq!(addresses.in_use(), vec![open, open]);
            }
        }
    }
}
