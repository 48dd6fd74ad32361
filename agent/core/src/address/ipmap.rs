//! Internal and public addresses of nodes behind 1:1 NAT, and where they are swapped on the path of a Request.
//!
//! A node has its internal address only; peers in other domains reach it by its public one. The proxies swap, as NSM's `swapip` does:
//! the client's proxy the source, the endpoint's proxy the destination, each in its own domain, so that inside a domain only internal
//! addresses appear.
//!
//! ```text
//! forwarder ──▶ client's proxy ───▶ endpoint's proxy ──▶ forwarder
//!               request_out         request_in
//!           ◀── reply_in       ◀─── reply_out        ◀──
//! ```
//!
//! An address that the map does not have passes unchanged. A value that is no address is left as it is: the mechanism's parser
//! refuses it with the key and the value.

use std::{collections::HashMap, net::IpAddr};

use crate::mechanism::{DST_IP, ORIG_DST_IP, ORIG_SRC_IP, Parameters, SRC_IP};

/// What is wrong with an IP map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IpMapError {
    /// Two nodes with one public address: replies could not be distinguished.
    #[error(
        "{first} and {second} both map to {external}: each public address belongs to one internal address, remove one of the lines"
    )]
    SharedExternal {
        /// The internal address that came first.
        first: IpAddr,
        /// The internal address that came second.
        second: IpAddr,
        /// The public address of both.
        external: IpAddr,
    },
    /// One node with two public addresses.
    #[error(
        "{internal} maps to {first} and to {second}: an internal address has one public address, remove one of the lines"
    )]
    TwoExternals {
        /// The internal address.
        internal: IpAddr,
        /// The public address that came first.
        first: IpAddr,
        /// The public address that came second.
        second: IpAddr,
    },
}

/// Internal to public addresses, one to one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IpMap {
    external: HashMap<IpAddr, IpAddr>,
    internal: HashMap<IpAddr, IpAddr>,
}

impl IpMap {
    /// A map of (internal, public) pairs. A pair that is repeated counts once.
    ///
    /// # Errors
    /// Two internal addresses have one public address, or one has two.
    pub fn from_pairs(
        pairs: impl IntoIterator<Item = (IpAddr, IpAddr)>,
    ) -> Result<Self, IpMapError> {
        let mut map = Self::default();
        for (internal, external) in pairs {
            let (internal, external) = (internal.to_canonical(), external.to_canonical());
            if let Some(first) = map
                .external
                .insert(internal, external)
                .filter(|&first| first != external)
            {
                return Err(IpMapError::TwoExternals {
                    internal,
                    first,
                    second: external,
                });
            }
            if let Some(first) = map
                .internal
                .insert(external, internal)
                .filter(|&first| first != internal)
            {
                return Err(IpMapError::SharedExternal {
                    first,
                    second: internal,
                    external,
                });
            }
        }
        Ok(map)
    }

    /// This map with another public address for one internal address: what stood there before is gone.
    ///
    /// # Errors
    /// Another internal address has that public one.
    pub fn with(&self, internal: IpAddr, external: IpAddr) -> Result<Self, IpMapError> {
        let internal = internal.to_canonical();
        let others = self.external.iter().map(|(&own, &public)| (own, public));
        Self::from_pairs(
            others
                .filter(|&(own, _)| own != internal)
                .chain([(internal, external)]),
        )
    }

    /// The public address that the map itself has for an internal one.
    #[must_use]
    pub fn get(&self, internal: IpAddr) -> Option<IpAddr> {
        self.external.get(&internal.to_canonical()).copied()
    }

    /// The public address of an internal one; itself when the map does not have it.
    #[must_use]
    pub fn external(&self, internal: IpAddr) -> IpAddr {
        let internal = internal.to_canonical();
        self.external.get(&internal).copied().unwrap_or(internal)
    }

    /// The internal address of a public one; itself when the map does not have it.
    #[must_use]
    pub fn internal(&self, external: IpAddr) -> IpAddr {
        let external = external.to_canonical();
        self.internal.get(&external).copied().unwrap_or(external)
    }

    /// A Request leaves the client's domain: `src_ip` becomes public and `orig_src_ip` remembers it, for each mechanism offered and the
    /// one chosen. Returns the internal address as text when this proxy swapped, to be given to [`Self::reply_in`]. A source that
    /// another proxy has swapped already stays as it is.
    ///
    /// `orig_src_ip` is set also when the address is not in the map: NSM's proxies recognise a Request of a peer by it.
    pub fn request_out(&self, params: &mut Parameters) -> Option<String> {
        if comes_from_peer(params) {
            return None;
        }
        let text = params.get(SRC_IP)?.clone();
        let source: IpAddr = text.parse().ok()?;
        params.insert(SRC_IP.to_owned(), self.external(source).to_string());
        params.insert(ORIG_SRC_IP.to_owned(), text.clone());
        Some(text)
    }

    /// A Request enters the endpoint's domain: where the mechanism has `src_ip`, the destination of an earlier reply is cleared:
    /// it is public, and the forwarder here sets the internal one.
    pub fn request_in(&self, params: &mut Parameters) {
        if params.contains_key(SRC_IP) {
            params.insert(DST_IP.to_owned(), String::new());
            params.insert(ORIG_DST_IP.to_owned(), String::new());
        }
    }

    /// A reply leaves the endpoint's domain: `dst_ip` becomes public and `orig_dst_ip` remembers it. A destination that this map does
    /// not have and that a proxy further down has swapped (a floating domain) stays as it is, as does one that was swapped here before.
    pub fn reply_out(&self, params: &mut Parameters) {
        let Some(text) = params.get(DST_IP).cloned() else {
            return;
        };
        let Ok(destination) = text.parse::<IpAddr>() else {
            return;
        };
        // `orig_dst_ip` alone is no proof: a refresh can carry it from the earlier reply.
        let is_swapped = params
            .get(ORIG_DST_IP)
            .is_some_and(|original| !original.is_empty());
        if is_swapped && !self.external.contains_key(&destination.to_canonical()) {
            return;
        }
        params.insert(DST_IP.to_owned(), self.external(destination).to_string());
        params.insert(ORIG_DST_IP.to_owned(), text);
    }

    /// A reply enters the client's domain, at the proxy whose [`Self::request_out`] swapped: `src_ip` is internal again. What we sent,
    /// `sent_src_ip`, precedes the peer's echo of it; without it the echo in `orig_src_ip` counts, else the map.
    pub fn reply_in(&self, params: &mut Parameters, sent_src_ip: Option<&str>) {
        let Some(source) = params.get(SRC_IP) else {
            return;
        };
        let is_address = |text: &&str| text.parse::<IpAddr>().is_ok();
        let echo = params.get(ORIG_SRC_IP).map(String::as_str);
        let known = sent_src_ip
            .filter(is_address)
            .or_else(|| echo.filter(is_address));
        let internal = match (known, source.parse()) {
            (Some(known), _) => known.to_owned(),
            (None, Ok(source)) => self.internal(source).to_string(),
            (None, Err(_)) => return,
        };
        params.insert(SRC_IP.to_owned(), internal);
        params.insert(ORIG_SRC_IP.to_owned(), String::new());
    }
}

/// Whether the source was swapped by a proxy, so that the Request comes from another domain.
#[must_use]
pub fn comes_from_peer(params: &Parameters) -> bool {
    params
        .get(ORIG_SRC_IP)
        .is_some_and(|original| !original.is_empty())
}
