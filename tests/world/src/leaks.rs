//! What of a world exists at this moment: looked up in the kernel and the file systems, not in the world's own books.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::{
    ALIAS_PREFIX, WorldError,
    netns::{self, ip_output},
    process::{ProcessId, recorded, running},
    remove,
};

/// What of a world exists. After [`crate::World::tear_down`] all of it is leaked; before, `links` and `pins` are what its
/// agents hold, so that a test can compare before and after.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leaks {
    /// Links that agents made (by their alias), in any of the world's namespaces or the caller's own.
    pub links: Vec<Link>,
    /// Pinned BPF objects of the world's agents.
    pub pins: Vec<PathBuf>,
    /// The world's network namespaces.
    pub netns: Vec<String>,
    /// Processes that the world started or that were found inside its namespaces.
    pub processes: Vec<u32>,
}

impl Leaks {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
            && self.pins.is_empty()
            && self.netns.is_empty()
            && self.processes.is_empty()
    }
}

/// A network link as `ip -details link` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The namespace it is in: the name in `/run/netns`, or "" for the caller's.
    pub netns: String,
    /// Its name.
    pub name: String,
    /// Its kind ("vxlan", "veth", …), "" where it has none.
    pub kind: String,
    /// Its alias, "" where it has none.
    pub alias: String,
    /// The VNI of a VXLAN link.
    pub vni: Option<u32>,
}

impl Link {
    /// Whether an agent made it for a connection; else it is the agent's own, for its tunnels or its probes.
    #[must_use]
    pub fn is_of_connection(&self) -> bool {
        let id = self.alias.strip_prefix(ALIAS_PREFIX);
        let id = id.and_then(|rest| rest.split_once('/')).map(|(_, id)| id);
        id.is_some_and(|id| !id.starts_with("external-") && !id.starts_with("management-"))
    }
}

/// A process inside one of the world's namespaces.
pub(crate) struct Inside {
    pub(crate) id: ProcessId,
    pub(crate) group: u32,
}

/// Looks for everything of the world; `known` are its processes, `outside` the agents' links that the caller's own
/// namespace had before the world was built.
pub(crate) fn look(id: &str, known: &[ProcessId], outside: &[Link]) -> Result<Leaks, WorldError> {
    let namespaces = remove::namespaces(id);
    let mut links = links_in(None)?;
    for name in &namespaces {
        match links_in(Some(name)) {
            Ok(found) => links.extend(found),
            // One that was removed meanwhile has no links.
            Err(_) if !netns::path(name).exists() => {}
            Err(error) => return Err(error),
        }
    }
    links.retain(|link| link.alias.starts_with(ALIAS_PREFIX) && !outside.contains(link));
    let list = remove::run_dir(id).join(remove::PROCESSES);
    let inside = processes_inside(id).into_iter().map(|process| process.id);
    let mut processes: Vec<u32> = known
        .iter()
        .cloned()
        .chain(recorded(&list))
        .chain(inside)
        .filter(ProcessId::is_running)
        .map(|process| process.pid)
        .collect();
    processes.sort_unstable();
    processes.dedup();
    Ok(Leaks {
        links,
        pins: remove::pin_dirs(id)
            .iter()
            .flat_map(|dir| files_below(dir))
            .collect(),
        netns: namespaces,
        processes,
    })
}

/// The agents' links in the caller's own namespace.
pub(crate) fn links_outside() -> Result<Vec<Link>, WorldError> {
    let mut links = links_in(None)?;
    links.retain(|link| link.alias.starts_with(ALIAS_PREFIX));
    Ok(links)
}

/// All links of a namespace, or of the caller's own.
pub(crate) fn links_in(netns: Option<&str>) -> Result<Vec<Link>, WorldError> {
    let output = ip_output(netns, &["-json", "-details", "link", "show"])?;
    parse_links(netns.unwrap_or_default(), &output).map_err(|error| WorldError::Unreadable {
        path: netns.map_or_else(|| PathBuf::from("ip link"), netns::path),
        message: format!("ip -json link: {error}"),
    })
}

fn parse_links(netns: &str, json: &str) -> Result<Vec<Link>, serde_json::Error> {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let links: Vec<serde_json::Value> = serde_json::from_str(json)?;
    let link = |link: &serde_json::Value| Link {
        netns: netns.to_owned(),
        name: text(&link["ifname"]),
        kind: text(&link["linkinfo"]["info_kind"]),
        alias: text(&link["ifalias"]),
        vni: link["linkinfo"]["info_data"]["id"]
            .as_u64()
            .and_then(|vni| vni.try_into().ok()),
    };
    Ok(links.iter().map(link).collect())
}

/// The processes inside the world's namespaces, whoever started them.
pub(crate) fn processes_inside(id: &str) -> Vec<Inside> {
    // The names keep the namespaces, and so their inode numbers, while we look.
    let inodes: HashMap<u64, String> = remove::namespaces(id)
        .into_iter()
        .filter_map(|name| Some((fs::metadata(netns::path(&name)).ok()?.ino(), name)))
        .collect();
    if inodes.is_empty() {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let inode = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino();
        let start = running(pid).filter(|_| inodes.contains_key(&inode))?;
        let group =
            nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(pid.cast_signed()))).ok()?;
        Some(Inside {
            id: ProcessId { pid, start },
            group: group.as_raw().cast_unsigned(),
        })
    })
    .collect()
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                walk(&entry.path(), found)?;
            } else {
                found.push(entry.path());
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    // What is removed meanwhile is not left behind.
    let _ = walk(dir, &mut found);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_read_as_ip_prints_them() {
        let json = r#"[{"ifindex":1,"ifname":"lo","link_type":"loopback"},
            {"ifindex":9,"ifname":"nsm-1","ifalias":"proxy-nsmgr/cluster-1.example/c1",
             "linkinfo":{"info_kind":"vxlan","info_data":{"id":77,"port":4789}}}]"#;
        let links = parse_links("w-pod", json).unwrap();
        assert_eq!(links[0].kind, "");
        let link = &links[1];
        assert_eq!(
            (link.name.as_str(), link.kind.as_str(), link.vni),
            ("nsm-1", "vxlan", Some(77))
        );
        assert!(link.alias.starts_with(ALIAS_PREFIX));
        assert!(parse_links("w-pod", "not json").is_err());
    }
}
