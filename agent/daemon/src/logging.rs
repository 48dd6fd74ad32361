//! The log: one line an event, to standard error, its level changeable while the program runs.

use anyhow::Context as _;
use nsm_core::text::Shown;
use tracing::field::Field;
use tracing_subscriber::{
    EnvFilter, Registry,
    field::MakeExt as _,
    fmt::{
        self,
        format::{self, FormatFields, Writer},
    },
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
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
        LogFormat::Text => {
            let lines = lines.fmt_fields(escaped_fields());
            registry
                .with(lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())))
                .try_init()
        }
    }
    .context("cannot start the log")?;
    Ok(LogHandle(handle))
}

/// Fields as text, each value on the event's own line whatever it holds: names, addresses and errors come from other domains, too. JSON
/// escapes them by itself.
fn escaped_fields() -> impl for<'writer> FormatFields<'writer> + Send + Sync + 'static {
    let field = |writer: &mut Writer<'_>, field: &Field, value: &dyn std::fmt::Debug| {
        let value = format!("{value:?}");
        match field.name() {
            "message" => write!(writer, "{}", Shown(&value)),
            name => write!(writer, "{name}={}", Shown(&value)),
        }
    };
    format::debug_fn(field).delimited(" ")
}

fn filter(level: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::builder()
        .parse(level)
        .with_context(|| format!("{level:?} is no log level"))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };

    use proptest::prelude::*;

    use super::*;

    /// What the log wrote.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// The log's text of one event with foreign text in its message, its fields and its span.
    fn logged(text: &str) -> String {
        let written = Written::default();
        let writer = written.clone();
        let lines = fmt::layer()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .fmt_fields(escaped_fields());
        let subscriber = tracing_subscriber::registry().with(lines);
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("call", peer = text);
            let _entered = span.enter();
            tracing::info!(name = %text, debug = ?text, plain = text, "refused {text}");
        });
        let bytes = written.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_name_cannot_write_a_line_of_its_own() {
        let forged = "nse\n2026-01-01T00:00:00Z ERROR forged\u{1b}[2J";
        let text = logged(forged);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.contains("nse\\n2026") && text.contains("\\u{1b}[2J"),
            "{text}"
        );
    }

    proptest! {
        #[test]
        fn an_event_is_one_line_without_control_characters(text: String) {
            let logged = logged(&text);
            let line = logged.strip_suffix('\n').unwrap();
            prop_assert!(!line.chars().any(char::is_control), "{line:?}");
        }
    }

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
