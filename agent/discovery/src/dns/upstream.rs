//! The DNS servers: one question to all of them, one answer back.
//!
//! Servers are asked in their order: the next one as soon as one fails, or when one stays silent
//! for its share of the time; the first usable answer wins. After UDP to each comes TCP to each,
//! for a network that lets only TCP pass. An alias whose end did not come along is asked for again.

use std::{collections::VecDeque, net::SocketAddr, time::Duration};

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use hickory_resolver::{PoolContext, proto::rr::Record};
use tokio::time::{Instant, timeout_at};

use super::{
    answer::{Answer, MAX_ALIASES, Question},
    attempt::{Attempt, Cause, Transport, context},
    error::ResolveError,
};

/// Servers that are asked: more would share the time until none has enough.
const MAX_SERVERS: usize = 8;

/// The servers, in the order in which they are asked.
pub(super) struct Upstream {
    attempts: Vec<Attempt>,
    /// How long the next attempt waits for a silent one.
    stagger: Duration,
    /// Why there are no servers, when there are none.
    none: String,
    timeout: Duration,
    context: PoolContext,
}

/// A usable answer.
pub(super) enum Reply {
    Records(Records),
    Nothing(Nothing),
}

/// Records that answer the question.
pub(super) struct Records {
    /// Of the type asked for, aliases followed.
    pub(super) answers: Vec<Record>,
    pub(super) additionals: Vec<Record>,
    /// The smallest of the answers and the aliases that led to them.
    pub(super) ttl: Duration,
    pub(super) server: SocketAddr,
}

/// The answer that there are no such records.
#[derive(Clone, Copy)]
pub(super) struct Nothing {
    /// False for NXDOMAIN: the name has no records of any type.
    pub(super) exists: bool,
    /// How long this holds, where the zone has a time for it (RFC 2308 section 5).
    pub(super) ttl: Option<Duration>,
    pub(super) server: SocketAddr,
}

/// No server gave a usable answer: each attempt and what came of it.
pub(super) struct Unanswered(Vec<(Attempt, Cause)>);

impl Upstream {
    /// These servers; `none` says why there are none, where there are none.
    pub(super) fn new(servers: &[SocketAddr], none: String, timeout: Duration) -> Self {
        let attempts: Vec<_> = [Transport::Udp, Transport::Tcp]
            .into_iter()
            .flat_map(|transport| {
                let servers = servers.iter().take(MAX_SERVERS);
                servers.map(move |server| Attempt {
                    server: *server,
                    transport,
                })
            })
            .collect();
        let shares = u32::try_from(attempts.len()).unwrap_or(u32::MAX).max(1);
        Self {
            attempts,
            stagger: timeout / shares,
            none,
            timeout,
            context: context(timeout),
        }
    }

    /// The servers, in the order in which they are asked.
    #[cfg(test)]
    pub(super) fn servers(&self) -> Vec<SocketAddr> {
        let by_udp = self
            .attempts
            .iter()
            .filter(|it| it.transport == Transport::Udp);
        by_udp.map(|attempt| attempt.server).collect()
    }

    /// Asks until one server answers, none is left, or the deadline has come.
    pub(super) async fn ask(
        &self,
        question: &Question,
        deadline: Instant,
    ) -> Result<Reply, Unanswered> {
        let mut aliased = Duration::MAX;
        let mut name = question.name.clone();
        for _ in 0..MAX_ALIASES {
            let kind = question.kind;
            let question = Question { name, kind };
            let (server, answer) = self.exchange(&question, deadline).await?;
            aliased = aliased.min(answer.ttl);
            if !answer.records.is_empty() {
                return Ok(Reply::Records(Records {
                    answers: answer.records,
                    additionals: answer.additionals,
                    ttl: aliased,
                    server,
                }));
            }
            // A server that does not recurse leaves the end of the chain to us.
            if answer.canonical == question.name || !answer.exists {
                return Ok(Reply::Nothing(Nothing {
                    exists: answer.exists,
                    ttl: answer.negative_ttl,
                    server,
                }));
            }
            name = answer.canonical;
        }
        Err(Unanswered(
            self.attempts
                .first()
                .map(|attempt| (*attempt, Cause::Bad("too many aliases".to_owned())))
                .into_iter()
                .collect(),
        ))
    }

    async fn exchange(
        &self,
        question: &Question,
        deadline: Instant,
    ) -> Result<(SocketAddr, Answer), Unanswered> {
        let mut waiting: VecDeque<Attempt> = self.attempts.iter().copied().collect();
        let mut running = FuturesUnordered::new();
        let mut silent: Vec<Attempt> = Vec::new();
        let mut tried = Vec::new();
        loop {
            if let Some(attempt) = waiting.pop_front() {
                silent.push(attempt);
                running.push(async move { (attempt, attempt.ask(&self.context, question).await) });
            }
            let turn = if waiting.is_empty() {
                deadline
            } else {
                deadline.min(Instant::now() + self.stagger)
            };
            match timeout_at(turn, running.next()).await {
                Ok(Some((attempt, Ok(answer)))) => return Ok((attempt.server, answer)),
                Ok(Some((attempt, Err(cause)))) => {
                    // Who answers with an error by UDP has no other answer by TCP.
                    if matches!(cause, Cause::Code(_)) {
                        waiting.retain(|other| other.server != attempt.server);
                    }
                    silent.retain(|other| *other != attempt);
                    tried.push((attempt, cause));
                }
                Ok(None) if waiting.is_empty() => return Err(Unanswered(tried)),
                Err(_) if Instant::now() >= deadline => {
                    tried.extend(silent.iter().map(|attempt| (*attempt, Cause::Silent)));
                    return Err(Unanswered(tried));
                }
                // The turn of the next attempt has come.
                Ok(None) | Err(_) => {}
            }
        }
    }

    /// Says why `domain` cannot be resolved: the most telling cause names the error, the text holds
    /// them all.
    pub(super) fn explain(
        &self,
        domain: &str,
        question: &Question,
        Unanswered(tried): &Unanswered,
    ) -> ResolveError {
        let domain = domain.to_owned();
        if self.attempts.is_empty() {
            return ResolveError::NoServers {
                domain,
                reason: self.none.clone(),
            };
        }
        let question = question.to_string();
        let any = |telling: fn(&Cause) -> bool| tried.iter().any(|(_, cause)| telling(cause));
        let text: Vec<_> = tried
            .iter()
            .map(|(attempt, cause)| format!("{attempt}: {cause}"))
            .collect();
        let tried = text.join("; ");
        if any(|cause| matches!(cause, Cause::Code(_))) {
            ResolveError::ServerFailed {
                domain,
                question,
                tried,
            }
        } else if any(|cause| matches!(cause, Cause::Bad(_))) {
            ResolveError::BadAnswer {
                domain,
                question,
                tried,
            }
        } else if any(|cause| matches!(cause, Cause::Silent)) {
            ResolveError::Timeout {
                domain,
                question,
                tried,
                waited: self.timeout,
            }
        } else {
            ResolveError::Unreachable {
                domain,
                question,
                tried,
            }
        }
    }
}
