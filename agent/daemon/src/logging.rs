//! The log: one line an event, to standard error, its level changeable while the program runs.

use anyhow::Context as _;
use tracing_subscriber::{
    EnvFilter, Registry, fmt, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _,
};

use crate::config::{Log, LogFormat};

/// Changes the level of the running log.
#[derive(Debug, Clone)]
pub(crate) struct LogHandle(reload::Handle<EnvFilter, Registry>);

impl LogHandle {
    /// Sets the level of the log from now on (`info`, `info,h2=warn`).
    ///
    /// # Errors
    ///
    /// The level is none; the one in force stays.
    pub(crate) fn set_level(&self, level: &str) -> anyhow::Result<()> {
        self.0
            .reload(filter(level)?)
            .context("the log is gone: its level cannot be changed")
    }
}

/// Starts the log of this process. Once only.
///
/// # Errors
///
/// The level is none, or a log was started before.
pub(crate) fn start(log: &Log) -> anyhow::Result<LogHandle> {
    let (filter, handle) = reload::Layer::new(filter(&log.level)?);
    let registry = tracing_subscriber::registry().with(filter);
    let lines = fmt::layer().with_writer(std::io::stderr);
    match log.format {
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
        LogFormat::Text => registry
            .with(lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())))
            .try_init(),
    }
    .context("cannot start the log")?;
    Ok(LogHandle(handle))
}

fn filter(level: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::builder()
        .parse(level)
        .with_context(|| format!("{level:?} is no log level"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_changes_while_the_log_runs() {
        let (layer, handle) = reload::Layer::new(filter("warn").unwrap());
        let handle = LogHandle(handle);
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            let enabled = || tracing::enabled!(tracing::Level::DEBUG);
            assert!(!enabled());
            handle.set_level("debug").unwrap();
            tracing::callsite::rebuild_interest_cache();
            assert!(enabled());
            assert!(handle.set_level("a=b=c").is_err());
            assert!(enabled(), "a bad level leaves the one in force");
        });
        assert!(handle.set_level("info").is_err(), "the log is gone");
    }
}
