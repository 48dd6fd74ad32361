//! A run from the machine's start to the command's end.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    io::{self, BufRead as _, BufReader},
    os::unix::net::UnixStream,
    process::{ChildStdout, ExitCode},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use nix::sys::signal::{SigSet, Signal};

use super::{
    channel::Frame,
    interruption,
    machine::{Machine, Running},
};

/// How many of the console's last lines are kept: a panic's trace with what led to it.
const CONSOLE_LINES: usize = 80;

/// QEMU ends soon after its guest; its last output is waited for no longer.
const QEMU_END: Duration = Duration::from_secs(2);

/// A start takes 10 seconds in emulation on a busy machine; what takes much longer hangs.
const START_LIMIT: Duration = Duration::from_secs(120);

/// How often an emulated machine is started until it comes up. Emulation of two processors is not exact: one of some dozens
/// of starts fails in QEMU 7.2, by code that the kernel patches while the other processor runs it (Red Hat's bug 2216496,
/// mended in 8.1), and by timers that a busy host serves late. The command has not run then, so nothing is done twice.
const STARTS: u32 = 3;

/// How a run is limited and shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// For the whole run, the start included.
    pub(super) limit: Duration,
    /// Whether the kernel's console is shown.
    pub(super) console: bool,
}

/// Runs the machine until its command has ended, and returns the command's exit status. `signals` are blocked in all threads
/// and end the run.
///
/// # Errors
/// When the command does not get to its end.
pub(super) fn run(machine: &Machine<'_>, terms: Terms, signals: SigSet) -> Result<ExitCode> {
    let (sender, events) = mpsc::channel();
    let on_signal = sender.clone();
    interruption::on_signal(signals, move |signal| {
        let _ = on_signal.send(Event::End(End::Signal(signal)));
    });
    let deadline = Instant::now() + terms.limit;
    let mut starts = 1;
    loop {
        let mut session = Session::start(machine, terms, sender.clone())?;
        match session.wait(&events, deadline) {
            Ok(status) => return Ok(ExitCode::from(status)),
            Err(error) if session.may_start_again && starts < STARTS => {
                eprintln!(
                    "==> {error:#}\n==> the emulated machine did not come up: starting it again"
                );
                starts += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// What may happen during a run.
#[derive(Debug)]
enum Event {
    /// The guest is up, with this kernel.
    Started(String),
    End(End),
}

/// How a machine's run ends.
#[derive(Debug)]
enum End {
    /// The command has ended with this status.
    Exit(u8),
    /// The command cannot be started: the status for that and the reason.
    NotStarted(u8, String),
    /// The guest cannot do its work, for this reason.
    Failed(String),
    /// The guest's frames have ended without an exit status, by this error or QEMU's end.
    Lost(Option<io::Error>),
    /// The command's output cannot be passed on.
    OutputClosed(io::Error),
    Signal(Signal),
}

/// A machine and its output.
#[derive(Debug)]
struct Session {
    machine: Running,
    console: Arc<Mutex<VecDeque<String>>>,
    accelerator: &'static str,
    begin: Instant,
    limit: Duration,
    /// As long as the command has not been started, and the machine is one that may fail by chance.
    may_start_again: bool,
}

impl Session {
    fn start(machine: &Machine<'_>, terms: Terms, events: Sender<Event>) -> Result<Self> {
        let begin = Instant::now();
        let mut running = machine.start()?;
        if let Some(channel) = running.channel.take() {
            thread::spawn(move || read_frames(channel, &events));
        }
        let console = Arc::default();
        if let Some(stream) = running.console.take() {
            let console = Arc::clone(&console);
            thread::spawn(move || read_console(stream, &console, terms.console));
        }
        Ok(Self {
            machine: running,
            console,
            accelerator: machine.accelerator.name(),
            begin,
            limit: terms.limit,
            may_start_again: machine.accelerator.is_emulation(),
        })
    }

    /// Waits for the command's end, and returns the status to end with.
    fn wait(&mut self, events: &Receiver<Event>, deadline: Instant) -> Result<u8> {
        let start_deadline = deadline.min(self.begin + START_LIMIT);
        let mut started = false;
        loop {
            let until = if started { deadline } else { start_deadline };
            match events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Event::Started(release)) => {
                    started = true;
                    self.may_start_again = false;
                    eprintln!(
                        "==> kernel {release} ({}) is up after {:.1} s",
                        self.accelerator,
                        self.begin.elapsed().as_secs_f64()
                    );
                }
                Ok(Event::End(end)) => return self.end(end),
                Err(_) if started => {
                    return Err(self.failure(&format!(
                        "the command still ran after {} s and was ended; --timeout sets the limit",
                        self.limit.as_secs()
                    )));
                }
                Err(_) => {
                    let waited = self.begin.elapsed().as_secs();
                    self.may_start_again &= Instant::now() < deadline;
                    return Err(self.failure(&format!(
                        "the guest did not come up within {waited} s; --console shows how far it gets"
                    )));
                }
            }
        }
    }

    /// The status to end with.
    fn end(&mut self, end: End) -> Result<u8> {
        match end {
            End::Exit(status) => {
                if status != 0 {
                    self.say_if_out_of_memory();
                }
                Ok(status)
            }
            End::NotStarted(status, reason) => {
                eprintln!("{reason}");
                Ok(status)
            }
            End::Failed(reason) => {
                self.may_start_again = false;
                Err(self.failure(&format!("the guest cannot run the command: {reason}")))
            }
            End::Lost(error) => {
                let error = error.map_or_else(String::new, |error| format!(" ({error})"));
                Err(self.failure(&format!(
                    "the virtual machine ended before the command did{error}"
                )))
            }
            End::OutputClosed(error) => Err(error).context("cannot pass on the command's output"),
            End::Signal(signal) => {
                eprintln!("==> {signal}: the virtual machine is ended");
                Ok(interruption::status_of(signal))
            }
        }
    }

    /// The command only sees that it is killed, or that a call fails.
    fn say_if_out_of_memory(&self) {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        if console.iter().any(|line| line.contains(OUT_OF_MEMORY.0)) {
            eprintln!("==> {}", OUT_OF_MEMORY.1);
        }
    }

    /// What failed, with what QEMU, virtiofsd and the console have about it.
    fn failure(&mut self, what: &str) -> anyhow::Error {
        // QEMU's errors come last; a machine that hangs has none.
        let _ = self.machine.qemu.wait(QEMU_END);
        let mut text = what.to_owned();
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        for hint in hints(console.iter().map(String::as_str)) {
            let _ = write!(text, "\n{hint}");
        }
        if let Some(complaint) = self.machine.complaint() {
            let _ = write!(text, "\n{complaint}");
        }
        if console.is_empty() {
            text.push_str("\nthe console is empty");
        } else {
            text.push_str("\nthe console's last lines:");
            for line in console.iter() {
                let _ = write!(text, "\n    {line}");
            }
        }
        anyhow!(text)
    }
}

/// Of an out-of-memory kill: what the console shows, and what to do.
const OUT_OF_MEMORY: (&str, &str) = (
    "Out of memory",
    "the guest ran out of memory: give it more by --memory",
);

/// What to do about what the console shows.
fn hints<'a>(console: impl Iterator<Item = &'a str>) -> Vec<&'static str> {
    const KNOWN: &[(&str, &str)] = &[
        OUT_OF_MEMORY,
        (
            "System is deadlocked on memory",
            "the guest's memory does not suffice to start: give it more by --memory",
        ),
        (
            "Initramfs unpacking failed",
            "the initramfs does not fit into the guest's memory: give it more by --memory",
        ),
        (
            "No such device",
            "the kernel lacks a filesystem or driver: --modules names an image's modules",
        ),
        ("Kernel panic", "the guest's kernel panicked"),
    ];
    let lines: Vec<_> = console.collect();
    let seen = |sign: &str| lines.iter().any(|line| line.contains(sign));
    KNOWN
        .iter()
        .filter(|(sign, _)| seen(sign))
        .map(|(_, hint)| *hint)
        .collect()
}

/// Passes the command's output on, and reports the rest, until the command ends or the stream does.
fn read_frames(channel: UnixStream, events: &Sender<Event>) {
    let mut channel = BufReader::new(channel);
    loop {
        let end = match Frame::read_from(&mut channel) {
            Ok(Some(Frame::Stdout(bytes))) => match write(&mut io::stdout().lock(), &bytes) {
                Ok(()) => continue,
                Err(error) => End::OutputClosed(error),
            },
            Ok(Some(Frame::Stderr(bytes))) => match write(&mut io::stderr().lock(), &bytes) {
                Ok(()) => continue,
                Err(error) => End::OutputClosed(error),
            },
            Ok(Some(Frame::Started(release))) => {
                // The receiver is gone when the session has ended otherwise; so it is below.
                let _ = events.send(Event::Started(release));
                continue;
            }
            Ok(Some(Frame::Exit(status))) => End::Exit(status),
            Ok(Some(Frame::NotStarted(status, reason))) => End::NotStarted(status, reason),
            Ok(Some(Frame::Failed(reason))) => End::Failed(reason),
            Ok(None) => End::Lost(None),
            Err(error) => End::Lost(Some(error)),
        };
        let _ = events.send(Event::End(end));
        return;
    }
}

fn write(to: &mut impl io::Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Keeps the console's last lines.
fn read_console(stream: ChildStdout, kept: &Mutex<VecDeque<String>>, show: bool) {
    for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if show {
            eprintln!("console: {line}");
        }
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == CONSOLE_LINES {
            kept.pop_front();
        }
        kept.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_console_shows_leads_to_hints() {
        let found = |line| hints([line].into_iter());
        assert!(found("Out of memory: Killed process 77 (cargo)")[0].contains("--memory"));
        assert!(
            found("mount: mounting host on /host failed: No such device")[0].contains("--modules")
        );
        assert!(found("all is well").is_empty());
    }
}
