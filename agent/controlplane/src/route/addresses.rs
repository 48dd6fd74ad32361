//! Two addresses of one node: the internal one, which its own domain dials, and the public one, which other domains dial. This part
//! swaps them where a Request or a reply crosses the border of the domain.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use ipnet::IpNet;
use nsm_core::address::ipmap::IpMap;
use nsm_proto::connection::Mechanism;
use tokio::{sync::watch, time::Instant};

use crate::error::RequestError;

/// How long a Request waits for the public address of an agent that has just started: its sources have a second to answer.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(3);

/// URLs of each kind that are remembered after they have changed: what was registered with them is refreshed, with the new one, within the
/// life of a token; in that time an address hardly changes twice.
const EARLIER_URLS: usize = 4;

/// Whether the next hop lies in another domain than the previous one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crossing {
    /// Both hops are of our domain.
    Inside,
    /// The Request leaves our domain: the peer must get public addresses.
    Out,
    /// The Request has come from another domain.
    In,
}

/// The addresses by which this node is reached, and the map between internal and public ones.
#[derive(Debug)]
pub(crate) struct Addresses {
    /// What our own domain dials.
    internal: RwLock<Urls>,
    /// What other domains dial, where that is another.
    public: RwLock<Urls>,
    map: RwLock<Arc<IpMap>>,
    /// Whether the map has the public address of this node, or nothing can find it.
    is_known: watch::Sender<bool>,
}

impl Addresses {
    /// Without a map and a public URL; the public address counts as known.
    pub(crate) fn new(internal_url: Option<String>) -> Self {
        let internal = Urls {
            now: internal_url,
            earlier: Vec::new(),
        };
        Self {
            internal: RwLock::new(internal),
            public: RwLock::default(),
            map: RwLock::default(),
            is_known: watch::Sender::new(true),
        }
    }

    /// Replaces the map.
    pub(crate) fn set_map(&self, map: IpMap) {
        *write(&self.map) = Arc::new(map);
    }

    /// Replaces the URL that our own domain dials. None: the node has no address.
    pub(crate) fn set_internal_url(&self, url: Option<String>) {
        write(&self.internal).replace(url);
    }

    /// Replaces the public URL. None: it is the internal one.
    pub(crate) fn set_public_url(&self, url: Option<String>) {
        write(&self.public).replace(url);
    }

    /// Sets whether the public address is known as far as it can be.
    pub(crate) fn set_known(&self, is_known: bool) {
        self.is_known.send_replace(is_known);
    }

    /// Returns when the public address is known, or has been waited for long enough. What is known then holds.
    pub(crate) async fn known(&self, deadline: Instant) {
        let mut known = self.is_known.subscribe();
        let deadline = deadline.min(Instant::now() + ADDRESS_PATIENCE);
        let _ = tokio::time::timeout_at(deadline, known.wait_for(|known| *known)).await;
    }

    /// The URL that our own domain dials.
    ///
    /// # Errors
    /// The node has no address.
    pub(crate) fn internal_url(&self) -> Result<String, RequestError> {
        read(&self.internal)
            .now
            .clone()
            .ok_or(RequestError::NoAddress)
    }

    /// The URL that other domains dial.
    ///
    /// # Errors
    /// The node has no address.
    pub(crate) fn public_url(&self) -> Result<String, RequestError> {
        let public = read(&self.public).now.clone();
        public.map_or_else(|| self.internal_url(), Ok)
    }

    /// Whether the URL is one of ours, today's or an earlier one.
    pub(crate) fn is_own_url(&self, url: &str) -> bool {
        read(&self.internal).has(url) || read(&self.public).has(url)
    }

    /// The public address of an internal one; itself where there is none.
    pub(crate) fn public_of(&self, internal: IpAddr) -> IpAddr {
        self.map().external(internal)
    }

    /// Whether `address` leads to one of these own addresses: it is one, or the public address of one.
    pub(crate) fn is_one_of(&self, own: &[IpNet], address: IpAddr) -> bool {
        let map = self.map();
        let mut own = own.iter().map(IpNet::addr);
        own.any(|own| own == address || map.external(own) == address)
    }

    /// Swaps the addresses of a Request's mechanisms on their way to the next hop.
    pub(crate) fn swap_request<'a>(
        &self,
        crossing: Crossing,
        mechanisms: impl Iterator<Item = &'a mut Mechanism>,
    ) {
        let swap = match crossing {
            Crossing::Inside => return,
            Crossing::Out => |map: &IpMap, mechanism: &mut Mechanism| {
                map.request_out(&mut mechanism.parameters);
            },
            Crossing::In => |map: &IpMap, mechanism: &mut Mechanism| {
                map.request_in(&mut mechanism.parameters);
            },
        };
        let map = self.map();
        mechanisms.for_each(|mechanism| swap(&map, mechanism));
    }

    /// Swaps the addresses of a mechanism that the next hop has answered, on its way back; `sent_source` is the source address that
    /// was sent, before it was swapped.
    pub(crate) fn swap_reply(
        &self,
        crossing: Crossing,
        mechanism: &mut Mechanism,
        sent_source: Option<&str>,
    ) {
        match crossing {
            Crossing::Inside => {}
            Crossing::Out => self.map().reply_in(&mut mechanism.parameters, sent_source),
            Crossing::In => self.map().reply_out(&mut mechanism.parameters),
        }
    }

    /// Swaps the addresses of a mechanism that this node answers itself: the server's end of a tunnel.
    pub(crate) fn swap_answer(&self, crossing: Crossing, mechanism: &mut Mechanism) {
        if crossing == Crossing::In {
            self.map().reply_out(&mut mechanism.parameters);
        }
    }

    fn map(&self) -> Arc<IpMap> {
        Arc::clone(&read(&self.map))
    }
}

fn read<T>(value: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    value.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(value: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    value.write().unwrap_or_else(PoisonError::into_inner)
}

/// What others were given to dial.
#[derive(Debug, Default)]
struct Urls {
    now: Option<String>,
    /// The latest last.
    earlier: Vec<String>,
}

impl Urls {
    fn replace(&mut self, url: Option<String>) {
        if self.now == url {
            return;
        }
        self.earlier.retain(|earlier| Some(earlier) != url.as_ref());
        self.earlier.extend(std::mem::replace(&mut self.now, url));
        if self.earlier.len() > EARLIER_URLS {
            self.earlier.remove(0);
        }
    }

    fn has(&self, url: &str) -> bool {
        self.now
            .iter()
            .chain(&self.earlier)
            .any(|known| known == url)
    }
}

#[cfg(test)]
mod tests {
    use super::{EARLIER_URLS, Urls};

    #[test]
    fn earlier_urls_are_still_ours_for_a_while() {
        let mut urls = Urls::default();
        let url = |number: usize| format!("tcp://192.0.2.{number}:5006");
        for number in 0..=EARLIER_URLS {
            urls.replace(Some(url(number)));
        }
        assert!((0..=EARLIER_URLS).all(|number| urls.has(&url(number))));
        urls.replace(Some(url(EARLIER_URLS)));
        assert!(urls.has(&url(0)), "nothing changed");
        urls.replace(None);
        assert!(!urls.has(&url(0)) && urls.has(&url(EARLIER_URLS)));
        urls.replace(Some(url(1)));
        assert_eq!(
            urls.earlier.len(),
            EARLIER_URLS - 1,
            "one that came back counts once"
        );
    }
}
