//! The pin directory: what outlives the process.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use aya::maps::{Array, Map, MapData, MapInfo, MapType};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use nsm_ebpf_common::{
    Counters, Foreign, LAYOUT, MAX_FOREIGN, MAX_SLOTS, MAX_TUNNEL_ENTRIES, PORT_WORDS, REASONS,
    Tunnel, TunnelKey,
    fast::{ACCEPTED, HOPS, Hop, Settings, Taken},
    forward::{Device, Forward, MAX_DEVICES, ProbePath},
    management::{MAX_SESSIONS, NodeState, Session},
};

use super::{
    BpfError, Direction,
    error::{Capability, missing_of},
    role::Role,
    sys,
    tables::of_map,
};

/// Where Linux systems mount the BPF filesystem.
const BPFFS: &str = "/sys/fs/bpf";

/// The maps that are pinned, by name.
pub(super) const MAPS: [&str; 18] = [
    "TUNNELS",
    "FORWARD",
    "DEVICES",
    "LINKS",
    "PROBE_PATHS",
    "COUNTERS",
    "DROPS",
    "PORTS",
    "GENERATION",
    "FOREIGN",
    "NODE",
    "SESSIONS",
    "SESSION_INDEX",
    "SETTINGS",
    "HOPS",
    "ACCEPTED",
    "TAKEN",
    "LAYOUT",
];

/// Maps that earlier versions pinned. They are removed with the maps of another layout.
const FORMER_MAPS: [&str; 2] = ["EVENTS", "EVENT_BUDGET"];

/// What the names of pinned links start with.
const fn link_prefix(role: Role) -> &'static str {
    match role {
        Role::Underlay => "link_",
        Role::External => "external_link_",
        Role::Probe => "probe_link_",
    }
}

/// A directory on a BPF filesystem, locked by this process.
pub(super) struct PinDir {
    dir: PathBuf,
    /// Gone with the process, however that ends.
    lock: Flock<File>,
    /// The maps, held open: others can remove their pins.
    maps: Vec<(&'static str, MapData)>,
}

impl PinDir {
    /// Makes the directory when missing, and takes it.
    pub(super) fn open(dir: &Path, may_mount: bool) -> Result<Self, BpfError> {
        if !is_bpffs(dir) {
            if !may_mount || !dir.starts_with(BPFFS) {
                return Err(BpfError::NoBpffs {
                    dir: dir.to_owned(),
                });
            }
            mount_bpffs()?;
        }
        Ok(Self {
            dir: dir.to_owned(),
            lock: make_and_lock(dir)?,
            maps: Vec::new(),
        })
    }

    /// The directory.
    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// Holds the pinned maps open, so that [`Self::mend`] can pin them again.
    pub(super) fn hold_maps(&mut self) -> Result<(), BpfError> {
        let opened = MAPS.iter().map(|name| {
            let map = MapData::from_pin(self.map(name)).map_err(of_map(name, "open"))?;
            Ok((*name, map))
        });
        self.maps = opened.collect::<Result<_, BpfError>>()?;
        Ok(())
    }

    /// Makes the directory and the pins of the maps again where somebody removed them: without them the next agent would not find what
    /// this one has. Whether something was gone.
    pub(super) fn mend(&mut self) -> Result<bool, BpfError> {
        if self.maps.is_empty() {
            return Ok(false);
        }
        let mut was_gone = !self.is_locked();
        if was_gone {
            self.lock = make_and_lock(&self.dir)?;
        }
        for (name, map) in &self.maps {
            let path = self.dir.join(name);
            if path.exists() {
                continue;
            }
            map.pin(&path).map_err(|error| BpfError::Pin {
                action: "pin the map again at",
                path,
                source: io::Error::other(error),
            })?;
            was_gone = true;
        }
        Ok(was_gone)
    }

    /// Whether the directory is the one that was locked.
    fn is_locked(&self) -> bool {
        let of = |found: io::Result<Metadata>| found.ok().map(|it| (it.dev(), it.ino()));
        of(fs::metadata(&self.dir)) == of(self.lock.metadata())
    }

    /// Where a map is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where a link is pinned.
    pub(super) fn link(&self, role: Role, interface: &str, direction: Direction) -> PathBuf {
        self.dir.join(link_name(role, interface, direction))
    }

    /// Keeps the maps of an earlier agent when their layout is ours and says so, else removes them.
    pub(super) fn prepare_maps(&self) -> Result<bool, BpfError> {
        if MAPS.iter().all(|name| self.fits(name)) && self.layout() == Some(LAYOUT) {
            return Ok(true);
        }
        for name in MAPS.iter().chain(&FORMER_MAPS) {
            self.remove(&self.map(name))?;
        }
        Ok(false)
    }

    fn fits(&self, name: &str) -> bool {
        let Ok(info) = MapInfo::from_pin(self.map(name)) else {
            return false;
        };
        let found = (
            info.map_type().ok(),
            info.key_size(),
            info.value_size(),
            info.max_entries(),
        );
        found == expected_shape(name)
    }

    fn layout(&self) -> Option<u32> {
        let map = Map::from_map_data(MapData::from_pin(self.map("LAYOUT")).ok()?).ok()?;
        Array::<_, u32>::try_from(map).ok()?.get(&0, 0).ok()
    }

    /// The pinned links of a role: their paths.
    pub(super) fn links(&self, role: Role) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries
            .filter(|entry| {
                entry
                    .file_name()
                    .as_encoded_bytes()
                    .starts_with(link_prefix(role).as_bytes())
            })
            .map(|entry| entry.path())
            .collect()
    }

    /// Detaches a pinned link and removes its pin; one that is not there is fine.
    pub(super) fn remove_link(&self, path: &Path) -> Result<(), BpfError> {
        // Its interface may be gone. Whatever the reason, the link goes with its last pin.
        if let Err(error) = sys::detach_pinned_link(path) {
            tracing::debug!(pin = %path.display(), %error, "a link goes with its pin only");
        }
        self.remove(path)
    }

    /// Removes a pin; one that is not there is fine.
    pub(super) fn remove(&self, path: &Path) -> Result<(), BpfError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BpfError::Pin {
                action: "remove the pin",
                path: path.to_owned(),
                source: error,
            }),
            _ => Ok(()),
        }
    }

    /// Removes every pin of ours and the directory, on a path that already has an error to tell.
    pub(super) fn remove_all(&mut self) {
        if let Err(error) = self.remove_all_checked() {
            tracing::warn!(pin_dir = %self.dir.display(), %error, "pins stay behind");
        }
    }

    /// Removes every pin of ours, and the directory when nobody else put something there.
    pub(super) fn remove_all_checked(&mut self) -> Result<(), BpfError> {
        self.maps.clear();
        let links = Role::ALL
            .into_iter()
            .flat_map(|role| self.links(role))
            .map(|path| self.remove_link(&path));
        let maps = MAPS.iter().map(|name| self.remove(&self.map(name)));
        let removed = links.chain(maps).fold(Ok(()), Result::and);
        match fs::remove_dir(&self.dir) {
            Ok(()) => removed,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                removed
            }
            Err(source) => removed.and(Err(BpfError::Pin {
                action: "remove the pin directory",
                path: self.dir.clone(),
                source,
            })),
        }
    }
}

fn make_and_lock(dir: &Path) -> Result<Flock<File>, BpfError> {
    let failed = |action| {
        move |source| BpfError::Pin {
            action,
            path: dir.to_owned(),
            source,
        }
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed("make the pin directory"))?;
    let handle = File::open(dir).map_err(failed("open the pin directory"))?;
    Flock::lock(handle, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno == nix::Error::EWOULDBLOCK {
            BpfError::InUse {
                dir: dir.to_owned(),
            }
        } else {
            failed("lock the pin directory")(errno.into())
        }
    })
}

/// Type, key size, value size, entries that a pinned map must have.
fn expected_shape(name: &str) -> (Option<MapType>, u32, u32, u32) {
    const fn size<T>() -> u32 {
        size_of::<T>() as u32
    }
    let (map_type, key, value, entries) = match name {
        "TUNNELS" => (
            MapType::Hash,
            size::<TunnelKey>(),
            size::<Tunnel>(),
            MAX_TUNNEL_ENTRIES,
        ),
        "FORWARD" => (MapType::Hash, 4, size::<Forward>(), MAX_SLOTS),
        "DEVICES" => (MapType::Array, 4, size::<Device>(), MAX_DEVICES),
        "LINKS" | "COUNTERS" => (MapType::PerCpuArray, 4, size::<Counters>(), MAX_SLOTS),
        "PROBE_PATHS" => (MapType::Hash, 8, size::<ProbePath>(), 2 * MAX_SESSIONS),
        "DROPS" => (MapType::PerCpuArray, 4, size::<u64>(), REASONS),
        "PORTS" => (MapType::Array, 4, size::<u64>(), PORT_WORDS),
        "GENERATION" => (MapType::Array, 4, size::<u64>(), 1),
        "FOREIGN" => (
            MapType::LruHash,
            size::<TunnelKey>(),
            size::<Foreign>(),
            MAX_FOREIGN,
        ),
        "NODE" => (MapType::Array, 4, size::<NodeState>(), 1),
        "SESSIONS" => (MapType::Array, 4, size::<Session>(), MAX_SESSIONS),
        "SESSION_INDEX" => (MapType::Hash, 8, 4, MAX_SESSIONS),
        "SETTINGS" => (MapType::Array, 4, size::<Settings>(), 1),
        "HOPS" => (MapType::PerCpuArray, 4, size::<Hop>(), HOPS),
        "ACCEPTED" => (MapType::Array, 4, size::<u64>(), ACCEPTED),
        "TAKEN" => (
            MapType::PerCpuArray,
            4,
            size::<u64>(),
            Taken::ALL.len() as u32,
        ),
        "LAYOUT" => (MapType::Array, 4, size::<u32>(), 1),
        _ => return (None, 0, 0, 0),
    };
    (Some(map_type), key, value, entries)
}

/// A BPF filesystem reserves names with dots, which VLAN interfaces have.
fn link_name(role: Role, interface: &str, direction: Direction) -> String {
    let escaped = interface.replace('%', "%25").replace('.', "%2e");
    format!("{}{escaped}_{direction}", link_prefix(role))
}

/// Whether `dir`, or what exists of the way to it, is on a BPF filesystem.
fn is_bpffs(dir: &Path) -> bool {
    dir.ancestors()
        .find_map(|ancestor| statfs(ancestor).ok())
        .is_some_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}

fn mount_bpffs() -> Result<(), BpfError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700")).map_err(|errno| {
        BpfError::Mount {
            dir: PathBuf::from(BPFFS),
            missing: missing_of(&[Capability::SysAdmin]),
            source: errno.into(),
        }
    })?;
    tracing::info!(dir = BPFFS, "mounted a BPF filesystem");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_has_a_shape() {
        for name in MAPS {
            assert_ne!(expected_shape(name).0, None, "{name}");
        }
    }

    #[test]
    fn links_of_different_interfaces_have_different_names_without_dots() {
        let names: Vec<String> = ["eth0", "eth0.100", "eth0%2e100", "eth0%2e"]
            .iter()
            .map(|name| link_name(Role::Underlay, name, Direction::In))
            .collect();
        assert_eq!(names[0], "link_eth0_ingress");
        assert_eq!(names[1], "link_eth0%2e100_ingress");
        assert_eq!(names[2], "link_eth0%252e100_ingress");
        assert!(names.iter().all(|name| !name.contains('.')));
    }

    #[test]
    fn a_directory_elsewhere_is_refused_with_the_command() {
        let dir = tempfile::tempdir().unwrap();
        for may_mount in [false, true] {
            let error = PinDir::open(&dir.path().join("a/b"), may_mount)
                .err()
                .unwrap();
            assert!(
                error.to_string().contains("mount -t bpf bpf /sys/fs/bpf"),
                "{error}"
            );
            assert!(
                !dir.path().join("a").exists(),
                "nothing is made before the check"
            );
        }
    }
}
