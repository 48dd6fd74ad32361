//! Network namespaces: finding them, being sure of them, and entering them.
//!
//! A [`Netns`] is an open handle that was checked once: it refers to a network namespace, not to a file in the place where one
//! was expected. The handle keeps the namespace alive. A pod's links would outlive the pod if a handle did, so nothing holds one
//! longer than a call: keep the path or the [`NamespaceId`] and open it again.
//!
//! A thread that entered a foreign namespace and went on with other work would send the node's traffic into a pod: only threads that
//! do nothing else enter one (`links::pool`).

use std::{
    collections::HashSet,
    ffi::OsStr,
    fmt, fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns},
    sys::{
        stat::{Mode, fstat},
        statfs::{NSFS_MAGIC, fstatfs},
    },
};
use nsm_core::{
    identity::{NamespaceId, UserNamespace},
    net::NetnsUrl,
};

/// Where `ip netns add` and container runtimes mount namespaces.
const RUN_NETNS: &str = "/run/netns";

/// The namespace of the calling thread.
const THREAD: &str = "/proc/thread-self/ns/net";

/// An open network namespace. A clone is the same handle.
#[derive(Clone)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    id: NamespaceId,
}

/// Why there is no network namespace to work in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetnsError {
    /// Nothing is there. For a namespace that was known before: the pod is gone.
    #[error("no network namespace at {0}: there is no such path; is the pod still running?")]
    Missing(PathBuf),
    /// Something is there, but no namespace.
    #[error(
        "{0} is no namespace: name a file such as /run/netns/<name> or /proc/<pid>/ns/net{hint}", hint = unmounted_hint(.0)
    )]
    NotANamespace(PathBuf),
    /// A namespace of another kind.
    #[error("{path} is a namespace of kind {kind}, not a network namespace")]
    OtherKind {
        /// What was opened.
        path: PathBuf,
        /// Its kind.
        kind: &'static str,
    },
    /// No process and no mount in /run/netns has the namespace.
    #[error(
        "no network namespace with device and inode {0}: no process here is in it and nothing in {RUN_NETNS} mounts it; \
         is the pod on this node, and does the agent see the host's processes (hostPID)?"
    )]
    UnknownId(NamespaceId),
    /// Not allowed to open it.
    #[error(
        "may not open network namespace {path} ({errno}): run the agent as root, or with CAP_SYS_PTRACE for other users' processes"
    )]
    OpenDenied {
        /// What could not be opened.
        path: PathBuf,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Not allowed to work in it.
    #[error(
        "may not enter network namespace {id} ({errno}): run the agent as root, or with CAP_SYS_ADMIN"
    )]
    EnterDenied {
        /// The namespace.
        id: NamespaceId,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The kernel refused for another reason.
    #[error("{action} of network namespace {what} failed: {errno}")]
    Failed {
        /// What was tried.
        action: &'static str,
        /// Where.
        what: String,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl NetnsError {
    /// Whether the namespace does not exist, so that nothing can be left in it.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        matches!(self, Self::Missing(_) | Self::UnknownId(_))
    }

    /// Whether no namespace is there, in whatever way: that of a pod which was deleted where this process does not see mounts leaves a file.
    #[must_use]
    pub const fn is_no_namespace(&self) -> bool {
        self.is_gone() || matches!(self, Self::NotANamespace(_))
    }
}

/// `ip netns add` leaves an empty file when its mount is gone or was made in another mount namespace.
fn unmounted_hint(path: &Path) -> &'static str {
    if path.starts_with(RUN_NETNS) || path.starts_with("/var/run/netns") {
        "; nothing is mounted on it here, so it was deleted, or made where this process does not see mounts (mountPropagation: HostToContainer)"
    } else {
        ""
    }
}

nix::ioctl_none_bad!(
    /// NS_GET_USERNS of linux/nsfs.h: a descriptor of the user namespace that owns the namespace.
    ns_get_userns,
    nix::request_code_none!(0xb7, 0x1)
);

nix::ioctl_none_bad!(
    /// NS_GET_PARENT: a descriptor of the parent of a user namespace.
    ns_get_parent,
    nix::request_code_none!(0xb7, 0x2)
);

nix::ioctl_read_bad!(
    /// NS_GET_OWNER_UID: the user that made a user namespace.
    ns_get_owner_uid,
    nix::request_code_none!(0xb7, 0x4),
    u32
);

nix::ioctl_none_bad!(
    /// NS_GET_NSTYPE of linux/nsfs.h: the CLONE_NEW* flag of the namespace's kind.
    ns_get_nstype,
    nix::request_code_none!(0xb7, 0x3)
);

impl Netns {
    /// Opens the namespace at a path such as `/run/netns/pod` or `/proc/1234/ns/net`.
    ///
    /// # Errors
    ///
    /// Nothing is there, it is no network namespace, or it may not be opened.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        // Without O_PATH a device or a pipe would be opened for good, with what that does; it is looked at first.
        let look = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|errno| open_failed(path, errno))?;
        check_file_system(look.as_fd(), path)?;
        let handle = reopen(look.as_fd()).map_err(|errno| open_failed(path, errno))?;
        Self::checked(handle, path)
    }

    /// The namespace behind a descriptor that was passed to this process. It may have been opened with O_PATH, which shows that its sender
    /// could reach it and works for nothing else: it is opened again.
    ///
    /// # Errors
    ///
    /// It is no network namespace.
    pub fn from_fd(fd: BorrowedFd<'_>) -> Result<Self, NetnsError> {
        let shown = Path::new("(the descriptor that was passed)");
        check_file_system(fd, shown)?;
        let handle = reopen(fd).map_err(|errno| open_failed(shown, errno))?;
        Self::checked(handle, shown)
    }

    /// The namespace with this id, which is how NSM's clients name theirs (`inode://device/inode`).
    ///
    /// All processes are looked through, a few microseconds each: not for a thread that must not wait.
    ///
    /// # Errors
    ///
    /// No process and no mount in /run/netns that may be looked at has it.
    pub fn from_id(id: NamespaceId) -> Result<Self, NetnsError> {
        // A process that ends meanwhile is no reason to stop: another may be in the same namespace.
        candidates()
            .filter(|path| id_of(path) == Some(id))
            .find_map(|path| Self::open(&path).ok().filter(|netns| netns.id == id))
            .ok_or(NetnsError::UnknownId(id))
    }

    /// The namespace that a mechanism's parameters name. Waits as [`Self::from_id`] does.
    ///
    /// # Errors
    ///
    /// As [`Self::open`] and [`Self::from_id`].
    pub fn from_url(url: &NetnsUrl) -> Result<Self, NetnsError> {
        match url {
            NetnsUrl::File(path) => Self::open(path),
            &NetnsUrl::Inode { dev: device, inode } => Self::from_id(NamespaceId { device, inode }),
        }
    }

    /// The namespace that the calling thread is in.
    ///
    /// # Errors
    ///
    /// /proc is not mounted.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open(Path::new(THREAD))
    }

    /// Every namespace that a process is in or that is mounted in /run/netns, each once, those that may not be opened left out.
    ///
    /// Waits as [`Self::from_id`] does. Drop what is not needed: the handles keep the namespaces alive.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut seen = HashSet::new();
        candidates()
            .filter(|path| id_of(path).is_some_and(|id| seen.insert(id)))
            .filter_map(|path| Self::open(&path).ok())
            .collect()
    }

    /// The user namespaces that this namespace belongs to: its owner, that one's parent, and so on up to the last that this process may
    /// see, which is its own or the machine's first.
    ///
    /// # Errors
    ///
    /// The namespace belongs to a user namespace that is neither this process's own nor below it.
    pub fn owners(&self) -> Result<Vec<UserNamespace>, NetnsError> {
        let failed = |errno| NetnsError::Failed {
            action: "asking the user namespace",
            what: self.id.to_string(),
            errno,
        };
        // SAFETY: the request takes no argument; `self` is open for the call.
        let first = unsafe { ns_get_userns(self.fd.as_raw_fd()) }.map_err(failed)?;
        // SAFETY: the kernel has just made this descriptor for us.
        let mut next = Some(unsafe { OwnedFd::from_raw_fd(first) });
        let mut owners = Vec::new();
        while let Some(namespace) = next.take() {
            owners.push(user_namespace(&namespace).map_err(failed)?);
            // SAFETY: as above.
            next = unsafe { ns_get_parent(namespace.as_raw_fd()) }
                .ok()
                // SAFETY: as above.
                .map(|parent| unsafe { OwnedFd::from_raw_fd(parent) });
        }
        Ok(owners)
    }

    /// The identity of this namespace.
    #[must_use]
    pub const fn id(&self) -> NamespaceId {
        self.id
    }

    /// The inode of the namespace, as `ls -i` and `lsns` show it.
    #[must_use]
    pub const fn inode(&self) -> u64 {
        self.id.inode
    }

    /// Moves the calling thread into the namespace: see the module's reasoning.
    pub(crate) fn enter(&self) -> Result<(), NetnsError> {
        // Staying needs no right, so an agent without rights can still look up routes.
        if id_of(Path::new(THREAD)) == Some(self.id) {
            return Ok(());
        }
        setns(self, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
            Errno::EPERM => NetnsError::EnterDenied { id: self.id, errno },
            errno => NetnsError::Failed {
                action: "entering",
                what: self.id.to_string(),
                errno,
            },
        })
    }

    fn checked(fd: OwnedFd, path: &Path) -> Result<Self, NetnsError> {
        // SAFETY: the request takes no argument and only reads the kind of the namespace; `fd` is open for the call.
        let flag = unsafe { ns_get_nstype(fd.as_raw_fd()) }
            .map_err(|errno| failed("asking the kind", path, errno))?;
        let kind = CloneFlags::from_bits_retain(flag);
        if kind != CloneFlags::CLONE_NEWNET {
            return Err(NetnsError::OtherKind {
                path: path.to_owned(),
                kind: kind_name(kind),
            });
        }
        let stat = fstat(&fd).map_err(|errno| failed("asking the inode", path, errno))?;
        Ok(Self {
            fd: Arc::new(fd),
            id: NamespaceId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netns({})", self.id)
    }
}

fn user_namespace(namespace: &OwnedFd) -> Result<UserNamespace, Errno> {
    let stat = fstat(namespace)?;
    let mut owner = 0;
    // SAFETY: the request writes a user number, which `owner` has room for; `namespace` is open for the call.
    unsafe { ns_get_owner_uid(namespace.as_raw_fd(), &raw mut owner) }?;
    Ok(UserNamespace {
        id: NamespaceId {
            device: stat.st_dev,
            inode: stat.st_ino,
        },
        owner,
    })
}

fn reopen(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    open(
        format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str(),
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
}

fn check_file_system(fd: BorrowedFd<'_>, path: &Path) -> Result<(), NetnsError> {
    let file_system = fstatfs(fd).map_err(|errno| failed("asking the file system", path, errno))?;
    if file_system.filesystem_type() == NSFS_MAGIC {
        Ok(())
    } else {
        Err(NetnsError::NotANamespace(path.to_owned()))
    }
}

fn open_failed(path: &Path, errno: Errno) -> NetnsError {
    match errno {
        // ESRCH: the process of /proc/<pid> ended in between. ENOTDIR: a part of the path is a file.
        Errno::ENOENT | Errno::ESRCH | Errno::ENOTDIR => NetnsError::Missing(path.to_owned()),
        Errno::EACCES | Errno::EPERM => NetnsError::OpenDenied {
            path: path.to_owned(),
            errno,
        },
        errno => failed("opening", path, errno),
    }
}

fn failed(action: &'static str, path: &Path, errno: Errno) -> NetnsError {
    NetnsError::Failed {
        action,
        what: path.display().to_string(),
        errno,
    }
}

fn kind_name(kind: CloneFlags) -> &'static str {
    /// CLONE_NEWTIME of linux/sched.h, which nix lacks.
    const TIME: CloneFlags = CloneFlags::from_bits_retain(0x80);
    match kind {
        CloneFlags::CLONE_NEWNS => "mnt",
        CloneFlags::CLONE_NEWCGROUP => "cgroup",
        CloneFlags::CLONE_NEWUTS => "uts",
        CloneFlags::CLONE_NEWIPC => "ipc",
        CloneFlags::CLONE_NEWUSER => "user",
        CloneFlags::CLONE_NEWPID => "pid",
        TIME => "time",
        _ => "unknown",
    }
}

/// Paths where a network namespace can be found, mounts first: there are fewer.
fn candidates() -> impl Iterator<Item = PathBuf> {
    let is_pid = |name: &OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
    entries(RUN_NETNS).chain(
        entries("/proc")
            .filter(move |path| path.file_name().is_some_and(is_pid))
            .map(|path| path.join("ns/net")),
    )
}

/// The id of whatever the path leads to, for one call a path instead of five.
fn id_of(path: &Path) -> Option<NamespaceId> {
    let metadata = fs::metadata(path).ok()?;
    Some(NamespaceId {
        device: metadata.dev(),
        inode: metadata.ino(),
    })
}

fn entries(directory: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let listing: io::Result<fs::ReadDir> = fs::read_dir(directory);
    listing
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_no_network_namespace() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();

        let open = |path: &Path| Netns::open(path).unwrap_err();
        assert_eq!(open(&file), NetnsError::NotANamespace(file.clone()));
        assert_eq!(
            open(folder.path()),
            NetnsError::NotANamespace(folder.path().to_owned())
        );
        assert_eq!(
            open(Path::new("/dev/null")),
            NetnsError::NotANamespace("/dev/null".into())
        );
        let missing = folder.path().join("missing");
        assert_eq!(open(&missing), NetnsError::Missing(missing));
        let below = file.join("below");
        assert_eq!(open(&below), NetnsError::Missing(below));
        let uts = PathBuf::from("/proc/self/ns/uts");
        assert_eq!(
            open(&uts),
            NetnsError::OtherKind {
                path: uts,
                kind: "uts"
            }
        );
    }

    #[test]
    fn a_pipe_is_refused_without_waiting_for_its_writer() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        assert_eq!(
            Netns::open(&pipe).unwrap_err(),
            NetnsError::NotANamespace(pipe)
        );
    }

    #[test]
    fn every_way_leads_to_the_same_namespace() {
        let current = Netns::current().unwrap();
        assert_eq!(
            Netns::open(Path::new("/proc/self/ns/net")).unwrap().id(),
            current.id()
        );
        assert_eq!(Netns::from_id(current.id()).unwrap().id(), current.id());
        assert_eq!(Netns::from_fd(current.as_fd()).unwrap().id(), current.id());
        let path_only = open(
            "/proc/self/ns/net",
            OFlag::O_PATH | OFlag::O_CLOEXEC,
            Mode::empty(),
        );
        let passed = Netns::from_fd(path_only.unwrap().as_fd()).unwrap();
        assert_eq!(passed.id(), current.id());
        assert!(
            Netns::all()
                .iter()
                .filter(|netns| netns.id() == current.id())
                .count()
                == 1
        );
        assert_eq!(current.clone().inode(), current.inode());
        current.enter().unwrap();
    }

    #[test]
    fn the_owner_of_our_own_namespace_is_in_our_sight() {
        let owners = Netns::current().unwrap().owners().unwrap();
        let own = id_of(Path::new("/proc/self/ns/user")).unwrap();
        // Where this process has a user namespace of its own and not the network namespace, the question is refused.
        assert_eq!(owners.last().map(|last| last.id), Some(own));
    }

    #[test]
    fn an_unknown_id_is_told() {
        let nowhere = NamespaceId {
            device: 0,
            inode: 1,
        };
        let error = Netns::from_id(nowhere).unwrap_err();
        assert_eq!(error, NetnsError::UnknownId(nowhere));
        assert!(error.is_gone());
    }

    #[test]
    fn a_descriptor_of_a_file_is_refused() {
        let file = fs::File::open("/proc/self/status").unwrap();
        assert!(matches!(
            Netns::from_fd(file.as_fd()).unwrap_err(),
            NetnsError::NotANamespace(_)
        ));
        let mounts = fs::File::open("/proc/self/ns/mnt").unwrap();
        let error = Netns::from_fd(mounts.as_fd()).unwrap_err().to_string();
        assert!(
            error.contains("that was passed") && error.contains("kind mnt"),
            "{error}"
        );
    }
}
