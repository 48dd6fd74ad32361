//! The network namespace that `--netns` means.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use nsm_core::{
    mechanism::{INODE_URL, NETNS_INODE, Parameters},
    net::NetnsUrl,
};

/// A network namespace that was there when it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Netns {
    /// Where it is.
    path: PathBuf,
    /// The device of the file system of namespaces.
    device: u64,
    /// Its number, the kernel's key of a namespace.
    inode: u64,
}

/// Why a text means no network namespace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetnsError {
    /// The path or process cannot be opened.
    #[error(
        "cannot open the network namespace {path}: {cause}; give a path such as /run/netns/pod, or a running process"
    )]
    Open {
        /// What was opened.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// It is a file, but no namespace.
    #[error(
        "{0} is no network namespace: give a path such as /run/netns/pod or /proc/<pid>/ns/net"
    )]
    NotNetns(PathBuf),
    /// It is a namespace, but of another kind.
    #[error("{path} is a namespace of the kind {kind:?}, not \"net\"")]
    OtherKind {
        /// What was opened.
        path: PathBuf,
        /// What the kernel calls it.
        kind: String,
    },
}

impl Netns {
    /// Looks at what `text` means: digits alone are a process, all else is a path.
    ///
    /// # Errors
    ///
    /// It cannot be opened, or is no network namespace.
    pub(crate) fn open(text: &str) -> Result<Self, NetnsError> {
        let path = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            PathBuf::from(format!("/proc/{text}/ns/net"))
        } else {
            PathBuf::from(text)
        };
        let failed = |cause| NetnsError::Open {
            path: path.clone(),
            cause,
        };
        // The agent has another working directory; and `self` is another process to it.
        let path = std::path::absolute(&path).map_err(failed)?;
        let path = of_this_process(&path).unwrap_or(path);
        let file = File::open(&path).map_err(failed)?;
        let system = fstatfs(&file).map_err(|errno| failed(errno.into()))?;
        if system.filesystem_type() != NSFS_MAGIC {
            return Err(NetnsError::NotNetns(path));
        }
        // The kernel names an open namespace `net:[4026531840]`; one that is mounted somewhere is
        // called by its path, and only the agent's own attempt shows its kind.
        if let Ok(link) = std::fs::read_link(&path)
            && let Some((kind, _)) = link.to_string_lossy().split_once(":[")
            && kind != "net"
        {
            let kind = kind.to_owned();
            return Err(NetnsError::OtherKind { path, kind });
        }
        let metadata = file.metadata().map_err(failed)?;
        let (device, inode) = (metadata.dev(), metadata.ino());
        Ok(Self {
            path,
            device,
            inode,
        })
    }

    /// What no other namespace has as long as it exists: device and inode.
    pub(crate) fn number(&self) -> String {
        format!("{}/{}", self.device, self.inode)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A descriptor of it, for an agent that does not take our path for it.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        File::open(&self.path).map(OwnedFd::from)
    }

    /// Writes it into the parameters of a KERNEL mechanism, by its path.
    pub(crate) fn write(&self, parameters: &mut Parameters) {
        self.write_as(&NetnsUrl::File(self.path.clone()), parameters);
    }

    /// The same by its inode, whose descriptor is passed beside the call.
    pub(crate) fn write_passed(&self, parameters: &mut Parameters) {
        let url = NetnsUrl::Inode {
            dev: self.device,
            inode: self.inode,
        };
        self.write_as(&url, parameters);
    }

    fn write_as(&self, url: &NetnsUrl, parameters: &mut Parameters) {
        parameters.insert(INODE_URL.to_owned(), url.to_string());
        parameters.insert(NETNS_INODE.to_owned(), self.inode.to_string());
    }
}

/// `/proc/self/…` as seen from other processes.
fn of_this_process(path: &Path) -> Option<PathBuf> {
    let rest = path.strip_prefix("/proc/self").ok()?;
    Some(
        Path::new("/proc")
            .join(std::process::id().to_string())
            .join(rest),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_and_a_path_mean_the_same_namespace() {
        let by_pid = Netns::open(&std::process::id().to_string()).unwrap();
        let by_path = Netns::open("/proc/self/ns/net").unwrap();
        assert_eq!(by_pid, by_path);
        let mut parameters = Parameters::new();
        by_pid.write(&mut parameters);
        let pid = std::process::id();
        let mut passed = Parameters::new();
        by_pid.write_passed(&mut passed);
        assert_eq!(
            passed[INODE_URL],
            format!("inode://{}/{}", by_pid.device, by_pid.inode)
        );
        by_pid.descriptor().unwrap();
        assert_eq!(parameters[INODE_URL], format!("file:///proc/{pid}/ns/net"));
        assert_eq!(parameters[NETNS_INODE], by_pid.inode.to_string());
    }

    #[test]
    fn what_is_no_network_namespace_is_told() {
        let error = |text: &str| Netns::open(text).unwrap_err().to_string();
        for text in ["/nowhere/net", "4294967295", "", "/proc/self/ns/none"] {
            assert!(error(text).contains("cannot open"), "{}", error(text));
        }
        for text in ["/etc/passwd", "/", "/proc/self/status"] {
            assert!(
                error(text).contains("is no network namespace"),
                "{}",
                error(text)
            );
        }
        assert!(error("/proc/self/ns/mnt").contains("\"mnt\""));
    }
}
