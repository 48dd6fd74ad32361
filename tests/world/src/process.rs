//! Processes of a world: each in a process group of its own, logged to files, and never outliving the test.
//!
//! They are spawned on one thread that lives as long as this process: PR_SET_PDEATHSIG fires when the *thread* that
//! spawned a child ends, and a test's thread may well end before its world does.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc},
    thread,
    time::Duration,
};

use nix::{
    sys::{
        prctl,
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, killpg, sigaction},
    },
    unistd::{Pid, getppid, setsid},
};

use crate::{WorldError, wait::wait_for};

/// How many lines of a process's output an error shows.
const TAIL_LINES: usize = 15;

/// What the names of agents' processes start with.
pub(crate) const AGENT_PREFIX: &str = "agent-";

/// SIGKILL takes effect at once unless the process sits in the kernel; a process that is still there after this is a finding.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// A process of the world. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    body: Arc<Body>,
}

/// Shared with the world, which kills what is left when it is torn down.
#[derive(Debug)]
pub(crate) struct Body {
    name: String,
    pid: u32,
    stdout: PathBuf,
    stderr: PathBuf,
    child: Mutex<Child>,
}

/// Whom a process is scheduled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Company {
    /// A process group of its own, in the session of whoever started it.
    Group,
    /// A session of its own, and with it a share of the CPU of its own (sched(7), autogroups).
    Session,
}

/// A process that may have ended: its id alone could meanwhile be another's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessId {
    pub(crate) pid: u32,
    /// Clock ticks from boot to the process's start (proc(5), stat field 22).
    pub(crate) start: u64,
}

impl Process {
    pub(crate) fn spawn(
        name: &str,
        log_name: &str,
        mut command: Command,
        log_dir: &Path,
        company: Company,
    ) -> Result<(Self, ProcessId), WorldError> {
        let log = |suffix: &str| {
            let path = log_dir.join(format!("{log_name}.{suffix}"));
            let file = OpenOptions::new().create(true).append(true).open(&path);
            file.map(|file| (path.clone(), file))
                .map_err(WorldError::io(format!("create {}", path.display())))
        };
        let (stdout, out) = log("out")?;
        let (stderr, err) = log("err")?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        if company == Company::Group {
            command.process_group(0);
        }
        let parent = Pid::this();
        // SAFETY: runs between fork and exec; setsid, prctl, getppid and sigaction are bare system calls, the default
        // disposition runs no code, and nothing here allocates.
        unsafe {
            command.pre_exec(move || {
                if company == Company::Session {
                    setsid()?;
                }
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                // A shell starts background jobs deaf to Ctrl-C, and that would be inherited.
                let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
                for signal in [
                    Signal::SIGINT,
                    Signal::SIGTERM,
                    Signal::SIGHUP,
                    Signal::SIGQUIT,
                ] {
                    sigaction(signal, &default)?;
                }
                // Had the parent died before the line above, no signal would ever come.
                if getppid() == parent {
                    Ok(())
                } else {
                    Err(io::Error::from_raw_os_error(nix::libc::ESRCH))
                }
            });
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let child = spawn_on_lasting_thread(command)
            .map_err(WorldError::io(format!("start {name} ({program})")))?;
        let pid = child.id();
        let body = Body {
            name: name.to_owned(),
            pid,
            stdout,
            stderr,
            child: Mutex::new(child),
        };
        // Not yet waited for, so the entry exists even if the process has ended.
        let start = start_time(pid).unwrap_or(0);
        let process = Self {
            body: Arc::new(body),
        };
        Ok((process, ProcessId { pid, start }))
    }

    pub(crate) fn body(&self) -> Arc<Body> {
        Arc::clone(&self.body)
    }

    /// The name it was spawned under.
    pub fn name(&self) -> &str {
        &self.body.name
    }

    /// Its process id, which is also its process group's.
    pub fn pid(&self) -> u32 {
        self.body.pid
    }

    /// The file its stdout goes to.
    pub fn stdout_path(&self) -> &Path {
        &self.body.stdout
    }

    /// The file its stderr goes to.
    pub fn stderr_path(&self) -> &Path {
        &self.body.stderr
    }

    /// What it has written to stdout so far.
    pub fn stdout(&self) -> String {
        read(&self.body.stdout)
    }

    /// What it has written to stderr so far.
    pub fn stderr(&self) -> String {
        read(&self.body.stderr)
    }

    /// How it ended, or `None` while it runs.
    pub fn exited(&self) -> Option<ExitStatus> {
        self.body.exited()
    }

    /// Sends `signal` to the process; one that has ended already is fine.
    pub fn signal(&self, signal: Signal) {
        if self.exited().is_none() {
            let _ = kill(self.body.group(), signal);
        }
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// When it still runs after `deadline`.
    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus, WorldError> {
        Ok(wait_for(
            format!("{} (pid {}) to end", self.name(), self.pid()),
            deadline,
            || self.exited(),
        )?)
    }

    /// Asks the process to end (SIGTERM) and waits for it.
    ///
    /// # Errors
    /// When it still runs after `deadline`; it is killed then.
    pub fn terminate(&self, deadline: Duration) -> Result<ExitStatus, WorldError> {
        self.signal(Signal::SIGTERM);
        let ended = self.wait(deadline);
        if ended.is_err() {
            self.body.kill();
        }
        ended
    }

    /// Kills the process and its group (SIGKILL), as a crash would.
    pub fn kill9(&self) {
        self.body.kill();
    }

    /// Waits for a complete line of stdout or stderr that contains `text`, and returns it. Earlier lines count.
    ///
    /// # Errors
    /// When no such line comes in time, or the process ends without it; both with the end of its output.
    pub fn wait_for_line(&self, text: &str, deadline: Duration) -> Result<String, WorldError> {
        self.wait_for(&format!("a line with {text:?}"), deadline, |line| {
            line.contains(text).then(|| line.to_owned())
        })
    }

    /// Waits for a complete line of stdout or stderr that `pick` picks something from. Earlier lines count.
    ///
    /// # Errors
    /// As [`Process::wait_for_line`].
    pub fn wait_for<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut pick: impl FnMut(&str) -> Option<T>,
    ) -> Result<T, WorldError> {
        let mut read_bytes = [0, 0];
        let found = wait_for(what, deadline, || {
            // Looked at before the output: whatever an ended process wrote is then seen.
            let ended = self.exited();
            let outputs = [self.stdout(), self.stderr()];
            for (output, read_bytes) in outputs.iter().zip(&mut read_bytes) {
                let complete = output.rfind('\n').map_or(0, |end| end + 1);
                let fresh = output.get(*read_bytes..complete).unwrap_or_default();
                *read_bytes = complete.max(*read_bytes);
                if let Some(found) = fresh.lines().find_map(&mut pick) {
                    return Some(Ok(found));
                }
            }
            ended.map(Err)
        });
        match found {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(_)) | Err(_) => Err(self.in_vain(what)),
        }
    }

    /// The error about something that did not happen: whether the process still runs, and its last words.
    pub(crate) fn in_vain(&self, what: &str) -> WorldError {
        WorldError::InVain {
            name: self.name().to_owned(),
            status: self
                .exited()
                .map_or_else(|| "still runs".to_owned(), describe),
            what: what.to_owned(),
            tail: self.body.tail(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.body.kill();
    }
}

impl Body {
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn group(&self) -> Pid {
        Pid::from_raw(self.pid.cast_signed())
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exited(&self) -> Option<ExitStatus> {
        self.child().try_wait().ok().flatten()
    }

    /// Asks the process to end without waiting, by SIGTERM; an agent by SIGINT, so that it closes what it has. For a world that stops all
    /// its processes at once.
    pub(crate) fn ask_to_end(&self) {
        if self.exited().is_none() {
            let is_agent = self.name().starts_with(AGENT_PREFIX);
            let signal = if is_agent {
                Signal::SIGINT
            } else {
                Signal::SIGTERM
            };
            let _ = kill(self.group(), signal);
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.exited().is_some()
    }

    /// Kills the process with its group, and reaps it. Idempotent.
    pub(crate) fn kill(&self) {
        let mut child = self.child();
        // The group first: once the leader is reaped its id may be given to others.
        if matches!(child.try_wait(), Ok(None)) {
            let _ = killpg(self.group(), Signal::SIGKILL);
            let _ = wait_for("a killed process to end", KILL_DEADLINE, || {
                child.try_wait().ok().flatten()
            });
        }
    }

    /// The last lines of its output, for a person who looks for the cause.
    pub(crate) fn tail(&self) -> String {
        let mut text = String::new();
        for (label, path) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            let output = read(path);
            let lines: Vec<_> = output.lines().collect();
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                text.push_str(&format!("  {} {label}| {line}\n", self.name));
            }
        }
        text
    }
}

impl ProcessId {
    /// Whether this very process still runs (a zombie does not).
    pub(crate) fn is_running(&self) -> bool {
        running(self.pid) == Some(self.start)
    }

    /// Kills the process if it is still the one that is meant.
    pub(crate) fn kill(&self) {
        if self.is_running() {
            let _ = kill(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

/// The start time of a process in clock ticks since boot, zombies included.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    stat(pid).map(|(_, start)| start)
}

/// The start time of a process that runs; `None` for zombies and for none.
pub(crate) fn running(pid: u32) -> Option<u64> {
    stat(pid)
        .filter(|(state, _)| *state != 'Z' && *state != 'X')
        .map(|(_, start)| start)
}

fn stat(pid: u32) -> Option<(char, u64)> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// State and start time of a line of /proc/PID/stat. The command's name, in parentheses, may hold spaces and parentheses.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // State is field 3, the start time field 22.
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// Appends a process to the world's list, which a later process reads when this one was killed.
pub(crate) fn record(list: &Path, id: &ProcessId) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(list)?;
    writeln!(file, "{} {}", id.pid, id.start)
}

/// The processes that [`record`] wrote down.
pub(crate) fn recorded(list: &Path) -> Vec<ProcessId> {
    let parse = |line: &str| {
        let (pid, start) = line.split_once(' ')?;
        Some(ProcessId {
            pid: pid.parse().ok()?,
            start: start.parse().ok()?,
        })
    };
    read(list).lines().filter_map(parse).collect()
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// A file's text, or nothing where it cannot be read: it is shown to people or looked at again.
fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

type Job = Box<dyn FnOnce() + Send>;

fn spawn_on_lasting_thread(mut command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || jobs.iter().for_each(|job| job()));
        Mutex::new(sender)
    });
    let (answer, result) = mpsc::sync_channel(1);
    let job: Job = Box::new(move || {
        let _ = answer.send(command.spawn());
    });
    let gone = |_| io::Error::other("the spawning thread is gone");
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send(job)
        .map_err(|_| gone(()))?;
    result.recv().map_err(|_| gone(()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_apart_has_a_session_of_its_own_and_ends_like_others() {
        let dir = scratch("apart");
        let spawn = |name: &str, company| {
            Process::spawn(name, name, shell("sleep 1000"), &dir, company).unwrap()
        };
        let session = |process: &Process| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
            let fields = stat.rsplit_once(')').unwrap().1;
            fields.split_whitespace().nth(3).unwrap().to_owned()
        };
        let ((apart, _), (together, _)) = (
            spawn("apart", Company::Session),
            spawn("with", Company::Group),
        );
        assert_eq!(session(&apart), apart.pid().to_string());
        assert_ne!(session(&together), together.pid().to_string());
        for process in [apart, together] {
            process.terminate(KILL_DEADLINE).unwrap();
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn stat_lines_with_odd_names_are_read() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        assert_eq!(
            parse_stat(&format!("42 (a) b (c) {tail}")),
            Some(('S', 4711))
        );
        assert_eq!(parse_stat("42 (x"), None);
    }

    #[test]
    fn a_process_is_not_another_of_the_same_id() {
        let own = std::process::id();
        let start = running(own).unwrap();
        assert!(ProcessId { pid: own, start }.is_running());
        assert!(
            !ProcessId {
                pid: own,
                start: start + 1
            }
            .is_running()
        );
    }

    fn scratch(test: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("nsm-world-{}-{test}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn lines_are_waited_for_and_a_kill_takes_the_group() {
        let dir = scratch("lines");
        let script = "echo started; sleep 1000 & echo child $!; echo to-stderr >&2; wait";
        let (process, id) = Process::spawn("p", "p", shell(script), &dir, Company::Group).unwrap();
        let child = process
            .wait_for_line("child ", Duration::from_secs(10))
            .unwrap();
        process
            .wait_for_line("to-stderr", Duration::from_secs(10))
            .unwrap();
        let child: u32 = child.trim_start_matches("child ").parse().unwrap();
        assert!(id.is_running() && running(child).is_some());
        process.kill9();
        assert!(!id.is_running());
        wait_for("the group to be gone", Duration::from_secs(5), || {
            running(child).is_none().then_some(())
        })
        .unwrap();
        drop(process);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_early_end_is_told_with_the_output() {
        let dir = scratch("early");
        let (process, _) = Process::spawn(
            "p",
            "p",
            shell("echo no such thing >&2; exit 3"),
            &dir,
            Company::Group,
        )
        .unwrap();
        let error = process
            .wait_for_line("ready", Duration::from_secs(10))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit code 3") && error.contains("no such thing"),
            "{error}"
        );
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_process_outlives_the_thread_that_spawned_it() {
        let dir = scratch("thread");
        let spawn = {
            let dir = dir.clone();
            move || Process::spawn("p", "p", shell("sleep 1000"), &dir, Company::Group).unwrap()
        };
        let (process, id) = thread::spawn(spawn).join().unwrap();
        // The death signal would have come with the thread's end, which join has waited for.
        assert!(process.wait(Duration::from_millis(50)).is_err());
        assert!(id.is_running());
        let status = process.terminate(Duration::from_secs(10)).unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32));
        fs::remove_dir_all(dir).unwrap();
    }
}
