//! The mark that makes a link ours.

use std::{fmt, str::FromStr};

/// What every alias of ours starts with.
const PREFIX: &str = "proxy-nsmgr/";

/// What the alias of an endpoint's link ends with, where the client of its connection has a link on the node too.
const ENDPOINT: &str = "/endpoint";

/// The longest alias that the kernel keeps, bytes: IFALIASZ without the closing zero.
const MAX_LEN: usize = 255;

/// The alias of a link of ours, `proxy-nsmgr/<domain>/<connection id>`. Where both pods of a connection are on the node, the endpoint's link
/// has `/endpoint` behind that.
///
/// The kernel keeps the alias, so it outlives the agent: after a restart the agent finds and removes links whose connection is gone
/// by their alias. A link without such an alias is never touched.
///
/// ```
/// # use nsm_core::link::LinkAlias;
/// let alias = LinkAlias::new("cluster-1.example", "5b7f-4c").unwrap();
/// assert_eq!(alias.to_string(), "proxy-nsmgr/cluster-1.example/5b7f-4c");
/// assert_eq!("proxy-nsmgr/cluster-1.example/5b7f-4c".parse(), Ok(alias));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkAlias {
    domain: Box<str>,
    connection_id: Box<str>,
    is_second: bool,
}

/// Why a text or a pair is no [`LinkAlias`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkAliasError {
    /// Not marked as ours.
    #[error(
        "link alias `{0}` is not of the form `{PREFIX}<domain>/<connection id>`: the link is not ours"
    )]
    NotOurs(String),
    /// No domain, or one that could not be separated from the connection id.
    #[error(
        "domain `{0}` is not possible in a link alias: it is empty, or has `/` or a control character"
    )]
    Domain(String),
    /// No connection id, or one that would end the alias early.
    #[error(
        "connection id `{0}` is not possible in a link alias: it is empty, has a control character, or ends with `{ENDPOINT}`"
    )]
    ConnectionId(String),
    /// Longer than the kernel keeps.
    #[error("link alias `{0}` has {len} bytes, the kernel keeps {MAX_LEN}: use a shorter connection id or domain", len = .0.len())]
    TooLong(String),
}

impl LinkAlias {
    /// The alias of a connection's link.
    ///
    /// # Errors
    ///
    /// A part is empty or has a character that would make the alias ambiguous, or the whole is longer than the kernel keeps.
    pub fn new(
        domain: impl Into<String>,
        connection_id: impl Into<String>,
    ) -> Result<Self, LinkAliasError> {
        let (domain, connection_id) = (domain.into(), connection_id.into());
        if domain.is_empty() || domain.contains('/') || domain.chars().any(char::is_control) {
            return Err(LinkAliasError::Domain(domain));
        }
        let is_ambiguous = connection_id.ends_with(ENDPOINT);
        if connection_id.is_empty() || is_ambiguous || connection_id.chars().any(char::is_control) {
            return Err(LinkAliasError::ConnectionId(connection_id));
        }
        let alias = Self {
            domain: domain.into_boxed_str(),
            connection_id: connection_id.into_boxed_str(),
            is_second: false,
        };
        alias.fits()
    }

    fn fits(self) -> Result<Self, LinkAliasError> {
        let end = if self.is_second { ENDPOINT.len() } else { 0 };
        if PREFIX.len() + self.domain.len() + 1 + self.connection_id.len() + end > MAX_LEN {
            return Err(LinkAliasError::TooLong(self.to_string()));
        }
        Ok(self)
    }

    /// The alias of the endpoint's link, of a connection whose client has its link on the node too.
    ///
    /// # Errors
    ///
    /// It is longer than the kernel keeps.
    pub fn of_endpoint(&self) -> Result<Self, LinkAliasError> {
        let second = Self {
            is_second: true,
            ..self.clone()
        };
        second.fits()
    }

    /// The alias of the connection's first link: of the client's, or of the only one.
    #[must_use]
    pub fn of_connection(&self) -> Self {
        Self {
            is_second: false,
            ..self.clone()
        }
    }

    /// Whether this is the alias of an endpoint's link beside which the client has one.
    #[must_use]
    pub const fn is_of_endpoint(&self) -> bool {
        self.is_second
    }

    /// The domain of the agent that made the link.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The connection that the link belongs to.
    #[must_use]
    pub fn connection_id(&self) -> &str {
        &self.connection_id
    }
}

impl FromStr for LinkAlias {
    type Err = LinkAliasError;

    fn from_str(text: &str) -> Result<Self, LinkAliasError> {
        let (domain, connection_id) = text
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('/'))
            .ok_or_else(|| LinkAliasError::NotOurs(text.to_owned()))?;
        match connection_id.strip_suffix(ENDPOINT) {
            Some(id) => Self::new(domain, id)?.of_endpoint(),
            None => Self::new(domain, connection_id),
        }
    }
}

impl fmt::Display for LinkAlias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = if self.is_second { ENDPOINT } else { "" };
        write!(f, "{PREFIX}{}/{}{end}", self.domain, self.connection_id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_ours_parses() {
        for text in [
            "",
            "nsm-1",
            "proxy-nsmgr",
            "proxy-nsmgr/",
            "proxy-nsmgr/d",
            "proxy-nsmgr/d/",
            "proxy-nsmgr//c",
            "other/d/c",
            " proxy-nsmgr/d/c",
        ] {
            assert!(text.parse::<LinkAlias>().is_err(), "{text}");
        }
    }

    #[test]
    fn keeps_slashes_of_the_connection_id() {
        let alias = LinkAlias::new("d", "a/b/c").unwrap();
        assert_eq!(
            alias
                .to_string()
                .parse::<LinkAlias>()
                .unwrap()
                .connection_id(),
            "a/b/c"
        );
    }

    #[test]
    fn the_endpoints_link_has_the_alias_of_its_connection_and_more() {
        let client = LinkAlias::new("d", "c").unwrap();
        let endpoint = client.of_endpoint().unwrap();
        assert_eq!(endpoint.to_string(), "proxy-nsmgr/d/c/endpoint");
        assert_eq!(endpoint.to_string().parse(), Ok(endpoint.clone()));
        assert_eq!(endpoint.connection_id(), "c");
        assert_eq!(endpoint.of_connection(), client);
        assert!(endpoint.is_of_endpoint() && !client.is_of_endpoint());
        assert!(LinkAlias::new("d", "c/endpoint").is_err(), "ambiguous");
        assert!("proxy-nsmgr/d//endpoint".parse::<LinkAlias>().is_err());
    }

    #[test]
    fn refuses_what_the_kernel_would_cut() {
        let room = MAX_LEN - PREFIX.len() - "d/".len();
        let longest = LinkAlias::new("d", "c".repeat(room)).unwrap();
        assert!(matches!(
            longest.of_endpoint(),
            Err(LinkAliasError::TooLong(_))
        ));
        assert!(matches!(
            LinkAlias::new("d", "c".repeat(room + 1)),
            Err(LinkAliasError::TooLong(_))
        ));
        assert!(matches!(
            LinkAlias::new("d", "c\0"),
            Err(LinkAliasError::ConnectionId(_))
        ));
        assert!(matches!(
            LinkAlias::new("d/e", "c"),
            Err(LinkAliasError::Domain(_))
        ));
    }

    proptest! {
        #[test]
        fn survives_text(domain in "[a-z0-9.-]{1,60}", id in "[ -~]{1,100}") {
            let alias = LinkAlias::new(domain, id).unwrap();
            prop_assert_eq!(alias.to_string().parse::<LinkAlias>(), Ok(alias));
        }
    }
}
