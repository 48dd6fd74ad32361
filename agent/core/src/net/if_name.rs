//! Names of network interfaces.

use std::{fmt, str::FromStr};

/// The longest interface name: Linux's `IFNAMSIZ` without the final zero byte.
const MAX_IF_NAME: usize = 15;

/// Why a text is no interface name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IfNameError {
    /// No byte, or more than Linux takes.
    #[error("interface name `{name}` has {len} bytes: 1 to {MAX_IF_NAME} are allowed", name = .0, len = .0.len())]
    Length(String),
    /// A character that Linux refuses or interprets.
    #[error(
        "interface name `{name}` has the character {bad:?}: use letters, digits, `-`, `_` and `.`"
    )]
    Character {
        /// The name.
        name: String,
        /// Its first bad character.
        bad: char,
    },
    /// `all` or `default`: Linux has settings of these names beside those of the interfaces, and makes no such interface.
    #[error(
        "interface name `{0}` is reserved by Linux for settings of all interfaces: use another name"
    )]
    Reserved(String),
    /// `.` or `..`.
    #[error("interface name `{0}` is a directory to Linux: use another name")]
    Dots(String),
}

/// A network interface's name as Linux takes it (`dev_valid_name`): 1 to 15 bytes without `/`, `:`, spaces and control characters, and
/// none of `.`, `..`, `all` and `default`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(String);

impl IfName {
    /// The name, as [`Display`](fmt::Display) writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<&str> for IfName {
    type Error = IfNameError;

    fn try_from(name: &str) -> Result<Self, IfNameError> {
        if name.is_empty() || name.len() > MAX_IF_NAME {
            return Err(IfNameError::Length(name.to_owned()));
        }
        if matches!(name, "." | "..") {
            return Err(IfNameError::Dots(name.to_owned()));
        }
        if matches!(name, "all" | "default") {
            return Err(IfNameError::Reserved(name.to_owned()));
        }
        // `%` is a pattern to the kernel: `nsm%d` would become another name.
        match name
            .chars()
            .find(|&c| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%'))
        {
            Some(bad) => Err(IfNameError::Character {
                name: name.to_owned(),
                bad,
            }),
            None => Ok(Self(name.to_owned())),
        }
    }
}

impl FromStr for IfName {
    type Err = IfNameError;

    fn from_str(name: &str) -> Result<Self, IfNameError> {
        name.try_into()
    }
}

impl AsRef<str> for IfName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
