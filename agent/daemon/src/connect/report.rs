//! The client's output: lines of text for people, lines of JSON for programs.

use std::{path::Path, time::SystemTime};

use nsm_core::net::{IfName, PeerUrl};
use serde::Serialize;

use super::session::Answer;
use crate::{
    tool::{print_line, shown},
    view::{Dns, View, addresses},
};

/// Tells what happens, on standard output.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reporter {
    json: bool,
}

/// One line of `--json`.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event<'a> {
    Connected {
        connection: &'a View,
        setup_ms: f64,
        dns: Option<&'a Dns>,
    },
    Refreshed {
        connection: &'a View,
        expires_in_seconds: u64,
    },
    Down {
        reason: &'a str,
    },
    Closed {
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

    /// What is about to be asked.
    pub(crate) fn asking(
        self,
        service: &str,
        agent: &PeerUrl,
        netns: &Path,
        interface: &IfName,
    ) -> anyhow::Result<()> {
        if self.json {
            return Ok(());
        }
        let netns = netns.display();
        print_line(&format!(
            "asking     {agent} for {service}, as {interface} in {netns}"
        ))
    }

    /// There is a connection.
    pub(crate) fn connected(self, answer: &Answer) -> anyhow::Result<()> {
        self.print(
            || connected_words(answer),
            &Event::Connected {
                connection: &answer.view,
                setup_ms: milliseconds(answer),
                dns: answer.facts.dns.as_ref(),
            },
        )
    }

    /// The connection lives on.
    pub(crate) fn refreshed(self, answer: &Answer) -> anyhow::Result<()> {
        let seconds = seconds_left(answer.expires);
        self.print(
            || format!("refreshed  for {seconds} s"),
            &Event::Refreshed {
                connection: &answer.view,
                expires_in_seconds: seconds,
            },
        )
    }

    /// The connection is lost.
    pub(crate) fn down(self, reason: &str) -> anyhow::Result<()> {
        let words = || format!("down       {}", shown(reason));
        self.print(words, &Event::Down { reason })
    }

    /// A try that failed; another follows.
    pub(crate) fn error(self, message: &str) -> anyhow::Result<()> {
        self.print(
            || format!("failed     {}", shown(message)),
            &Event::Error { message },
        )
    }

    /// What ends the program. People read it on standard error.
    pub(crate) fn failed(self, error: &anyhow::Error) {
        if self.json {
            let message = &format!("{error:#}");
            // Standard error has it in any case.
            let _ = self.print(String::new, &Event::Error { message });
        }
    }

    /// The connection is closed, or left to expire where that failed.
    pub(crate) fn closed(self, error: Option<String>) -> anyhow::Result<()> {
        let error = error.as_deref();
        self.print(
            || match error {
                None => "closed".to_owned(),
                Some(error) => format!("closed     not by the agent: {}", shown(error)),
            },
            &Event::Closed { error },
        )
    }

    fn print(self, words: impl FnOnce() -> String, event: &Event<'_>) -> anyhow::Result<()> {
        if self.json {
            print_line(&serde_json::to_string(event)?)
        } else {
            print_line(&words())
        }
    }
}

fn connected_words(answer: &Answer) -> String {
    let view = &answer.view;
    let mut lines = Vec::new();
    let mut line =
        |label: &str, words: String| lines.push(format!("{label:<10} {}", shown(&words)));
    if let Some(domain) = &answer.facts.domain {
        line("domain", domain.clone());
    }
    if let Some(dns) = &answer.facts.dns {
        line("dns", format!("{} → {}", dns.question, dns.answer));
    }
    line("endpoint", view.endpoint.clone());
    line("path", view.path.join(" → "));
    line("mechanism", view.mechanism_words());
    line(
        "addresses",
        format!(
            "{} on {}, the endpoint has {}",
            addresses(&view.src_addresses),
            view.interface
                .as_deref()
                .unwrap_or("an interface without a name"),
            addresses(&view.dst_addresses)
        ),
    );
    if let Some(reason) = &view.path_down {
        line("path down", reason.clone());
    }
    line(
        "connected",
        format!(
            "in {:.3} ms, as {}; Ctrl-C closes",
            milliseconds(answer),
            view.id
        ),
    );
    lines.join("\n")
}

/// To the microsecond: the clock is not finer.
fn milliseconds(answer: &Answer) -> f64 {
    (answer.took.as_secs_f64() * 1e6).round() / 1e3
}

fn seconds_left(expires: SystemTime) -> u64 {
    let left = expires.duration_since(SystemTime::now());
    left.unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::view::tests::{connection, facts};

    fn answer() -> Answer {
        Answer {
            view: View::of(&connection(), &facts()),
            facts: facts(),
            expires: SystemTime::UNIX_EPOCH,
            took: Duration::from_nanos(2_617_592),
        }
    }

    #[test]
    fn a_connection_is_told_in_words() {
        assert_eq!(
            connected_words(&answer()),
            "\
domain     cluster-2.example
dns        SRV registry.nsm-system.cluster-2.example → 203.0.113.2:5005
endpoint   nse@cluster-2.example
path       nsc → agent-1 → agent-2 → nse
mechanism  VXLAN, VNI 4242, MTU 1450
addresses  172.16.1.1/32 on nsm-1, the endpoint has 172.16.1.0/32
connected  in 2.618 ms, as nsc-id; Ctrl-C closes"
        );
    }

    /// Names on the path are those of other domains.
    #[test]
    fn what_others_call_themselves_is_one_line() {
        let mut answer = answer();
        answer.view.path = vec!["nsc".to_owned(), "\u{1b}[2J\nconnected  in 1 ms".to_owned()];
        answer.view.path_down = Some("a\nb".to_owned());
        let words = connected_words(&answer);
        let said = "path       nsc → \\u{1b}[2J\\nconnected  in 1 ms\n";
        assert!(words.contains(said) && words.contains("a\\nb"), "{words}");
    }

    #[test]
    fn a_connection_is_told_in_json() {
        let answer = answer();
        let event = Event::Connected {
            connection: &answer.view,
            setup_ms: milliseconds(&answer),
            dns: answer.facts.dns.as_ref(),
        };
        let expected = serde_json::json!({
            "event": "connected",
            "connection": {
                "id": "nsc-id",
                "network_service": "icmp-responder@cluster-2.example",
                "endpoint": "nse@cluster-2.example",
                "mechanism": "VXLAN",
                "vni": 4242,
                "mtu": 1450,
                "path": ["nsc", "agent-1", "agent-2", "nse"],
                "src_addresses": ["172.16.1.1/32"],
                "dst_addresses": ["172.16.1.0/32"],
                "interface": "nsm-1",
            },
            "setup_ms": 2.618,
            "dns": {
                "question": "SRV registry.nsm-system.cluster-2.example",
                "answer": "203.0.113.2:5005",
            },
        });
        assert_eq!(serde_json::to_value(&event).unwrap(), expected);
    }

    #[test]
    fn the_other_events_are_told_in_json() {
        let text = |event: Event<'_>| serde_json::to_string(&event).unwrap();
        assert_eq!(
            text(Event::Down { reason: "x" }),
            r#"{"event":"down","reason":"x"}"#
        );
        assert_eq!(
            text(Event::Closed { error: None }),
            r#"{"event":"closed","error":null}"#
        );
        assert_eq!(
            text(Event::Error { message: "x" }),
            r#"{"event":"error","message":"x"}"#
        );
    }
}
