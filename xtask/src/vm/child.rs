//! Processes that end with this one.

use std::{
    ffi::OsString,
    io::{self, Read as _},
    os::{
        fd::{AsRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::{self, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::{
        prctl,
        signal::{SigSet, SigmaskHow, Signal, killpg, sigprocmask},
    },
    unistd::{Pid, getppid},
};

/// How much of a process's standard error is kept, in bytes: its end.
const KEPT: usize = 64 * 1024;

/// A process that is killed when this process ends, by whatever, and when this is dropped.
#[derive(Debug)]
pub(super) struct Child {
    name: &'static str,
    process: process::Child,
    /// The end of its standard error so far, if that is piped.
    written: Arc<Mutex<Vec<u8>>>,
}

impl Child {
    /// Starts a command with an empty standard input; it inherits `descriptors` under the numbers that they have here.
    ///
    /// To be called on a thread that lives as long as the process shall: the kernel ends children with the thread.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn spawn(
        name: &'static str,
        mut command: Command,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self> {
        let numbers: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        let parent = Pid::this();
        // Ctrl-C is for this process, which ends the others in order.
        command.process_group(0).stdin(Stdio::null());
        // SAFETY: runs between fork and exec; prctl, sigprocmask, fcntl and getppid are bare system calls, and nothing here
        // allocates. The descriptors are open: `descriptors` is dropped after the spawn.
        unsafe {
            command.pre_exec(move || {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
                for &number in &numbers {
                    let fd = std::os::fd::BorrowedFd::borrow_raw(number);
                    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
                }
                // Had the parent died before the first line, no signal would ever come.
                if getppid() == parent {
                    Ok(())
                } else {
                    Err(io::Error::from_raw_os_error(nix::libc::ESRCH))
                }
            });
        }
        let mut process = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        drop(descriptors);
        let written = Arc::new(Mutex::new(Vec::new()));
        if let Some(mut stderr) = process.stderr.take() {
            let written = Arc::clone(&written);
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stderr.read(&mut buffer) {
                    let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
                    written.extend(&buffer[..n]);
                    let too_much = written.len().saturating_sub(KEPT);
                    written.drain(..too_much);
                }
            });
        }
        Ok(Self {
            name,
            process,
            written,
        })
    }

    /// Its standard output, once, if that is piped.
    pub(super) fn stdout(&mut self) -> Option<process::ChildStdout> {
        self.process.stdout.take()
    }

    /// Its name and what it wrote to standard error, or `None` if it wrote nothing.
    pub(super) fn stderr_text(&self) -> Option<String> {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&written);
        let text = text.trim();
        (!text.is_empty()).then(|| format!("{}: {text}", self.name))
    }

    /// Waits until it ends; `None` when it does not within the limit.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub(super) fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let mut status = None;
        let mut failed = None;
        let waited = nsm_world::wait_until(self.name, limit, || match self.process.try_wait() {
            Ok(ended) => {
                status = ended;
                status.is_some()
            }
            Err(error) => {
                failed = Some(error);
                true
            }
        });
        match (waited, failed) {
            (_, Some(error)) => Err(error).with_context(|| format!("wait for {}", self.name)),
            (_, None) => Ok(status),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Its group, so that what it has started ends, too; until it is waited for the number is its own. Both calls fail
        // only for a process that has been waited for already.
        if let Ok(None) = self.process.try_wait() {
            let _ = killpg(
                Pid::from_raw(self.process.id().cast_signed()),
                Signal::SIGKILL,
            );
        }
        let _ = self.process.wait();
    }
}

/// A descriptor's number, for a command line.
pub(super) fn fd_argument(fd: &OwnedFd) -> RawFd {
    fd.as_raw_fd()
}

/// A descriptor's name as a file in the process that inherits it.
pub(super) fn fd_path(fd: &OwnedFd) -> OsString {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use super::*;

    #[test]
    fn a_child_reads_what_it_inherits_and_is_gone_when_dropped() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"inherited").unwrap();
        file.rewind().unwrap();
        let file = OwnedFd::from(file);
        let mut command = Command::new("sh");
        command
            .args(["-c", "cat \"$0\" >&2; sleep 1000"])
            .arg(fd_path(&file))
            .stderr(Stdio::piped());
        let mut child = Child::spawn("sh", command, vec![file]).unwrap();
        nsm_world::wait_until("its output", Duration::from_secs(10), || {
            child.stderr_text().as_deref() == Some("sh: inherited")
        })
        .unwrap();
        assert!(child.wait(Duration::from_millis(1)).unwrap().is_none());
        let group = Pid::from_raw(child.process.id().cast_signed());
        drop(child);
        nsm_world::wait_until("its own child to be gone", Duration::from_secs(10), || {
            killpg(group, None).is_err()
        })
        .unwrap();
    }
}
