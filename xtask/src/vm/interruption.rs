//! Ctrl-C and its like: the machine is ended, then this process with the signal's status.

use std::{mem::MaybeUninit, process, ptr, thread, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    libc,
    sys::signal::{SigSet, Signal},
};

/// How long this process may take to end. Its last lines can block for ever: nobody need read its standard error.
const END: Duration = Duration::from_secs(5);

/// Blocks the signals that ask a process to end, in this thread and those that it starts from now on; not those that the caller of this
/// process ignores, as `nohup` does.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn block() -> Result<SigSet> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .filter(|signal| !is_ignored(*signal))
        .collect();
    signals.thread_block().context("block signals")?;
    Ok(signals)
}

/// Whether this process ignores a signal.
fn is_ignored(signal: Signal) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action the kernel only writes the present one, to a variable of that type.
    let failed = unsafe { libc::sigaction(signal as i32, ptr::null(), action.as_mut_ptr()) } != 0;
    // SAFETY: all zero is a valid `sigaction` of integers and null pointers, and the kernel's is one.
    let action = unsafe { action.assume_init() };
    !failed && action.sa_sigaction == libc::SIG_IGN
}

/// Ends this process with a status, unless it has ended within [`END`]. The kernel ends QEMU and virtiofsd with it.
pub(super) fn end_at_last(status: u8) {
    thread::spawn(move || {
        thread::sleep(END);
        process::exit(status.into());
    });
}

/// Calls `then` with the first of the blocked signals that comes.
pub(super) fn on_signal(signals: SigSet, then: impl FnOnce(Signal) + Send + 'static) {
    thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            then(signal);
        }
    });
}

/// The exit status of a process that a signal ended, as shells have it.
pub(super) fn status_of(signal: Signal) -> u8 {
    status_of_number(signal as i32)
}

/// As [`status_of`], for signals that have a number only.
pub(super) fn status_of_number(signal: i32) -> u8 {
    128 | u8::try_from(signal).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_as_in_shells() {
        assert_eq!(status_of(Signal::SIGINT), 130);
        assert_eq!(status_of(Signal::SIGKILL), 137);
    }
}
