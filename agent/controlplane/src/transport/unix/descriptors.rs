//! Descriptors that come beside a stream: held for a short while, until a message names them.
//!
//! NSM names a file by `inode://<device>/<inode>` and passes its descriptor over the same Unix
//! connection (SCM_RIGHTS of unix(7)). The sender puts the descriptor in front of the message that
//! names it, but nothing ties the two to each other: what came is kept by device and inode, and a
//! message takes a copy. Senders pass their descriptors again with every Request and Close, so none
//! is kept longer than one call may take.
//!
//! In the other direction a descriptor goes in front of the next bytes; one that finds none for as
//! long is dropped, too.
//!
//! What a peer can make us hold is bounded: [`MAX_HELD`] descriptors a connection, for [`HELD_FOR`],
//! and only those of namespaces and sockets. All go when the connection does.

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use nsm_core::{
    identity::Process,
    net::{PeerPlace, PeerUrl},
};
use rustix::fs::{FileType, fstat, fstatfs};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};

use super::process::PeerProcess;
use crate::sync::lock;

/// Descriptors of one connection that are held at one time. A peer has one or two in flight for each
/// of its calls; of more the oldest goes.
const MAX_HELD: usize = 64;

/// How long a descriptor is held after it came last: longer than a Request takes (15 s).
const HELD_FOR: Duration = Duration::from_secs(30);

/// How long a message waits for a descriptor that should have come before it. Only a sender with more
/// descriptors in flight than one write carries (64, in gRPC's Go transport) is late, by one write.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// NSFS_MAGIC of linux/magic.h: the file system of namespaces.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// What tells one file from another on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl FileId {
    /// The file that `url` names by its inode.
    pub(crate) fn of(url: &PeerUrl) -> Option<Self> {
        match *url.place() {
            PeerPlace::Passed { device, inode } => Some(Self { device, inode }),
            PeerPlace::Unix(_) | PeerPlace::Tcp { .. } => None,
        }
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode://{}/{}", self.device, self.inode)
    }
}

/// What a descriptor is of, as far as NSM passes any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A namespace; of which kind only the dataplane asks.
    Namespace,
    /// A Unix socket's file.
    Socket,
    /// Anything else: closed at once, and remembered only to say so.
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Namespace => "a namespace",
            Self::Socket => "a socket",
            Self::Other => "another kind of file",
        })
    }
}

/// A descriptor that a peer has passed. A clone is the same one.
#[derive(Clone)]
pub struct Passed(Arc<OwnedFd>);

impl Passed {
    /// Takes over a descriptor.
    pub fn new(descriptor: OwnedFd) -> Self {
        Self(Arc::new(descriptor))
    }

    /// Where it can be opened again, as long as this value lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

impl AsFd for Passed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl fmt::Debug for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Passed({})", self.0.as_raw_fd())
    }
}

/// Why there is no descriptor for a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MissingDescriptor {
    #[error("no descriptor of it came over the connection")]
    NotPassed,
    #[error("the descriptor that came with it is of {found}, not of {wanted}")]
    Kind { found: Kind, wanted: Kind },
}

#[derive(Debug)]
struct Held {
    id: FileId,
    kind: Kind,
    /// Absent for what is of no use.
    descriptor: Option<Passed>,
    until: Instant,
}

#[derive(Debug, Default)]
struct Store {
    /// The one that came last is at the back.
    held: VecDeque<Held>,
    /// To go with the next bytes that are written, if that is soon.
    outgoing: VecDeque<(Passed, Instant)>,
    /// Whether a task waits to drop what is due.
    swept: bool,
}

/// The descriptors of one connection, in both directions.
#[derive(Debug, Default)]
pub struct Descriptors {
    store: Mutex<Store>,
    came: Notify,
    /// Who listens at the other end, where it is we who have connected.
    peer: Mutex<Option<Arc<PeerProcess>>>,
}

impl Descriptors {
    /// Takes in what has come beside the stream.
    pub(crate) fn receive(self: &Arc<Self>, descriptors: impl IntoIterator<Item = OwnedFd>) {
        let until = Instant::now() + HELD_FOR;
        let mut store = lock(&self.store);
        for descriptor in descriptors {
            let Some((id, kind)) = identify(&descriptor) else {
                continue;
            };
            let again = store.held.iter().position(|held| held.id == id);
            // Whichever of two is kept, it is the same file.
            let descriptor = match again.and_then(|at| store.held.remove(at)) {
                Some(held) => held.descriptor,
                None if kind == Kind::Other => None,
                None => Some(Passed::new(descriptor)),
            };
            if store.held.len() >= MAX_HELD {
                store.held.pop_front();
            }
            store.held.push_back(Held {
                id,
                kind,
                descriptor,
                until,
            });
        }
        let any = !store.held.is_empty();
        self.sweep_if(any, &mut store);
        drop(store);
        self.came.notify_waiters();
    }

    /// The descriptor of the file `id`, which must be of `wanted`; waits for one that is late.
    pub(crate) async fn take(
        &self,
        id: FileId,
        wanted: Kind,
        patience: Duration,
    ) -> Result<Passed, MissingDescriptor> {
        let waiting = async {
            loop {
                let came = self.came.notified();
                tokio::pin!(came);
                // Enrolled before the look, so that nothing comes between the two unseen.
                came.as_mut().enable();
                if let Some(found) = self.look(id, wanted) {
                    return found;
                }
                came.await;
            }
        };
        timeout(patience, waiting)
            .await
            .unwrap_or(Err(MissingDescriptor::NotPassed))
    }

    fn look(&self, id: FileId, wanted: Kind) -> Option<Result<Passed, MissingDescriptor>> {
        let store = lock(&self.store);
        let held = store.held.iter().find(|held| held.id == id)?;
        let found = held.kind;
        let descriptor = held.descriptor.clone().filter(|_| found == wanted);
        Some(descriptor.ok_or(MissingDescriptor::Kind { found, wanted }))
    }

    /// We have connected to `peer`.
    pub(super) fn connected(&self, peer: Arc<PeerProcess>) {
        *lock(&self.peer) = Some(peer);
    }

    /// The process that listens at the other end; unknown where nothing is connected.
    pub(crate) fn peer(&self) -> Process {
        let peer = lock(&self.peer).clone();
        peer.map_or_else(Process::unknown, |peer| peer.look())
    }

    /// The connection is gone; another may come in its place.
    pub(super) fn forget_received(&self) {
        lock(&self.store).held.clear();
    }

    /// Sends a descriptor in front of the next bytes that are written.
    pub fn send(self: &Arc<Self>, descriptor: Passed) {
        let mut store = lock(&self.store);
        let until = Instant::now() + HELD_FOR;
        store.outgoing.push_back((descriptor, until));
        self.sweep_if(true, &mut store);
    }

    fn sweep_if(self: &Arc<Self>, wanted: bool, store: &mut Store) {
        if wanted && !store.swept {
            store.swept = true;
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }

    /// Sends what is to go with the next bytes, at most `limit`, by `send`, which does not wait.
    pub(super) fn send_with<T>(
        &self,
        limit: usize,
        send: impl FnOnce(&[BorrowedFd<'_>]) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut store = lock(&self.store);
        let first = store.outgoing.iter().take(limit);
        let first: Vec<_> = first.map(|(descriptor, _)| descriptor.as_fd()).collect();
        let sent = send(&first)?;
        let count = first.len();
        store.outgoing.drain(..count);
        Ok(sent)
    }

    #[cfg(test)]
    fn held(&self) -> usize {
        lock(&self.store).held.len()
    }

    /// Drops what is due; gives when the next is.
    fn drop_due(&self, now: Instant) -> Option<Instant> {
        let mut store = lock(&self.store);
        store.held.retain(|held| held.until > now);
        store.outgoing.retain(|(_, until)| *until > now);
        let held = store.held.front().map(|held| held.until);
        let outgoing = store.outgoing.front().map(|(_, until)| *until);
        let next = held.into_iter().chain(outgoing).min();
        store.swept = next.is_some();
        next
    }
}

/// Drops what is due until nothing is left, or the connection is gone.
async fn sweep(descriptors: Weak<Descriptors>) {
    let mut next = Instant::now() + HELD_FOR;
    loop {
        sleep_until(next).await;
        let Some(descriptors) = descriptors.upgrade() else {
            return;
        };
        match descriptors.drop_due(Instant::now()) {
            Some(due) => next = due,
            None => return,
        }
    }
}

/// What the descriptor is of. Works for one that was opened with O_PATH, as NSM's are.
fn identify(descriptor: &OwnedFd) -> Option<(FileId, Kind)> {
    let stat = fstat(descriptor).ok()?;
    let id = FileId {
        device: stat.st_dev,
        inode: stat.st_ino,
    };
    let is_namespace = || fstatfs(descriptor).is_ok_and(|system| system.f_type == NSFS_MAGIC);
    let kind = if FileType::from_raw_mode(stat.st_mode) == FileType::Socket {
        Kind::Socket
    } else if is_namespace() {
        Kind::Namespace
    } else {
        Kind::Other
    };
    Some((id, kind))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::MetadataExt as _};

    use super::*;

    const NETNS: &str = "/proc/self/ns/net";

    fn id_of(path: &str) -> FileId {
        let metadata = std::fs::metadata(path).unwrap();
        FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    fn open(path: &str) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_is_found_by_its_id_for_a_while() {
        let descriptors = Arc::new(Descriptors::default());
        descriptors.receive([open(NETNS)]);
        let found = descriptors
            .take(id_of(NETNS), Kind::Namespace, PATIENCE)
            .await
            .unwrap();
        assert_eq!(id_of(&found.path()), id_of(NETNS));
        // Passed again: still one, and as fresh as the second.
        tokio::time::sleep(HELD_FOR / 2).await;
        descriptors.receive([open(NETNS), open(NETNS)]);
        assert_eq!(descriptors.held(), 1);
        tokio::time::sleep(HELD_FOR * 3 / 4).await;
        assert_eq!(descriptors.held(), 1);
        tokio::time::sleep(HELD_FOR / 2).await;
        assert_eq!(descriptors.held(), 0);
        // And the next one is swept again.
        descriptors.receive([open(NETNS)]);
        tokio::time::sleep(HELD_FOR * 2).await;
        assert_eq!(descriptors.held(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_late_is_waited_for_and_one_that_never_comes_is_not() {
        let descriptors = Arc::new(Descriptors::default());
        let late = Arc::clone(&descriptors);
        tokio::spawn(async move {
            tokio::time::sleep(PATIENCE / 2).await;
            late.receive([open(NETNS)]);
        });
        let take = |path| descriptors.take(id_of(path), Kind::Namespace, PATIENCE);
        take(NETNS).await.unwrap();
        let missing = take("/proc/self/ns/mnt").await.unwrap_err();
        assert_eq!(missing, MissingDescriptor::NotPassed);
    }

    #[tokio::test]
    async fn what_is_of_no_use_is_closed_and_named() {
        let descriptors = Arc::new(Descriptors::default());
        descriptors.receive([open("/proc/self/status"), open(NETNS)]);
        let take = |path, kind| descriptors.take(id_of(path), kind, PATIENCE);
        let wrong = take("/proc/self/status", Kind::Namespace)
            .await
            .unwrap_err();
        assert!(
            wrong.to_string().contains("another kind of file"),
            "{wrong}"
        );
        let wrong = take(NETNS, Kind::Socket).await.unwrap_err();
        assert!(wrong.to_string().contains("not of a socket"), "{wrong}");
    }

    #[tokio::test]
    async fn the_oldest_goes_when_there_are_too_many() {
        let folder = tempfile::tempdir().unwrap();
        let descriptors = Arc::new(Descriptors::default());
        descriptors.receive([open(NETNS)]);
        descriptors.receive((0..MAX_HELD).map(|number| {
            let file = File::create(folder.path().join(number.to_string())).unwrap();
            file.into()
        }));
        assert_eq!(descriptors.held(), MAX_HELD);
        let missing = descriptors
            .take(id_of(NETNS), Kind::Namespace, Duration::ZERO)
            .await;
        assert_eq!(missing.unwrap_err(), MissingDescriptor::NotPassed);
    }
}
