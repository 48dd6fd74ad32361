//! Ctrl-C and SIGTERM: worlds are torn down before the process ends.
//!
//! The handler itself only writes a byte to a pipe; a thread that reads it does the work. When somebody waits for the
//! signal ([`wait`]), it is handed to them instead, and they end in order.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Condvar, Mutex, Once, OnceLock, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    thread,
};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};

use crate::world;

/// The pipe's writing end, for the handler.
static PIPE: AtomicI32 = AtomicI32::new(-1);

/// Signals that somebody waits for: how many wait, and the last that came for them.
static WAITING: Mutex<Waiting> = Mutex::new(Waiting {
    waiters: 0,
    came: None,
});
static CAME: Condvar = Condvar::new();

struct Waiting {
    waiters: usize,
    came: Option<Signal>,
}

/// Installs the handlers once per process. A program that has its own is left alone; it tears its worlds down itself.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Without the handlers a Ctrl-C leaves a world behind, which the next one sweeps up: not worth failing for.
        if let Err(error) = try_install() {
            eprintln!("worlds will not be torn down on Ctrl-C: {error}");
        }
    });
}

fn try_install() -> io::Result<()> {
    static WRITER: OnceLock<OwnedFd> = OnceLock::new();
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    PIPE.store(WRITER.get_or_init(|| writer).as_raw_fd(), Ordering::SeqCst);
    thread::Builder::new()
        .name("interrupt".into())
        .spawn(move || attend(File::from(reader)))?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let ours = SigAction::new(
            SigHandler::Handler(handle),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        // SAFETY: `handle` does async-signal-safe work only: an atomic load and write(2).
        let before = unsafe { sigaction(signal, &ours)? };
        if !matches!(before.handler(), SigHandler::SigDfl) {
            // SAFETY: puts back the handler that was there.
            unsafe { sigaction(signal, &before)? };
        }
    }
    Ok(())
}

extern "C" fn handle(signal: nix::libc::c_int) {
    let byte = signal as u8;
    let pipe = PIPE.load(Ordering::SeqCst);
    // SAFETY: write(2) of one byte from the stack to a pipe that is never closed.
    unsafe { nix::libc::write(pipe, (&raw const byte).cast(), 1) };
}

fn attend(mut pipe: File) {
    let mut byte = [0];
    while pipe.read_exact(&mut byte).is_ok() {
        let signal = Signal::try_from(i32::from(byte[0])).unwrap_or(Signal::SIGTERM);
        let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.waiters > 0 {
            waiting.came = Some(signal);
            CAME.notify_all();
            continue;
        }
        drop(waiting);
        world::tear_down_all();
        die_of(signal);
    }
}

/// Waits for Ctrl-C or SIGTERM; the caller then tears its world down itself. A second signal ends the process at once,
/// after tearing down.
pub fn wait() -> Signal {
    install();
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    waiting.waiters += 1;
    loop {
        if let Some(signal) = waiting.came.take() {
            waiting.waiters -= 1;
            return signal;
        }
        waiting = CAME.wait(waiting).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Ends the process as the signal would have without a handler, so that the caller's shell sees it.
fn die_of(signal: Signal) {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default disposition runs no code of ours.
    if unsafe { sigaction(signal, &default) }.is_ok() {
        let _ = raise(signal);
    }
    std::process::exit(128 + signal as i32);
}
