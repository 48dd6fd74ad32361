//! Who is at the other end of a Unix connection.
//!
//! A process is known by a descriptor of it (pidfd), taken when the connection stands: `SO_PEERPIDFD` is the very process that
//! connected. Kernels before 6.5 have only its number, whose process is opened at once; a process that ends between its connect and
//! our accept, and whose number is given to another one meanwhile, would be taken for that one there. What `/proc` shows under the
//! number counts only if the process of the descriptor is still alive after it was read.
//!
//! A look costs a dozen system calls, so that it waits for the first call of a connection.

use std::{
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    sync::{Mutex, OnceLock},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        getsockopt,
        sockopt::{GetStruct, PeerCredentials, PeerPidfd},
    },
};
use nsm_core::identity::{Facts, NamespaceId, NetnsCookie, Node, Process, Surroundings};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, pidfd_open},
    time::Timespec,
};

use crate::{sync::lock, transport::clients::Origin};

/// The number of the network namespace that a socket is in (socket(7)).
#[derive(Debug, Clone, Copy)]
struct SocketNetns;

nix::getsockopt_impl!(
    SocketNetns,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    u64,
    GetStruct<u64>
);

/// CAP_SYS_ADMIN of linux/capability.h, as a bit.
const SYS_ADMIN: u64 = 1 << 21;

/// The process at the other end of a connection.
#[derive(Debug)]
pub(crate) struct PeerProcess {
    user: Option<u32>,
    home: Option<NetnsCookie>,
    pid: Option<Pid>,
    /// Kept until the look.
    held: Mutex<Option<OwnedFd>>,
    seen: OnceLock<Process>,
}

impl PeerProcess {
    /// Takes hold of the process that connected to us, or that listens where we have connected to.
    pub(crate) fn of(stream: &tokio::net::UnixStream) -> Self {
        let credentials = getsockopt(stream, PeerCredentials).ok();
        let pid = credentials.and_then(|it| Pid::from_raw(it.pid()));
        let held = match getsockopt(stream, PeerPidfd) {
            // Only a kernel before 6.5: with any other error the process is gone, and its number may be another one's.
            Err(Errno::ENOPROTOOPT) => pid.and_then(|it| pidfd_open(it, PidfdFlags::empty()).ok()),
            held => held.ok(),
        };
        Self {
            user: credentials.map(|it| it.uid()),
            // An accepted socket is in the network namespace of the socket that connected to it.
            home: getsockopt(stream, SocketNetns).ok().map(NetnsCookie),
            pid,
            held: Mutex::new(held),
            seen: OnceLock::new(),
        }
    }

    /// Where its connection is counted.
    pub(crate) fn origin(&self) -> Origin {
        Origin::Process(self.user, self.home)
    }

    /// The process as it was at the first look.
    pub(crate) fn look(&self) -> Process {
        *self.seen.get_or_init(|| {
            let held = lock(&self.held).take();
            let facts = self.pid.zip(held).and_then(|(pid, held)| {
                let process = format!("/proc/{}", pid.as_raw_nonzero());
                let found = facts(&process)?;
                // A process that has become another user since, by a set-user-ID program, is that user's: its rights are not the caller's.
                let is_same = status(&process)?
                    .users
                    .iter()
                    .all(|user| Some(*user) == self.user);
                (is_same && is_alive(&held)).then_some(found)
            });
            Process::seen(self.user, self.home, facts, node())
        })
    }
}

/// This node, as the agent sees it.
pub(crate) fn node() -> &'static Node {
    static NODE: OnceLock<Node> = OnceLock::new();
    NODE.get_or_init(|| {
        let known = ["/proc/self", "/proc/1"].map(facts);
        let has_all_networks = known[1].is_some();
        let known = || known.iter().flatten();
        Node {
            own_user: fs::metadata("/proc/self").ok().map(|process| process.uid()),
            surroundings: known().map(|facts| facts.surroundings).collect(),
            networks: known().map(|facts| facts.net).collect(),
            has_all_networks,
        }
    })
}

/// Whether this process may look at process 1, whose namespaces are the node's.
pub fn sees_process_1() -> bool {
    node().has_all_networks
}

/// The namespace, or whatever is at a path.
pub(crate) fn namespace_at(path: &Path) -> Option<NamespaceId> {
    let metadata = fs::metadata(path).ok()?;
    Some(NamespaceId {
        device: metadata.dev(),
        inode: metadata.ino(),
    })
}

/// What `/proc` shows of a process; none where it is gone, or may not be looked at.
fn facts(process: &str) -> Option<Facts> {
    let namespace = |kind| namespace_at(&Path::new(process).join("ns").join(kind));
    Some(Facts {
        surroundings: Surroundings {
            pid: namespace("pid")?,
            mount: namespace("mnt")?,
            user: namespace("user")?,
        },
        net: namespace("net")?,
        has_sys_admin: status(process)?.effective_capabilities & SYS_ADMIN != 0,
    })
}

/// What `status` of a process shows (proc_pid_status(5)).
struct Status {
    /// The real, effective, saved and file system user.
    users: Vec<u32>,
    /// A bit a capability.
    effective_capabilities: u64,
}

fn status(process: &str) -> Option<Status> {
    let text = fs::read_to_string(format!("{process}/status")).ok()?;
    let value = |name| text.lines().find_map(|line: &str| line.strip_prefix(name));
    let users = value("Uid:")?.split_whitespace().map(str::parse);
    Some(Status {
        users: users.collect::<Result<_, _>>().ok()?,
        effective_capabilities: u64::from_str_radix(value("CapEff:")?.trim(), 16).ok()?,
    })
}

/// A descriptor of a process can be read once that has ended.
fn is_alive(process: &impl AsFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut ended = [PollFd::new(process, PollFlags::IN)];
    poll(&mut ended, Some(&now)) == Ok(0)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use tokio::{
        io::AsyncReadExt as _,
        net::{UnixListener, UnixStream},
    };

    use super::*;

    #[tokio::test]
    async fn the_other_end_of_a_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let process = PeerProcess::of(&one).look();
        let own = facts("/proc/self").unwrap();
        assert_eq!(process.facts, Some(own));
        assert_eq!(process.user, node().own_user);
        assert!(process.home.is_some());
        assert!(process.is_administrator);
        assert!(node().networks.contains(&own.net));
    }

    /// A process that runs these lines of Python once it has connected as `peer`, and our end.
    async fn connected(then: &str) -> (Child, UnixStream) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let script = format!(
            "import os, socket, sys\n\
             peer = socket.socket(socket.AF_UNIX)\n\
             peer.connect(sys.argv[1])\n\
             {then}"
        );
        let mut python = Command::new("python3");
        let child = python.args(["-c", &script]).arg(&path).spawn().unwrap();
        (child, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn what_has_ended_is_not_seen() {
        let (mut child, accepted) = connected("").await;
        let peer = PeerProcess::of(&accepted);
        child.wait().unwrap();
        let process = peer.look();
        assert_eq!((process.user, process.facts), (node().own_user, None));
        assert!(!process.is_administrator);
    }

    /// As a set-user-ID program is after its start: the socket still shows who connected, and `/proc` the rights of another.
    #[tokio::test]
    #[ignore = "needs root: changes the user"]
    async fn what_has_become_another_user_is_not_seen() {
        let then = "os.setresuid(65534, 65534, 0)\n\
                    peer.send(b'.')\n\
                    peer.recv(1)";
        let (mut child, mut accepted) = connected(then).await;
        let peer = PeerProcess::of(&accepted);
        accepted.read_exact(&mut [0]).await.unwrap();
        let process = peer.look();
        assert_eq!((process.user, process.facts), (Some(0), None));
        assert!(!process.is_administrator);
        drop(accepted);
        child.wait().unwrap();
    }
}
