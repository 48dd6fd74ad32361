//! The maps of the fast path: how it is set, and what takes it. What the programs keep in it ends by itself
//! ([`nsm_ebpf_common::fast`]).

use std::fs;

use aya::{
    Ebpf,
    maps::{Array, MapData, PerCpuArray},
};
use nsm_ebpf_common::fast::{Settings, Taken, settings_flags};

use super::{
    Bpf, BpfError,
    tables::{of_map, take},
};

/// The range of local ports where the kernel does not show its own (Documentation/networking/ip-sysctl).
const DEFAULT_PORTS: (u32, u32) = (32_768, 60_999);

pub(super) struct FastTables {
    taken: PerCpuArray<MapData, u64>,
}

/// Frames of connections by the path that they took on the node; one that the kernel segments later counts once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PathsTaken {
    /// From pods, encapsulated by BPF.
    pub fast_out: u64,
    /// From pods, by the external device.
    pub slow_out: u64,
    /// To pods, decapsulated by BPF.
    pub fast_in: u64,
    /// To pods, from the external device.
    pub slow_in: u64,
}

impl FastTables {
    /// Takes the maps out of a loaded object, and sets the fast path; with `slow_only` nothing takes it.
    pub(super) fn adopt(ebpf: &mut Ebpf, slow_only: bool) -> Result<Self, BpfError> {
        let mut settings: Array<_, Settings> = take(ebpf, "SETTINGS")?;
        let set = settings.set(0, wanted(slow_only), 0);
        set.map_err(of_map("SETTINGS", "write"))?;
        Ok(Self {
            taken: take(ebpf, "TAKEN")?,
        })
    }

    fn taken(&self) -> Result<PathsTaken, BpfError> {
        let of = |way: Taken| {
            let cpus = self.taken.get(&(way as u32), 0);
            let cpus = cpus.map_err(of_map("TAKEN", "read"))?;
            Ok::<u64, BpfError>(cpus.iter().sum())
        };
        Ok(PathsTaken {
            fast_out: of(Taken::FastOut)?,
            slow_out: of(Taken::SlowOut)?,
            fast_in: of(Taken::FastIn)?,
            slow_in: of(Taken::SlowIn)?,
        })
    }
}

impl Bpf {
    /// Frames of connections by the path that they took, since the maps were made.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn paths_taken(&self) -> Result<PathsTaken, BpfError> {
        self.state().fast.taken()
    }
}

fn wanted(slow_only: bool) -> Settings {
    // Of the calling thread's network namespace.
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let range = range.ok().and_then(|text| ports(&text));
    let (first, last) = range.unwrap_or(DEFAULT_PORTS);
    Settings {
        flags: if slow_only {
            settings_flags::SLOW_ONLY
        } else {
            0
        },
        first_port: first,
        ports: last - first,
    }
}

/// First and last port of a range as the kernel shows it.
fn ports(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_whitespace().map(str::parse::<u16>);
    let (first, last) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    (first < last).then_some((first.into(), last.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_ports_is_read() {
        assert_eq!(ports("32768\t60999\n"), Some((32_768, 60_999)));
        for broken in ["", "1", "a b", "2 1", "1 70000"] {
            assert_eq!(ports(broken), None, "{broken}");
        }
    }
}
