//! The mark that makes a link ours.

use std::{fmt, str::FromStr};

/// What every alias of ours starts with.
const PREFIX: &str = "proxy-nsmgr/";

/// The longest alias that the kernel keeps, bytes: IFALIASZ without the closing zero.
const MAX_LEN: usize = 255;

/// The alias of a link of ours, `proxy-nsmgr/<domain>/<connection id>`.
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
    domain: String,
    connection_id: String,
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
        "connection id `{0}` is not possible in a link alias: it is empty or has a control character"
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
        if connection_id.is_empty() || connection_id.chars().any(char::is_control) {
            return Err(LinkAliasError::ConnectionId(connection_id));
        }
        let alias = Self {
            domain,
            connection_id,
        };
        if PREFIX.len() + alias.domain.len() + 1 + alias.connection_id.len() > MAX_LEN {
            return Err(LinkAliasError::TooLong(alias.to_string()));
        }
        Ok(alias)
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
        Self::new(domain, connection_id)
    }
}

impl fmt::Display for LinkAlias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}/{}", self.domain, self.connection_id)
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
    fn refuses_what_the_kernel_would_cut() {
        let room = MAX_LEN - PREFIX.len() - "d/".len();
        assert!(LinkAlias::new("d", "c".repeat(room)).is_ok());
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
