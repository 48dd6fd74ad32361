//! Ctrl-C and its like: the machine is ended, then this process with the signal's status.

use std::thread;

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};

/// Blocks the signals that ask a process to end, in this thread and those that it starts from now on.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn block() -> Result<SigSet> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    signals.thread_block().context("block signals")?;
    Ok(signals)
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
