//! Processes of a world that measure, and what the kernel accounts to those that are measured.

use std::{fs, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nsm_world::{Process, World};
use serde::de::DeserializeOwned;

/// Clock ticks of /proc/PID/stat a second: `USER_HZ`, 100 on every architecture that we run on (proc(5), sysconf(3)).
const TICKS_PER_SECOND: f64 = 100.0;

/// Runs a command to its end and reads what it printed as JSON.
pub(super) fn run_json<T: DeserializeOwned>(
    world: &World,
    name: &str,
    command: Command,
    deadline: Duration,
) -> Result<T> {
    let process = world.spawn(name, command)?;
    let status = process.wait(deadline)?;
    let (stdout, stderr) = (process.stdout(), process.stderr());
    ensure!(
        status.success(),
        "{name} failed ({status}): {}{}",
        stdout.trim(),
        stderr.trim()
    );
    serde_json::from_str(&stdout)
        .with_context(|| format!("{name} printed {:?}, which was not expected", stdout.trim()))
}

/// CPU time that a process has spent until now, all its threads, in milliseconds.
pub(super) fn cpu_ms(process: &Process) -> Result<f64> {
    let path = format!("/proc/{}/stat", process.pid());
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    cpu_ticks(&text)
        .map(|ticks| ticks / TICKS_PER_SECOND * 1e3)
        .with_context(|| format!("{path} is {text:?}"))
}

/// utime and stime, fields 14 and 15. The command's name, in parentheses, may hold spaces and parentheses.
fn cpu_ticks(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some(ticks()? + ticks()?)
}

/// Memory of a process that is in RAM, KiB.
pub(super) fn rss_kib(process: &Process) -> Result<f64> {
    let path = format!("/proc/{}/status", process.pid());
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    text.lines()
        .find_map(|line| {
            let value = line.strip_prefix("VmRSS:")?.strip_suffix("kB")?;
            value.trim().parse().ok()
        })
        .with_context(|| format!("{path} has no VmRSS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_behind_odd_names() {
        let stat = "42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 14 15 16 17";
        assert_eq!(cpu_ticks(stat), Some(29.0));
        assert_eq!(cpu_ticks("42 (x) S 1"), None);
    }
}
