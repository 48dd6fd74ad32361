//! The endpoint's output: lines of text for people, lines of JSON for programs.

use std::time::SystemTime;

use nsm_proto::{connection::Connection, registry::NetworkServiceEndpoint};
use serde::Serialize;

use crate::{
    tool::{print_line, shown},
    view::{View, addresses},
};

/// Prints what happens. A closed standard output stops nothing: the clients
/// of the endpoint are others.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reporter {
    json: bool,
}

/// A registration that is not the first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Again {
    /// Whether the registry had lost the endpoint, or could not be asked, between.
    pub(crate) was_lost: bool,
}

/// Why a connection was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reason {
    /// The other side closed it.
    Asked,
    /// The other side did not refresh it.
    Expired,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Registered {
        endpoint: &'a str,
        services: &'a [String],
        url: &'a str,
        expires_in_seconds: u64,
        again: bool,
    },
    Connected {
        connection: &'a View,
    },
    Closed {
        id: &'a str,
        reason: Reason,
    },
    Unregistered {
        error: Option<&'a str>,
    },
    Error {
        message: &'a str,
    },
}

impl Reporter {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// The registry has the endpoint. For people it is printed where it is new.
    pub(crate) fn registered(
        self,
        entry: &NetworkServiceEndpoint,
        expires: SystemTime,
        again: Option<Again>,
    ) {
        let left = expires.duration_since(SystemTime::now());
        let seconds = left.unwrap_or_default().as_secs();
        if again.is_some_and(|again| !again.was_lost) && !self.json {
            return;
        }
        self.print(
            || {
                format!(
                    "registered   {} for {} at {}; Ctrl-C unregisters",
                    entry.name,
                    entry.network_service_names.join(", "),
                    entry.url
                )
            },
            &Event::Registered {
                endpoint: &entry.name,
                services: &entry.network_service_names,
                url: &entry.url,
                expires_in_seconds: seconds,
                again: again.is_some(),
            },
        );
    }

    /// A connection was granted.
    pub(crate) fn connected(self, view: &View) {
        self.print(
            || connected_words(view),
            &Event::Connected { connection: view },
        );
    }

    /// A connection is closed.
    pub(crate) fn closed(self, connection: &Connection, reason: Reason) {
        let id = sender(connection);
        self.print(
            || match reason {
                Reason::Asked => format!("closed       {id}"),
                Reason::Expired => format!("closed       {id}: it was not refreshed in time"),
            },
            &Event::Closed { id, reason },
        );
    }

    /// The registry does not have the endpoint any more, or will not when it expires.
    pub(crate) fn unregistered(self, error: Option<&str>) {
        self.print(
            || match error {
                None => "unregistered".to_owned(),
                Some(error) => format!("unregistered not by the registry: {}", shown(error)),
            },
            &Event::Unregistered { error },
        );
    }

    /// Something failed and is tried again.
    pub(crate) fn error(self, message: &str) {
        self.print(
            || format!("failed       {}", shown(message)),
            &Event::Error { message },
        );
    }

    /// What ends the program. People read it on standard error.
    pub(crate) fn failed(self, message: &str) {
        if self.json {
            self.print(String::new, &Event::Error { message });
        }
    }

    fn print(self, words: impl FnOnce() -> String, event: &Event<'_>) {
        let line = if self.json {
            serde_json::to_string(event).unwrap_or_default()
        } else {
            shown(&words())
        };
        let _ = print_line(&line);
    }
}

fn connected_words(view: &View) -> String {
    format!(
        "connected    {} with {} for {}, here {} on {} (path {})",
        view.id,
        addresses(&view.src_addresses),
        view.network_service,
        addresses(&view.dst_addresses),
        view.interface
            .as_deref()
            .unwrap_or("an interface without a name"),
        view.path.join(" → "),
    )
}

/// The caller's id of the connection, as in `connected`.
fn sender(connection: &Connection) -> &str {
    let segments = connection.path.iter().flat_map(|path| {
        let at = (path.index as usize).checked_sub(1);
        at.and_then(|at| path.path_segments.get(at))
    });
    segments
        .map(|segment| segment.id.as_str())
        .next()
        .unwrap_or(&connection.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{Facts, tests::connection};

    #[test]
    fn a_connection_is_told_in_words() {
        let view = View::of(&connection(), &Facts::default());
        assert_eq!(
            connected_words(&view),
            "connected    nsc-id with 172.16.1.1/32 for icmp-responder@cluster-2.example, here 172.16.1.0/32 \
             on nsm-1 (path nsc → agent-1 → agent-2 → nse)"
        );
    }

    #[test]
    fn a_close_names_the_id_that_the_connect_named() {
        let mut view = connection();
        view.id = "nse-id".to_owned();
        view.path.as_mut().unwrap().index = 3;
        assert_eq!(sender(&view), "agent-2-id");
        assert_eq!(sender(&Connection { path: None, ..view }), "nse-id");
    }

    #[test]
    fn events_are_told_in_json() {
        let text = |event: Event<'_>| serde_json::to_string(&event).unwrap();
        assert_eq!(
            text(Event::Closed {
                id: "a",
                reason: Reason::Expired
            }),
            r#"{"event":"closed","id":"a","reason":"expired"}"#
        );
        assert_eq!(
            text(Event::Registered {
                endpoint: "nse",
                services: &["a".to_owned()],
                url: "unix:///x",
                expires_in_seconds: 60,
                again: false,
            }),
            r#"{"event":"registered","endpoint":"nse","services":["a"],"url":"unix:///x","expires_in_seconds":60,"again":false}"#
        );
    }
}
