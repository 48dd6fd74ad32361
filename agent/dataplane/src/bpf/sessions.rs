//! The memory of the sessions: the maps that the programs for probes use.

#[cfg(test)]
use std::collections::HashMap;
use std::{num::NonZeroUsize, os::fd::AsFd as _, ptr::NonNull};

use aya::{
    Ebpf,
    maps::{HashMap as BpfHashMap, Map, MapData},
};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nsm_ebpf_common::management::{MAX_SESSIONS, Node, NodeState, Session};

use super::{
    BpfError,
    tables::{of_map, take},
};

/// Where sessions live. [`Node`] is how the decisions of [`nsm_ebpf_common::management`] see it.
pub(crate) trait Sessions: Node {
    /// The reflector.
    fn node(&self) -> &NodeState;
    /// The session of a slot below [`MAX_SESSIONS`].
    fn slot(&self, slot: u32) -> &Session;
    /// Makes a peer's Ethernet address lead to a slot.
    fn index(&mut self, mac: u64, slot: u32) -> Result<(), BpfError>;
    /// Lets it lead nowhere.
    fn forget(&mut self, mac: u64) -> Result<(), BpfError>;
    /// What leads where.
    fn indexed(&self) -> Result<Vec<(u64, u32)>, BpfError>;
}

/// The pinned maps, seen in place. They outlive the process; a session of an earlier agent is found again.
pub(crate) struct PinnedSessions {
    node: Mapped<NodeState>,
    sessions: Mapped<Session>,
    index: BpfHashMap<MapData, u64, u32>,
}

impl PinnedSessions {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, BpfError> {
        Ok(Self {
            node: Mapped::new(ebpf, "NODE", 1)?,
            sessions: Mapped::new(ebpf, "SESSIONS", MAX_SESSIONS)?,
            index: take(ebpf, "SESSION_INDEX")?,
        })
    }
}

impl Node for PinnedSessions {
    fn state(&self) -> Option<&NodeState> {
        Some(self.node())
    }

    fn session(&self, mac: u64) -> Option<&Session> {
        let slot = self.index.get(&mac, 0).ok()?;
        self.sessions.values().get(slot as usize)
    }
}

impl Sessions for PinnedSessions {
    fn node(&self) -> &NodeState {
        &self.node.values()[0]
    }

    fn slot(&self, slot: u32) -> &Session {
        &self.sessions.values()[slot as usize]
    }

    fn index(&mut self, mac: u64, slot: u32) -> Result<(), BpfError> {
        self.index
            .insert(mac, slot, 0)
            .map_err(of_map("SESSION_INDEX", "add to"))
    }

    fn forget(&mut self, mac: u64) -> Result<(), BpfError> {
        use aya::maps::MapError::{KeyNotFound, SyscallError};
        match self.index.remove(&mac) {
            Err(KeyNotFound) => Ok(()),
            Err(SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => {
                Ok(())
            }
            removed => removed.map_err(of_map("SESSION_INDEX", "remove from")),
        }
    }

    fn indexed(&self) -> Result<Vec<(u64, u32)>, BpfError> {
        let entries = self.index.iter();
        entries
            .collect::<Result<_, _>>()
            .map_err(of_map("SESSION_INDEX", "read"))
    }
}

/// The same in memory of this process.
#[cfg(test)]
pub(crate) struct LocalSessions {
    node: NodeState,
    sessions: Vec<Session>,
    index: HashMap<u64, u32>,
}

#[cfg(test)]
impl LocalSessions {
    pub(crate) fn new() -> Self {
        Self {
            node: NodeState::default(),
            sessions: (0..MAX_SESSIONS).map(|_| Session::default()).collect(),
            index: HashMap::new(),
        }
    }
}

#[cfg(test)]
impl Node for LocalSessions {
    fn state(&self) -> Option<&NodeState> {
        Some(&self.node)
    }

    fn session(&self, mac: u64) -> Option<&Session> {
        let slot = *self.index.get(&mac)?;
        self.sessions.get(slot as usize)
    }
}

#[cfg(test)]
impl Sessions for LocalSessions {
    fn node(&self) -> &NodeState {
        &self.node
    }

    fn slot(&self, slot: u32) -> &Session {
        &self.sessions[slot as usize]
    }

    fn index(&mut self, mac: u64, slot: u32) -> Result<(), BpfError> {
        self.index.insert(mac, slot);
        Ok(())
    }

    fn forget(&mut self, mac: u64) -> Result<(), BpfError> {
        self.index.remove(&mac);
        Ok(())
    }

    fn indexed(&self) -> Result<Vec<(u64, u32)>, BpfError> {
        Ok(self.index.iter().map(|(mac, slot)| (*mac, *slot)).collect())
    }
}

/// The values of an array map, as the kernel itself has them. `T` must consist of [`nsm_ebpf_common::Shared`] alone: the programs
/// write to it at any time.
struct Mapped<T> {
    start: NonNull<T>,
    length: usize,
    /// Keeps the map.
    _map: MapData,
}

// SAFETY: the memory is the kernel's and stays until `drop`; its values are shared with the programs already, and every access is
// one that several threads may make at once (see the type).
unsafe impl<T: Send + Sync> Send for Mapped<T> {}

impl<T> Mapped<T> {
    fn new(ebpf: &mut Ebpf, name: &'static str, length: u32) -> Result<Self, BpfError> {
        const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8) };
        let Some(Map::Array(map)) = ebpf.take_map(name) else {
            return Err(BpfError::NoSuchMap { map: name });
        };
        let length = length as usize;
        let bytes =
            NonZeroUsize::new(length * size_of::<T>()).ok_or(BpfError::NoSuchMap { map: name })?;
        // SAFETY: a new mapping where the kernel likes it touches no memory of ours. The map holds `length` values of `size_of::<T>()`
        // bytes, a multiple of 8, which is how far apart an array map puts them: its shape was checked when it was adopted.
        let start = unsafe {
            mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                map.fd().as_fd(),
                0,
            )
        };
        let start = start.map_err(|errno| BpfError::MapMemory {
            map: name,
            source: errno.into(),
        })?;
        Ok(Self {
            start: start.cast(),
            length,
            _map: map,
        })
    }

    fn values(&self) -> &[T] {
        // SAFETY: mapped for as long as `self`, page-aligned, and so long; see the type for who else writes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: what `new` mapped, and no reference outlives `self`.
        let unmapped = unsafe { munmap(self.start.cast(), self.length * size_of::<T>()) };
        if let Err(errno) = unmapped {
            tracing::error!(%errno, "a BPF map stays in memory");
        }
    }
}
