//! `cargo xtask vm` as a user has it: a kernel is booted, and nothing is left of it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd as _,
        unix::{fs::MetadataExt as _, process::ExitStatusExt as _},
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    libc,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nsm_world::wait_until;
use tempfile::TempDir;

/// The variable by which the processes of one run are found: all that it starts inherit it.
const MARK: &str = "XTASK_VM_TEST";

/// The kernel ends killed processes and their children at once; a busy machine shows it later.
const PATIENCE: Duration = Duration::from_secs(20);

/// Most of what a pipe holds (pipe(7)): a writer of more waits.
const PIPE: i32 = 60 * 1024;

/// A run of `xtask vm` in a directory of its own.
struct Run {
    mark: String,
    dir: TempDir,
    temporary: TempDir,
}

impl Run {
    fn new(name: &str) -> Result<Self> {
        Ok(Self {
            mark: format!("{name}-{}", std::process::id()),
            dir: tempfile::tempdir()?,
            temporary: tempfile::tempdir()?,
        })
    }

    fn command(&self, command: &[&str]) -> Command {
        self.command_with(&[], command)
    }

    fn command_with(&self, options: &[&str], command: &[&str]) -> Command {
        let mut xtask = Command::new(env!("CARGO_BIN_EXE_xtask"));
        xtask
            .args(["vm", "--kernel", "6.12"])
            .args(options)
            .arg("--")
            .args(command)
            .current_dir(&self.dir)
            .env(MARK, &self.mark)
            .env("TMPDIR", self.temporary.path())
            .stdin(Stdio::null());
        xtask
    }

    /// The names of the programs that run with this run's mark.
    fn processes(&self) -> Vec<String> {
        let mark = format!("{MARK}={}", self.mark).into_bytes();
        let marked = |dir: &Path| {
            // A process may end while it is looked at.
            let environment = fs::read(dir.join("environ")).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|it| it == mark)
        };
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|dir| marked(dir))
            .map(|dir| fs::read_to_string(dir.join("comm")).unwrap_or_default())
            .collect()
    }

    fn assert_nothing_left(&self) -> Result<()> {
        let ended = wait_until("all processes to end", PATIENCE, || {
            self.processes().is_empty()
        });
        ended.with_context(|| format!("left: {:?}", self.processes()))?;
        for dir in [&self.dir, &self.temporary] {
            let left: Vec<_> = fs::read_dir(dir)?.collect();
            ensure!(left.is_empty(), "left: {left:?}");
        }
        Ok(())
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
#[ignore = "needs root: a virtual machine with all files of this one"]
fn output_and_status_are_the_commands_and_nothing_is_left() -> Result<()> {
    let run = Run::new("output")?;
    // The orphan ends by a real-time signal, for which libraries have no name.
    let script = "(setsid sh -c 'kill -40 $$' &); echo out; pwd; uname -r >written; cat written; echo err >&2; exit 7";
    let output = run.command(&["sh", "-c", script]).output()?;
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    ensure!(
        output.status.code() == Some(7),
        "{}: {stderr}",
        output.status
    );
    let lines: Vec<_> = stdout.lines().collect();
    ensure!(lines.len() == 3, "{stdout:?}");
    ensure!(lines[0] == "out", "{stdout:?}");
    ensure!(Path::new(lines[1]) == run.dir.path(), "{stdout:?}");
    ensure!(lines[2].starts_with("6.12."), "{stdout:?}");
    ensure!(stderr.lines().any(|line| line == "err"), "{stderr:?}");
    run.assert_nothing_left()
}

#[test]
#[ignore = "needs root: a virtual machine with all files of this one"]
fn a_machine_ends_with_what_started_it() -> Result<()> {
    let run = Run::new("killed")?;
    let mut xtask = run
        .command(&["sleep", "1000"])
        .stderr(Stdio::null())
        .spawn()?;
    let started = wait_until("the machine to run", PATIENCE, || {
        let running = run.processes();
        running.iter().any(|name| name.starts_with("qemu"))
    });
    // SIGKILL leaves it no time for anything.
    xtask.kill()?;
    xtask.wait()?;
    started?;
    run.assert_nothing_left()
}

#[test]
#[ignore = "needs root: a virtual machine with all files of this one"]
fn the_guest_cannot_write_to_this_machines_files() -> Result<()> {
    let run = Run::new("read-only")?;
    // The guest is root: nothing in it keeps it from mounting the files as it likes.
    let script = r#"mkdir /x && mount -t virtiofs host /x && mount -o remount,rw /x || exit 3
        touch "/x$PWD/f" 2>/dev/null && exit 4
        exit 0"#;
    let output = run
        .command_with(&["--files", "virtiofs"], &["sh", "-c", script])
        .output()?;
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        text(&output.stderr)
    );
    run.assert_nothing_left()
}

#[test]
#[ignore = "needs root: a virtual machine with all files of this one"]
fn a_signal_ends_a_run_whose_output_nobody_reads() -> Result<()> {
    let run = Run::new("unread")?;
    let (unread, stderr) = io::pipe()?;
    let mut xtask = run
        .command(&["sh", "-c", "yes >&2"])
        .stderr(stderr)
        .spawn()?;
    let full = wait_until("its output to stall", PATIENCE, || {
        let mut waiting = 0;
        // SAFETY: FIONREAD writes an int.
        let asked = unsafe { libc::ioctl(unread.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
        asked == 0 && waiting >= PIPE
    });
    let sent = kill(Pid::from_raw(xtask.id().cast_signed()), Signal::SIGTERM);
    let end = end_of(&mut xtask);
    full?;
    sent?;
    let status = end?;
    ensure!(
        status.code() == Some(128 + Signal::SIGTERM as i32),
        "{status}"
    );
    run.assert_nothing_left()
}

/// Waits for the end of a run; one that does not end is killed.
fn end_of(xtask: &mut Child) -> Result<ExitStatus> {
    let mut ended = None;
    let end = wait_until("it to end", PATIENCE, || {
        ended = xtask.try_wait().unwrap_or_default();
        ended.is_some()
    });
    if end.is_err() {
        xtask.kill()?;
        xtask.wait()?;
    }
    end?;
    ended.context("it has ended")
}

#[test]
#[ignore = "needs root: what virtual machines need is installed"]
fn a_signal_ends_the_preparation() -> Result<()> {
    let run = Run::new("preparation")?;
    let cache = tempfile::tempdir()?;
    let kernels = cache.path().join("proxy-nsmgr/vm");
    fs::create_dir_all(&kernels)?;
    // Another run fetches, as it seems: this one waits.
    let lock = File::create(kernels.join("lock"))?;
    lock.lock()?;
    let mut xtask = run
        .command(&["true"])
        .env("XDG_CACHE_HOME", cache.path())
        .stderr(Stdio::null())
        .spawn()?;
    let inode = format!(":{} ", lock.metadata()?.ino());
    let waiting = wait_until("it to wait for the lock", PATIENCE, || {
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        locks
            .lines()
            .any(|line| line.contains("->") && line.contains(&inode))
    });
    let pid = Pid::from_raw(xtask.id().cast_signed());
    // All signals that end it are taken alike. A shell without job control has its background commands ignore SIGINT.
    let sent = kill(pid, Signal::SIGTERM);
    let end = end_of(&mut xtask);
    waiting?;
    sent?;
    let status = end?;
    ensure!(status.signal() == Some(Signal::SIGTERM as i32), "{status}");
    run.assert_nothing_left()
}
