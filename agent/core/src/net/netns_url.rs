//! URLs of network namespaces.

use std::{
    ffi::OsString,
    fmt,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::text::decimal;

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
