//! `proxy-nsmgr connect`: an NSM v1 client for people.
//!
//! It asks once, and what is refused then ends it: a person waits. From the first answer on it
//! keeps the connection: refreshed before the first token on the path expires, asked for again when
//! the agent is gone (the same endpoint: its traffic may well flow) or when the path is told to be
//! down (another endpoint: Close, then a Request with the state RESELECT_REQUESTED). Tries that
//! fail are spaced by [`Backoff`]. Whatever ends it, it closes what it has.

use std::{
    convert::Infallible,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use nsm_core::{backoff::Backoff, expiry::refresh_after};
use tokio::time::Instant;

use crate::{
    cli::{ConnectArgs, label_map},
    netns::Netns,
    tool::{Agent, CallError, Stop, goodbye, random_name},
};

mod report;
mod session;
mod watch;

use self::{
    report::Reporter,
    session::{Answer, Session, Wanted},
    watch::{News, Watch},
};

/// The shortest wait before another try: an agent that restarts is back within it.
const SHORTEST_WAIT: Duration = Duration::from_millis(200);

/// The longest: a person who mends something wants to see it work.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// A connection that lived so long is one: its loss is tried to be mended at once. One that comes
/// and goes faster is asked for with growing waits, so that two that disagree do not spin.
const STABLE: Duration = Duration::from_secs(10);

/// How a connection that is lost is asked for again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recovery {
    /// The same endpoint, the same path: only the agent between was gone.
    Same,
    /// Whatever endpoint there is.
    Reselect,
}

/// Why the client does not go on.
enum Ended {
    /// Somebody pressed Ctrl-C or sent SIGTERM.
    Asked,
    /// The first Request was refused, or standard output is closed.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Ended {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// Connects, stays connected, and closes on Ctrl-C or SIGTERM.
///
/// # Errors
///
/// The namespace is none, the agent does not run, or the first Request is refused.
pub(crate) async fn run(args: &ConnectArgs) -> anyhow::Result<()> {
    let reporter = Reporter::new(args.client.json);
    let mut client = match Client::prepare(args, reporter).await {
        Ok(client) => client,
        Err(error) => {
            reporter.failed(&error);
            return Err(error);
        }
    };
    let Err(ended) = client.connect_and_keep(&args.service.to_string()).await;
    if let Ended::Failed(error) = &ended {
        reporter.failed(error);
    }
    if client.session.is_open() {
        goodbye(&mut client.stop, async {
            let closed = client.session.close().await;
            // Nothing can be done about an output that is closed, and we are leaving.
            let _ = reporter.closed(closed.err().map(|error| error.to_string()));
        })
        .await;
    }
    match ended {
        Ended::Asked => Ok(()),
        Ended::Failed(error) => Err(error),
    }
}

struct Client {
    session: Session,
    stop: Stop,
    reporter: Reporter,
    backoff: Backoff,
}

impl Client {
    /// Looks at what can be looked at before anything is asked, and connects to the agent.
    async fn prepare(args: &ConnectArgs, reporter: Reporter) -> anyhow::Result<Self> {
        let stop = Stop::new()?;
        let netns = Netns::open(&args.netns)?;
        let name = args.name.clone().unwrap_or_else(|| random_name("nsc"));
        let agent = Agent::connect(&args.client, &name).await?;
        let service = args.service.to_string();
        reporter.asking(&service, &agent.url, netns.path(), &args.interface)?;
        let wanted = Wanted {
            service,
            labels: label_map(&args.labels),
            interface: args.interface.clone(),
            netns,
        };
        Ok(Self {
            session: Session::begin(agent, name, wanted),
            stop,
            reporter,
            backoff: Backoff::new(SHORTEST_WAIT, LONGEST_WAIT),
        })
    }

    /// Asks once, then holds the connection until the end.
    async fn connect_and_keep(&mut self, service: &str) -> Result<Infallible, Ended> {
        let asked = unless_stopped(&mut self.stop, self.session.request()).await?;
        let mut answer = asked.with_context(|| format!("no connection to {service}"))?;
        self.reporter.connected(&answer)?;
        let mut since = Instant::now();
        let mut watch = Watch::start(&self.session);
        loop {
            let wait = refresh_after(SystemTime::now(), answer.expires);
            let recovery = tokio::select! {
                () = self.stop.wait() => return Err(Ended::Asked),
                () = tokio::time::sleep(wait) => self.refresh(&mut answer).await?,
                news = watch.next() => match news {
                    News::RefreshRequested => self.refresh(&mut answer).await?,
                    News::Lost(reason) => {
                        self.reporter.down(&reason)?;
                        Some(Recovery::Same)
                    }
                    News::Down(reason) => {
                        self.reporter.down(&reason)?;
                        Some(Recovery::Reselect)
                    }
                },
            };
            if let Some(recovery) = recovery {
                // Its news from here on are about what is being replaced.
                drop(watch);
                answer = self.recover(recovery, since.elapsed() >= STABLE).await?;
                since = Instant::now();
                watch = Watch::start(&self.session);
            }
        }
    }

    /// A refresh; what to do where it failed.
    async fn refresh(&mut self, answer: &mut Answer) -> Result<Option<Recovery>, Ended> {
        match unless_stopped(&mut self.stop, self.session.request()).await? {
            Ok(again) => {
                *answer = again;
                self.reporter.refreshed(answer)?;
                Ok(None)
            }
            Err(error) => {
                self.reporter.error(&error.to_string())?;
                Ok(Some(recovery_after(&error)))
            }
        }
    }

    /// Asks until there is a connection again. `stable`: the lost one lived long enough for the
    /// first try to be made at once.
    async fn recover(&mut self, mut recovery: Recovery, stable: bool) -> Result<Answer, Ended> {
        let mut wait = Duration::ZERO;
        if stable {
            self.backoff.reset();
        } else {
            wait = self.backoff.next(rand::random());
        }
        loop {
            unless_stopped(&mut self.stop, tokio::time::sleep(wait)).await?;
            let again = self.session.again(recovery == Recovery::Reselect);
            match unless_stopped(&mut self.stop, again).await? {
                Ok(answer) => {
                    self.reporter.connected(&answer)?;
                    return Ok(answer);
                }
                Err(error) => {
                    self.reporter.error(&error.to_string())?;
                    if recovery_after(&error) == Recovery::Reselect {
                        recovery = Recovery::Reselect;
                    }
                    wait = self.backoff.next(rand::random());
                }
            }
        }
    }
}

async fn unless_stopped<T>(stop: &mut Stop, work: impl Future<Output = T>) -> Result<T, Ended> {
    tokio::select! {
        done = work => Ok(done),
        () = stop.wait() => Err(Ended::Asked),
    }
}

/// A refusal is about the endpoint or what was agreed; silence and absence are about the agent.
fn recovery_after(error: &CallError) -> Recovery {
    match error {
        CallError::Refused { .. } | CallError::BadAnswer { .. } => Recovery::Reselect,
        CallError::Unreachable { .. } | CallError::Silent { .. } => Recovery::Same,
    }
}
