//! An interface in a pod's network namespace: its name, and where the namespace is.

use std::{
    ffi::OsString,
    fmt,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use super::{INODE_URL, MechanismError, NAME, Parameters, decimal, set, value};

/// The longest interface name: Linux's `IFNAMSIZ` without the final zero byte.
const MAX_IF_NAME: usize = 15;

/// A kernel interface's parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kernel {
    /// The interface's name in the pod.
    pub name: Option<IfName>,
    /// The pod's network namespace.
    pub netns: Option<NetnsUrl>,
}

impl Kernel {
    /// Reads the parameters.
    ///
    /// # Errors
    /// A value that cannot be used, with its key.
    pub fn parse(params: &Parameters) -> Result<Self, MechanismError> {
        Ok(Self {
            name: value(params, NAME).map(str::parse).transpose()?,
            netns: value(params, INODE_URL).map(str::parse).transpose()?,
        })
    }

    /// Writes the parameters and leaves those it does not know alone. What is absent is removed.
    pub fn write(&self, params: &mut Parameters) {
        set(params, NAME, self.name.as_ref());
        set(params, INODE_URL, self.netns.as_ref());
    }
}

/// Why a text is no interface name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IfNameError {
    /// No byte, or more than Linux takes.
    #[error("interface name `{name}` has {len} bytes: 1 to {MAX_IF_NAME} are allowed", name = .0, len = .0.len())]
    Length(String),
    /// A character that Linux refuses, or reads as something else.
    #[error(
        "interface name `{name}` has the character {bad:?}: use letters, digits, `-`, `_` and `.`"
    )]
    Character {
        /// The name.
        name: String,
        /// Its first bad character.
        bad: char,
    },
    /// `.` or `..`.
    #[error("interface name `{0}` is a directory to Linux: use another name")]
    Dots(String),
}

/// A network interface's name as Linux takes it (`dev_valid_name`): 1 to 15 bytes without `/`, `:`, spaces and control characters, and
/// neither `.` nor `..`.
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

/// Why a text names no network namespace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetnsUrlError {
    /// Neither scheme.
    #[error(
        "`{0}` names no network namespace: write file:///proc/<pid>/ns/net, file:///run/netns/<name> or inode://<device>/<inode>"
    )]
    Scheme(String),
    /// A file URL without an absolute path, or one with a host, a query or a bad escape.
    #[error(
        "`{0}` has no absolute path: write file:///proc/<pid>/ns/net or file:///run/netns/<name>"
    )]
    Path(String),
    /// An inode URL without two numbers.
    #[error(
        "`{0}` has no device and inode number: write inode://<device>/<inode>, both decimal, as stat shows them"
    )]
    Inode(String),
}

/// Where a pod's network namespace is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NetnsUrl {
    /// `file:///proc/<pid>/ns/net` or a namespace that is mounted somewhere.
    File(PathBuf),
    /// `inode://<device>/<inode>`: a file whose descriptor was sent over the unix socket.
    Inode {
        /// The device number of the file.
        dev: u64,
        /// Its inode number.
        inode: u64,
    },
}

impl FromStr for NetnsUrl {
    type Err = NetnsUrlError;

    fn from_str(url: &str) -> Result<Self, NetnsUrlError> {
        if let Some(path) = url.strip_prefix("file://") {
            return match unescape(path) {
                Some(path) if path.starts_with(b"/") => {
                    Ok(Self::File(PathBuf::from(OsString::from_vec(path))))
                }
                _ => Err(NetnsUrlError::Path(url.to_owned())),
            };
        }
        let Some(numbers) = url.strip_prefix("inode://") else {
            return Err(NetnsUrlError::Scheme(url.to_owned()));
        };
        match numbers
            .split_once('/')
            .map(|(dev, inode)| (decimal(dev), decimal(inode)))
        {
            Some((Some(dev), Some(inode))) => Ok(Self::Inode { dev, inode }),
            _ => Err(NetnsUrlError::Inode(url.to_owned())),
        }
    }
}

impl fmt::Display for NetnsUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write_escaped(f, path),
            Self::Inode { dev, inode } => write!(f, "inode://{dev}/{inode}"),
        }
    }
}

/// The bytes of a URL's path (RFC 3986 section 2.1). None for a bad escape, a query, a fragment or a zero byte.
fn unescape(path: &str) -> Option<Vec<u8>> {
    let mut bytes = path.bytes();
    let mut plain = Vec::with_capacity(path.len());
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'?' | b'#' => return None,
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            byte => byte,
        };
        if byte == 0 {
            return None;
        }
        plain.push(byte);
    }
    Some(plain)
}

fn write_escaped(f: &mut fmt::Formatter<'_>, path: &Path) -> fmt::Result {
    f.write_str("file://")?;
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~:@".contains(&byte) {
            write!(f, "{}", char::from(byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}
