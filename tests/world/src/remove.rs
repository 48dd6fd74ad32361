//! Removing a world by its id alone: the same code tears down a world that ends and one whose process was killed.

use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    PIN_DIR, RUN_DIR, leaks,
    netns::{self, NETNS_DIR},
    process::{ProcessId, recorded, start_time},
    wait::wait_until,
};

/// The file in a world's run directory that says whose it is: the start time of the process that built it.
const OWNER: &str = "owner";

/// The file in a world's run directory that lists its processes.
pub(crate) const PROCESSES: &str = "processes";

/// Killed processes are gone at once unless they sit in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

pub(crate) fn run_dir(id: &str) -> PathBuf {
    Path::new(RUN_DIR).join(id)
}

/// Makes a world's run directory, with the owner in it.
pub(crate) fn create_run_dir(id: &str) -> io::Result<PathBuf> {
    let dir = run_dir(id);
    fs::create_dir_all(&dir)?;
    let start = start_time(std::process::id()).unwrap_or(0);
    fs::write(dir.join(OWNER), start.to_string())?;
    Ok(dir)
}

/// Removes all that belongs to the world: recorded processes with their groups, namespaces, pins and files. Idempotent; what
/// cannot be removed stays and is found by [`leaks::look`].
pub(crate) fn world(id: &str) {
    let dir = run_dir(id);
    kill_strays(id);
    let doomed: String = namespaces(id)
        .iter()
        .map(|name| format!("netns del {name}\n"))
        .collect();
    if !doomed.is_empty() && netns::ip(None, &doomed).is_err() {
        // One that cannot be removed must not save the others.
        for line in doomed.lines() {
            let _ = netns::ip(None, &format!("{line}\n"));
        }
    }
    for pins in pin_dirs(id) {
        let _ = fs::remove_dir_all(pins);
    }
    let _ = fs::remove_dir_all(dir);
}

/// Kills the world's processes and the children they left behind; other processes inside its namespaces are not ours.
pub(crate) fn kill_strays(id: &str) {
    let recorded = recorded(&run_dir(id).join(PROCESSES));
    // A child that its parent left behind is still in the parent's group, and in one of the namespaces.
    let groups: HashSet<u32> = recorded.iter().map(|process| process.pid).collect();
    let strays = leaks::processes_inside(id)
        .into_iter()
        .filter(|process| groups.contains(&process.group));
    let doomed: Vec<ProcessId> = recorded
        .iter()
        .cloned()
        .chain(strays.map(|process| process.id))
        .collect();
    doomed.iter().for_each(ProcessId::kill);
    let _ = wait_until("killed processes to end", KILL_DEADLINE, || {
        !doomed.iter().any(ProcessId::is_running)
    });
}

/// The names of the world's namespaces that exist.
pub(crate) fn namespaces(id: &str) -> Vec<String> {
    children(Path::new(NETNS_DIR), id)
}

/// The directories in which the world's agents pin, where they exist.
pub(crate) fn pin_dirs(id: &str) -> Vec<PathBuf> {
    let base = Path::new(PIN_DIR);
    children(base, id)
        .into_iter()
        .map(|name| base.join(name))
        .collect()
}

fn children(dir: &Path, id: &str) -> Vec<String> {
    let prefix = format!("{id}-");
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(&prefix)).collect()
}

/// Removes worlds whose process is dead: it was killed before it could clean up.
pub(crate) fn stale_worlds() {
    let Ok(entries) = fs::read_dir(RUN_DIR) else {
        return;
    };
    for entry in entries.flatten() {
        let Ok(id) = entry.file_name().into_string() else {
            continue;
        };
        let Some(pid) = owner_pid(&id) else {
            continue;
        };
        // Without an owner file the world is being built at this moment, by a process of that very id.
        let written = fs::read_to_string(entry.path().join(OWNER))
            .ok()
            .and_then(|text| text.parse::<u64>().ok());
        let alive = match (start_time(pid), written) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(now), Some(then)) => now == then,
        };
        if !alive {
            world(&id);
        }
    }
}

/// The process id in `<name>-<pid>-<n>`.
fn owner_pid(id: &str) -> Option<u32> {
    let (rest, _) = id.rsplit_once('-')?;
    let (_, pid) = rest.rsplit_once('-')?;
    pid.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_world_names_its_owner() {
        assert_eq!(owner_pid("demo-123-0"), Some(123));
        assert_eq!(owner_pid("two-words-77-12"), Some(77));
        assert_eq!(owner_pid("lost+found"), None);
    }
}
