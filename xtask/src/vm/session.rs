//! A run from the machine's start to the command's end.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    os::{fd::AsFd, unix::net::UnixStream},
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
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

/// What is kept of a line of the console, in bytes. A guest can write without an end.
const CONSOLE_LINE: u64 = 4096;

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
        interruption::end_at_last(interruption::status_of(signal));
        let _ = on_signal.send((Origin::Signals, Event::End(End::Signal(signal))));
    });
    let deadline = Instant::now() + terms.limit;
    let mut start = 1;
    loop {
        let mut session = Session::start(machine, terms, start, sender.clone())?;
        match session.wait(&events, deadline) {
            Ok(status) => return Ok(ExitCode::from(status)),
            Err(error) if session.may_start_again && start < STARTS => {
                say(&format!(
                    "==> {error:#}\n==> the emulated machine did not come up: starting it again"
                ));
                start += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Where an event comes from. A machine that was given up still sends the end of its frames when its successor runs already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Signals,
    /// The machine's start with this number.
    Start(u32),
}

/// The next event until then that concerns the start with this number; events of other starts are dropped.
fn next_event(
    events: &Receiver<(Origin, Event)>,
    start: u32,
    until: Instant,
) -> Result<Event, RecvTimeoutError> {
    loop {
        let (origin, event) =
            events.recv_timeout(until.saturating_duration_since(Instant::now()))?;
        if origin == Origin::Signals || origin == Origin::Start(start) {
            return Ok(event);
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
    /// The number of this start.
    start: u32,
    machine: Running,
    console: Arc<Mutex<VecDeque<String>>>,
    /// Ends with the console, which ends with QEMU.
    console_reader: Option<JoinHandle<()>>,
    accelerator: &'static str,
    begin: Instant,
    limit: Duration,
    /// As long as the command has not been started, and the machine is one that may fail by chance.
    may_start_again: bool,
}

impl Session {
    fn start(
        machine: &Machine<'_>,
        terms: Terms,
        start: u32,
        events: Sender<(Origin, Event)>,
    ) -> Result<Self> {
        let begin = Instant::now();
        let mut running = machine.start()?;
        if let Some(channel) = running.channel.take() {
            thread::spawn(move || read_frames(channel, start, &events));
        }
        let console = Arc::default();
        let console_reader = running.console.take().map(|stream| {
            let console = Arc::clone(&console);
            thread::spawn(move || read_console(stream, &console, terms.console))
        });
        Ok(Self {
            start,
            machine: running,
            console,
            console_reader,
            accelerator: machine.accelerator.name(),
            begin,
            limit: terms.limit,
            may_start_again: machine.accelerator.is_emulation(),
        })
    }

    /// Waits for the command's end, and returns the status to end with.
    fn wait(&mut self, events: &Receiver<(Origin, Event)>, deadline: Instant) -> Result<u8> {
        let start_deadline = deadline.min(self.begin + START_LIMIT);
        let mut started = false;
        loop {
            let until = if started { deadline } else { start_deadline };
            match next_event(events, self.start, until) {
                // Root in the guest can send it again.
                Ok(Event::Started(_)) if started => {}
                Ok(Event::Started(release)) => {
                    started = true;
                    self.may_start_again = false;
                    say(&format!(
                        "==> kernel {} ({}) is up after {:.1} s",
                        printable(&release),
                        self.accelerator,
                        self.begin.elapsed().as_secs_f64()
                    ));
                }
                Ok(Event::End(end)) => return self.end(end),
                Err(_) if started => {
                    interruption::end_at_last(1);
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
                say(&printable(&reason));
                Ok(status)
            }
            End::Failed(reason) => {
                self.may_start_again = false;
                Err(self.failure(&format!(
                    "the guest cannot run the command: {}",
                    printable(&reason)
                )))
            }
            End::Lost(error) => {
                let error = error.map_or_else(String::new, |error| format!(" ({error})"));
                Err(self.failure(&format!(
                    "the virtual machine ended before the command did{error}"
                )))
            }
            End::OutputClosed(error) => Err(error).context("cannot pass on the command's output"),
            End::Signal(signal) => {
                say(&format!("==> {signal}: the virtual machine is ended"));
                Ok(interruption::status_of(signal))
            }
        }
    }

    /// The command only sees that it is killed, or that a call fails.
    fn say_if_out_of_memory(&self) {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        if console.iter().any(|line| line.contains(OUT_OF_MEMORY.0)) {
            say(&format!("==> {}", OUT_OF_MEMORY.1));
        }
    }

    /// What failed, with what QEMU, virtiofsd and the console have about it.
    fn failure(&mut self, what: &str) -> anyhow::Error {
        // QEMU's errors come last; a machine that hangs has none.
        if let Ok(Some(_)) = self.machine.qemu.wait(QEMU_END)
            && let Some(reader) = self.console_reader.take()
        {
            // A reader that panicked has shown why, and the lines before are kept.
            let _ = reader.join();
        }
        let mut text = what.to_owned();
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        self.may_start_again &= !gave_up(console.iter().map(String::as_str));
        for hint in hints(console.iter().map(String::as_str)) {
            let _ = write!(text, "\n{hint}");
        }
        if let Some(stderr) = self.machine.stderr_text() {
            let _ = write!(text, "\n{stderr}");
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

/// Whether init.sh has found that the guest cannot start. The reason is not chance: the next start would end in the same way.
fn gave_up<'a>(mut console: impl Iterator<Item = &'a str>) -> bool {
    console.any(|line| line.starts_with("vm: "))
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

/// Writes a line to standard error, in one piece, so that it stays whole beside the command's output. One that cannot be written is lost.
fn say(line: &str) {
    let _ = io::Write::write_all(&mut io::stderr(), format!("{line}\n").as_bytes());
}

/// Text of the guest, without what controls a terminal: the firmware alone resets it at each start.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|it| !it.is_control() || *it == '\t')
        .collect()
}

/// Passes the command's output on, and reports the rest, until the command ends or the stream does.
fn read_frames(channel: UnixStream, start: u32, events: &Sender<(Origin, Event)>) {
    let origin = Origin::Start(start);
    let mut channel = BufReader::new(channel);
    loop {
        let end = match Frame::read_from(&mut channel) {
            Ok(Some(Frame::Stdout(bytes))) => match write(io::stdout(), &bytes) {
                Ok(()) => continue,
                Err(error) => End::OutputClosed(error),
            },
            Ok(Some(Frame::Stderr(bytes))) => match write(io::stderr(), &bytes) {
                Ok(()) => continue,
                Err(error) => End::OutputClosed(error),
            },
            Ok(Some(Frame::Started(release))) => {
                // The receiver is gone when the session has ended otherwise; so it is below.
                let _ = events.send((origin, Event::Started(release)));
                continue;
            }
            Ok(Some(Frame::Exit(status))) => End::Exit(status),
            Ok(Some(Frame::NotStarted(status, reason))) => End::NotStarted(status, reason),
            Ok(Some(Frame::Failed(reason))) => End::Failed(reason),
            Ok(None) => End::Lost(None),
            Err(error) => End::Lost(Some(error)),
        };
        let _ = events.send((origin, Event::End(end)));
        return;
    }
}

/// Writes to a stream of this process past the lock that its own lines take: a reader that stalls stops the command's output, and not
/// the thread that ends the machine.
fn write(to: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let to = to.as_fd().try_clone_to_owned()?;
    io::Write::write_all(&mut File::from(to), bytes)
}

/// Keeps the console's last lines.
fn read_console(stream: impl io::Read, kept: &Mutex<VecDeque<String>>, show: bool) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    while let Ok(1..) = stream
        .by_ref()
        .take(CONSOLE_LINE)
        .read_until(b'\n', &mut line)
    {
        let text = String::from_utf8_lossy(&line);
        let text = printable(text.trim_end());
        line.clear();
        if show {
            say(&format!("console: {text}"));
        }
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == CONSOLE_LINES {
            kept.pop_front();
        }
        kept.push_back(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_machine_that_was_given_up_does_not_end_the_next() {
        let (sender, events) = mpsc::channel();
        let soon = Instant::now() + Duration::from_secs(10);
        let (frames, theirs) = UnixStream::pair().unwrap();
        // The first machine is killed: its frames end.
        drop(theirs);
        read_frames(frames, 1, &sender);
        let (frames, mut theirs) = UnixStream::pair().unwrap();
        let started = Frame::Started("6.12".to_owned());
        started.write_to(&mut theirs).unwrap();
        drop(theirs);
        read_frames(frames, 2, &sender);
        let event = next_event(&events, 2, soon).unwrap();
        assert!(
            matches!(&event, Event::Started(release) if release == "6.12"),
            "{event:?}"
        );
        let event = next_event(&events, 2, soon).unwrap();
        assert!(matches!(event, Event::End(End::Lost(None))), "{event:?}");
    }

    #[test]
    fn a_signal_ends_whichever_machine_runs() {
        let (sender, events) = mpsc::channel();
        let end = Event::End(End::Signal(Signal::SIGTERM));
        sender.send((Origin::Signals, end)).unwrap();
        let event = next_event(&events, 3, Instant::now() + Duration::from_secs(10)).unwrap();
        assert!(matches!(event, Event::End(End::Signal(_))), "{event:?}");
        let nothing = next_event(&events, 3, Instant::now());
        assert!(nothing.is_err(), "{nothing:?}");
    }

    #[test]
    fn the_console_is_kept_in_bounds_and_without_what_controls_a_terminal() {
        let kept = Mutex::new(VecDeque::new());
        let long = vec![b'a'; 3 * CONSOLE_LINE as usize];
        let written = [b"\x1bc\x1b[2JSeaBIOS\r\n", long.as_slice(), b"\nend"].concat();
        read_console(written.as_slice(), &kept, false);
        let kept = kept.into_inner().unwrap();
        assert_eq!(kept[0], "c[2JSeaBIOS");
        assert_eq!(kept.back().map(String::as_str), Some("end"));
        assert!(kept.iter().all(|line| line.len() <= CONSOLE_LINE as usize));
    }

    #[test]
    fn what_init_cannot_do_is_not_tried_again() {
        assert!(gave_up(
            ["quiet", "vm: cannot load /modules/00-fuse.ko"].into_iter()
        ));
        assert!(!gave_up(
            ["[    0.5] kvm: no hardware support", "Kernel panic"].into_iter()
        ));
    }

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
