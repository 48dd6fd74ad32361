//! A run from the machine's start to the command's end.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    io::{self, BufRead as _, BufReader},
    os::unix::net::UnixStream,
    process::{ChildStdout, ExitCode},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::signal::{SigSet, Signal};

use super::{
    accelerator::Accelerator,
    channel::Frame,
    interruption,
    machine::{Machine, Running},
};

/// How many of the console's last lines an error shows: a panic's trace with what led to it.
const CONSOLE_LINES: usize = 40;

/// QEMU ends soon after its guest; its words are waited for no longer.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What may happen during a run.
#[derive(Debug)]
enum Event {
    Started(String),
    Ended(Frame),
    /// The guest's frames have ended without an exit status, by this error or QEMU's end.
    Lost(Option<io::Error>),
    /// Nobody reads our output.
    OutputClosed(io::Error),
    Signal(Signal),
}

/// A machine and what it says.
#[derive(Debug)]
pub(super) struct Session {
    machine: Running,
    events: Receiver<Event>,
    console: Arc<Mutex<VecDeque<String>>>,
    accelerator: Accelerator,
    begin: Instant,
    limit: Duration,
}

impl Session {
    /// Starts the machine; `signals` are blocked in all threads and end the session.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start(
        machine: Machine<'_>,
        limit: Duration,
        show_console: bool,
        signals: SigSet,
    ) -> Result<Self> {
        let begin = Instant::now();
        let accelerator = machine.accelerator;
        let mut machine = machine.start()?;
        let (sender, events) = mpsc::channel();
        let on_signal = sender.clone();
        interruption::on_signal(signals, move |signal| {
            let _ = on_signal.send(Event::Signal(signal));
        });
        if let Some(channel) = machine.channel.take() {
            thread::spawn(move || read_frames(channel, &sender));
        }
        let console = Arc::default();
        if let Some(stream) = machine.console.take() {
            let console = Arc::clone(&console);
            thread::spawn(move || read_console(stream, &console, show_console));
        }
        Ok(Self {
            machine,
            events,
            console,
            accelerator,
            begin,
            limit,
        })
    }

    /// Waits for the command's end, and returns its exit status.
    ///
    /// # Errors
    /// When the guest does not get that far.
    pub(super) fn wait(mut self) -> Result<ExitCode> {
        loop {
            let left = self.limit.saturating_sub(self.begin.elapsed());
            match self.events.recv_timeout(left) {
                Ok(Event::Started(release)) => eprintln!(
                    "==> kernel {release} ({}) is up after {:.1} s",
                    self.accelerator.name(),
                    self.begin.elapsed().as_secs_f64()
                ),
                Ok(Event::Ended(Frame::Exit(status))) => return Ok(ExitCode::from(status)),
                Ok(Event::Ended(Frame::NotStarted(status, reason))) => {
                    eprintln!("{reason}");
                    return Ok(ExitCode::from(status));
                }
                Ok(Event::Ended(frame)) => {
                    return Err(self.failure(&format!("the guest failed: {frame:?}")));
                }
                Ok(Event::Lost(error)) => {
                    let error = error.map_or_else(String::new, |error| format!(" ({error})"));
                    let what = format!("the virtual machine ended before the command did{error}");
                    return Err(self.failure(&what));
                }
                Ok(Event::OutputClosed(error)) => {
                    return Err(error).context("cannot pass on the command's output");
                }
                Ok(Event::Signal(signal)) => {
                    eprintln!("==> {signal}: the virtual machine is ended");
                    return Ok(ExitCode::from(interruption::status_of(signal)));
                }
                Err(RecvTimeoutError::Timeout) => {
                    let limit = self.limit.as_secs();
                    let what = format!(
                        "still running after {limit} s, so it was ended (--timeout sets the limit)"
                    );
                    return Err(self.failure(&what));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("all threads of the session have ended")
                }
            }
        }
    }

    /// What failed, with the words of all who may know why.
    fn failure(&mut self, what: &str) -> anyhow::Error {
        // Its words come last, and a machine that hangs has none.
        let _ = self.machine.qemu.wait(LAST_WORDS);
        let mut text = what.to_owned();
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        for hint in hints(console.iter().map(String::as_str)) {
            let _ = write!(text, "\n{hint}");
        }
        let children = [Some(&self.machine.qemu), self.machine.files.as_ref()];
        for complaint in children
            .into_iter()
            .flatten()
            .filter_map(|child| child.complaint())
        {
            let _ = write!(text, "\n{complaint}");
        }
        let lines: Vec<_> = console.iter().map(String::as_str).collect();
        if lines.is_empty() {
            text.push_str("\nthe console stayed empty");
        } else {
            let _ = write!(text, "\nthe console's last lines:\n{}", lines.join("\n"));
        }
        anyhow!(text)
    }
}

/// What to do about what the console shows.
fn hints<'a>(console: impl Iterator<Item = &'a str>) -> Vec<&'static str> {
    const KNOWN: &[(&str, &str)] = &[
        (
            "Out of memory",
            "the guest ran out of memory: give it more by --memory",
        ),
        (
            "No space left on device",
            "the guest's overlay is full, which takes half of its memory: give it more by --memory",
        ),
        (
            "System is deadlocked on memory",
            "the guest's memory does not suffice to start: give it more by --memory",
        ),
        (
            "Initramfs unpacking failed",
            "the initramfs does not fit into the guest's memory: give it more by --memory",
        ),
        ("Kernel panic", "the guest's kernel panicked"),
        (
            "unknown filesystem type",
            "the kernel lacks a filesystem: --modules names an image's modules",
        ),
        (
            "No such device",
            "the kernel lacks a filesystem or driver: --modules names an image's modules",
        ),
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
        let event = match Frame::read_from(&mut channel) {
            Ok(Some(Frame::Stdout(bytes))) => match write(&mut io::stdout().lock(), &bytes) {
                Ok(()) => continue,
                Err(error) => Event::OutputClosed(error),
            },
            Ok(Some(Frame::Stderr(bytes))) => match write(&mut io::stderr().lock(), &bytes) {
                Ok(()) => continue,
                Err(error) => Event::OutputClosed(error),
            },
            Ok(Some(Frame::Started(release))) => {
                let _ = events.send(Event::Started(release));
                continue;
            }
            Ok(Some(frame)) => Event::Ended(frame),
            Ok(None) => Event::Lost(None),
            Err(error) => Event::Lost(Some(error)),
        };
        // Nobody listens any more when the session has ended otherwise.
        let _ = events.send(event);
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
