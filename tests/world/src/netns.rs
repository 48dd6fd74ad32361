//! Doing things inside a network namespace, and with the system's `ip` and `nft`.
//!
//! Programs enter a namespace by `setns` between fork and exec. `ip netns exec` would do more than that: it gives the
//! program a mount namespace of its own with a fresh `/sys`, in which `/sys/fs/bpf` and its pins are gone.

use std::{
    fs::File,
    io::{self, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use nix::sched::{CloneFlags, setns};

use crate::WorldError;

/// Where `ip netns` keeps the names of network namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// The path of a named network namespace.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

/// A command that will run inside the network namespace at `netns`; everything else stays the caller's.
///
/// # Errors
/// When the namespace cannot be opened.
pub fn command_in(
    netns: &Path,
    program: impl AsRef<std::ffi::OsStr>,
) -> Result<Command, WorldError> {
    let namespace = open(netns)?;
    let mut command = Command::new(program);
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe work is allowed: setns is
    // a bare system call on a descriptor opened beforehand, and turning an errno into an io::Error allocates nothing.
    unsafe {
        command.pre_exec(move || Ok(setns(&namespace, CloneFlags::CLONE_NEWNET)?));
    }
    Ok(command)
}

/// Runs `work` on a thread of its own inside the network namespace at `netns`. Sockets made there stay there.
///
/// # Errors
/// When the namespace cannot be entered. A panic of `work` goes on in the caller.
pub fn inside<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> Result<T, WorldError> {
    let namespace = open(netns)?;
    let enter = || format!("enter network namespace {}", netns.display());
    thread::scope(|scope| {
        let worker = scope.spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
            Ok(work())
        });
        match worker.join() {
            Ok(result) => result.map_err(WorldError::io(enter())),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn open(netns: &Path) -> Result<File, WorldError> {
    File::open(netns).map_err(WorldError::io(format!(
        "open network namespace {}",
        netns.display()
    )))
}

/// Runs `ip` commands, one a line, in a single process; inside `netns` where one is named.
pub(crate) fn ip(netns: Option<&str>, lines: &str) -> Result<(), WorldError> {
    let command = program("ip", netns)?;
    run(command, &["-batch", "-"], netns, lines)
}

/// Loads an nftables ruleset inside a namespace.
pub(crate) fn nft(netns: &str, ruleset: &str) -> Result<(), WorldError> {
    let command = program("nft", Some(netns))?;
    run(command, &["-f", "-"], Some(netns), ruleset)
}

/// The output of `ip` inside a namespace, or in the caller's where none is named.
pub(crate) fn ip_output(netns: Option<&str>, arguments: &[&str]) -> Result<String, WorldError> {
    let mut command = program("ip", netns)?;
    let output = command
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| missing(&command, error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(WorldError::Program {
        program: describe(&command, netns),
        input: arguments.join(" "),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

fn program(name: &str, netns: Option<&str>) -> Result<Command, WorldError> {
    match netns {
        Some(netns) => command_in(&path(netns), name),
        None => Ok(Command::new(name)),
    }
}

fn run(
    mut command: Command,
    arguments: &[&str],
    netns: Option<&str>,
    input: &str,
) -> Result<(), WorldError> {
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| missing(&command, error))?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // A program that gives up early closes its end; what it said about it is in its stderr.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child
        .wait_with_output()
        .map_err(WorldError::io("wait for a child process"))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(WorldError::Program {
        program: describe(&command, netns),
        input: failed_line(&message, input).to_owned(),
        message,
    })
}

/// `ip -batch` names the line that failed as `Command failed -:7`.
fn failed_line<'a>(message: &str, input: &'a str) -> &'a str {
    let number = message.lines().find_map(|line| {
        line.strip_prefix("Command failed -:")?
            .trim()
            .parse::<usize>()
            .ok()
    });
    number
        .and_then(|number| input.lines().nth(number.checked_sub(1)?))
        .unwrap_or(input)
}

fn describe(command: &Command, netns: Option<&str>) -> String {
    let program = command.get_program().to_string_lossy();
    match netns {
        Some(netns) => format!("{program} (in {netns})"),
        None => program.into_owned(),
    }
}

fn missing(command: &Command, error: io::Error) -> WorldError {
    let program = command.get_program().to_string_lossy().into_owned();
    if error.kind() == io::ErrorKind::NotFound {
        let package = if program == "nft" {
            "nftables"
        } else {
            "iproute2"
        };
        return WorldError::MissingProgram { program, package };
    }
    WorldError::io(format!("start {program}"))(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failing_line_of_a_batch_is_found() {
        let input = "link set lo up\nlink set nope up\n";
        let message = "Cannot find device \"nope\"\nCommand failed -:2";
        assert_eq!(failed_line(message, input), "link set nope up");
        assert_eq!(failed_line("something else", input), input);
    }

    #[test]
    fn a_namespace_that_is_none_is_an_error() {
        let error = inside(Path::new("/run/netns/there-is-none"), || ()).unwrap_err();
        assert!(error.to_string().contains("there-is-none"), "{error}");
    }
}
