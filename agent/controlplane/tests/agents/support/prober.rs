//! A prober that sends nothing: paths are what a test says they are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nsm_controlplane::ports::{PeerSpec, Prober, WatchError};
use nsm_core::{
    liveness::{
        Finding, Health, PathEvent, PathId, PeerReport, Reason, Reflector, Verdict,
        sbfd::Discriminator,
    },
    net::Vni,
};
use tokio::sync::mpsc;

/// The path to a peer, as a test wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    Up,
    Down,
    /// The node's own firewall drops what comes.
    Blocked,
    /// What comes from the peer comes in.
    DownOutwards,
    /// There is no session to ask.
    Unanswerable,
}

#[derive(Debug, Default)]
struct Table {
    watched: BTreeMap<PathId, (PeerSpec, BTreeSet<String>)>,
    /// Paths that are not up.
    lost: HashMap<IpAddr, Path>,
    mtus: HashMap<IpAddr, u16>,
    silences: HashMap<IpAddr, Duration>,
    proofs: Vec<IpAddr>,
    /// What peers say, by the connection that brought it.
    words: BTreeMap<(IpAddr, String), PeerReport>,
    refuses: bool,
    /// Reflectors that nobody has.
    nobodys: BTreeSet<Discriminator>,
}

/// The sessions of one node.
#[derive(Debug)]
pub(crate) struct FakeProber {
    reflector: Reflector,
    table: Mutex<Table>,
    events: mpsc::UnboundedSender<PathEvent>,
    pending: tokio::sync::Mutex<mpsc::UnboundedReceiver<PathEvent>>,
    /// Times that somebody came for an event: what was told before is dealt with.
    visits: AtomicUsize,
}

impl FakeProber {
    /// The prober of the node with this tunnel address.
    pub(crate) fn of(ip: IpAddr) -> Self {
        let (events, pending) = mpsc::unbounded_channel();
        let number = match ip {
            IpAddr::V4(ip) => ip.to_bits(),
            IpAddr::V6(ip) => ip.to_bits() as u32,
        };
        Self {
            reflector: Reflector {
                discriminator: Discriminator::new(number).expect("an address"),
                vni: Vni::try_from(1).expect("a VNI"),
            },
            table: Mutex::default(),
            events,
            pending: tokio::sync::Mutex::new(pending),
            visits: AtomicUsize::new(0),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no holder panics")
    }

    /// Which connections watch paths to which addresses.
    pub(crate) fn watched(&self) -> BTreeMap<IpAddr, BTreeSet<String>> {
        let mut all: BTreeMap<IpAddr, BTreeSet<String>> = BTreeMap::new();
        for (path, (_, users)) in &self.table().watched {
            all.entry(path.address).or_default().extend(users.clone());
        }
        all
    }

    /// The paths that are watched.
    pub(crate) fn paths(&self) -> Vec<PathId> {
        self.table().watched.keys().copied().collect()
    }

    /// A watched peer, as it told itself.
    pub(crate) fn peer(&self, ip: &str) -> Option<PeerSpec> {
        let ip: IpAddr = ip.parse().expect("an address");
        let table = self.table();
        let mut watched = table.watched.iter();
        watched.find_map(|(path, (spec, _))| (path.address == ip).then_some(*spec))
    }

    /// Nobody answers to this discriminator.
    pub(crate) fn is_nobodys(&self, discriminator: Discriminator) {
        self.table().nobodys.insert(discriminator);
    }

    /// Paths that were proved, in order.
    pub(crate) fn proofs(&self) -> Vec<IpAddr> {
        self.table().proofs.clone()
    }

    /// What the peer says of the path to us, through each connection that brought a word: its way in and its way out.
    pub(crate) fn words(&self, peer: &str) -> Vec<(Verdict, Verdict)> {
        let peer: IpAddr = peer.parse().expect("an address");
        let table = self.table();
        let words = table.words.iter().filter(|((ip, _), _)| *ip == peer);
        words.map(|(_, word)| (word.inward, word.outward)).collect()
    }

    /// From now on the path to `ip` is so.
    pub(crate) fn set(&self, ip: &str, path: Path) {
        let ip: IpAddr = ip.parse().expect("an address");
        self.table().lost.insert(ip, path);
        self.tell(ip);
    }

    /// From now on the path to `ip` is known to carry so much.
    pub(crate) fn set_mtu(&self, ip: &str, mtu: u16) {
        let ip: IpAddr = ip.parse().expect("an address");
        self.table().mtus.insert(ip, mtu);
        self.tell(ip);
    }

    /// The path to `ip` has been lost for so long by now, which is no event.
    pub(crate) fn silent_for(&self, ip: &str, silence: Duration) {
        let ip: IpAddr = ip.parse().expect("an address");
        self.table().silences.insert(ip, silence);
    }

    /// Packets of a VNI come in that is no tunnel here.
    pub(crate) fn see_foreign(&self, peer: &str, vni: u32) {
        let _ = self.events.send(PathEvent::ForeignVni {
            peer: peer.parse().expect("an address"),
            vni: Vni::try_from(vni).expect("a VNI"),
        });
    }

    /// Watches nobody more.
    pub(crate) fn refuse(&self) {
        self.table().refuses = true;
    }

    /// How often somebody came for an event so far.
    pub(crate) fn visits(&self) -> usize {
        self.visits.load(Ordering::SeqCst)
    }

    fn tell(&self, ip: IpAddr) {
        let paths: Vec<PathId> = self.table().watched.keys().copied().collect();
        for path in paths.into_iter().filter(|path| path.address == ip) {
            if let Some(health) = self.health(&path) {
                let _ = self.events.send(PathEvent::Changed { path, health });
            }
        }
    }
}

#[tonic::async_trait]
impl Prober for FakeProber {
    fn reflector(&self) -> Reflector {
        self.reflector
    }

    async fn join(&self, user: &str, peer: &PeerSpec) -> Result<(), WatchError> {
        let mut table = self.table();
        if table.refuses {
            return Err(WatchError {
                peer: peer.path.address,
                cause: "1,024 peers are watched already".to_owned(),
            });
        }
        let (spec, users) = table
            .watched
            .entry(peer.path)
            .or_insert((*peer, BTreeSet::new()));
        *spec = *peer;
        users.insert(user.to_owned());
        Ok(())
    }

    fn leave(&self, user: &str, path: &PathId) {
        let mut table = self.table();
        if let Some((_, users)) = table.watched.get_mut(path) {
            users.remove(user);
            if users.is_empty() {
                table.watched.remove(path);
            }
        }
        table.words.remove(&(path.address, user.to_owned()));
    }

    async fn prove(&self, path: &PathId) -> Option<Health> {
        self.table().proofs.push(path.address);
        self.health(path)
    }

    fn health(&self, path: &PathId) -> Option<Health> {
        let table = self.table();
        table.watched.get(path)?;
        let peer = path.address;
        let is_nobodys = table.nobodys.contains(&path.reflector.discriminator);
        let lost = match table.lost.get(&peer) {
            _ if is_nobodys => Some(&Path::Down),
            lost => lost,
        };
        let (verdict, reason) = match lost {
            Some(Path::Unanswerable) => return None,
            Some(Path::Down | Path::DownOutwards) => (
                Verdict::Down,
                Reason::Unanswered {
                    probes: 5,
                    silence: table
                        .silences
                        .get(&peer)
                        .copied()
                        .unwrap_or(Duration::from_millis(130)),
                },
            ),
            Some(Path::Blocked) => (Verdict::Down, Reason::OwnInputDrops { packets: 9 }),
            _ => (Verdict::Up, Reason::Answered),
        };
        let way = Finding { verdict, reason };
        let inward = match lost {
            Some(Path::DownOutwards) => Finding {
                verdict: Verdict::Up,
                reason: Reason::PeerProbesArrive,
            },
            _ => way,
        };
        Some(Health {
            peer,
            port: path.port,
            inward,
            outward: way,
            path_mtu: table.mtus.get(&peer).copied(),
        })
    }

    fn report(&self, user: &str, path: &PathId, word: Option<PeerReport>) {
        let mut table = self.table();
        let key = (path.address, user.to_owned());
        let is_counted = table
            .watched
            .get(path)
            .is_some_and(|(_, users)| users.contains(user));
        match word.filter(|_| is_counted) {
            Some(word) => drop(table.words.insert(key, word)),
            None => drop(table.words.remove(&key)),
        }
    }

    async fn next_event(&self) -> PathEvent {
        self.visits.fetch_add(1, Ordering::SeqCst);
        let mut pending = self.pending.lock().await;
        match pending.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}
