//! `proxy-nsmgr connect`: an NSM v1 client for people.
//!
//! It asks once, and what is refused then ends it: a person waits. From the first answer on it
//! keeps the connection: refreshed before the first token on the path expires, asked for again when
//! it is lost, as [`nsm_core::nsm::heal`] decides. An endpoint that is gone is closed first; a path that is
//! lost is not, for its tunnel stands until the new one does; and where an agent on the way is gone
//! the same is asked for, while its packets go on. A connection that was granted although its path
//! is down is asked for again and again until there is another, or the path is back. Whatever ends
//! it, it closes what it has; what is killed is found again by the next one for the same interface
//! ([`identity`]).

use std::{
    convert::Infallible,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use nsm_core::{
    clock::Monotonic,
    nsm::{
        expiry::refresh_after,
        heal::{Failure, Healer, Loss, SHORTEST_WAIT, Step},
    },
};
use tokio::time::Instant;
use tonic::Code;

use crate::{
    cli::ConnectArgs,
    netns::Netns,
    tool::{Agent, CallError, Stop, goodbye},
};

mod identity;
mod report;
mod session;
mod watch;

use self::{
    identity::Identity,
    report::Reporter,
    session::{Answer, Session, Wanted},
    watch::{News, Watch},
};

/// Why the client does not go on.
enum Ended {
    /// Somebody pressed Ctrl-C, closed the terminal or sent SIGTERM.
    Asked,
    /// The first Request was refused, or standard output is closed.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Ended {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// Connects, stays connected, and closes on Ctrl-C, SIGTERM or SIGHUP.
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
    healer: Healer,
    /// What the healer's time is counted from.
    began: Instant,
}

impl Client {
    /// Looks at what can be looked at before anything is asked, and connects to the agent.
    async fn prepare(args: &ConnectArgs, reporter: Reporter) -> anyhow::Result<Self> {
        let stop = Stop::new()?;
        let netns = Netns::open(&args.netns)?;
        let identity = Identity::of(args.name.as_deref(), &netns, &args.interface);
        let agent = Agent::connect(&args.client, &identity.name).await?;
        let service = args.service.to_string();
        reporter.asking(&service, &agent.url, netns.path(), &args.interface)?;
        let wanted = Wanted {
            service,
            labels: args.labels(),
            interface: args.interface.clone(),
            netns,
        };
        Ok(Self {
            session: Session::begin(agent, identity, wanted),
            stop,
            reporter,
            healer: Healer::default(),
            began: Instant::now(),
        })
    }

    /// Asks once, then holds the connection until the end.
    async fn connect_and_keep(&mut self, service: &str) -> Result<Infallible, Ended> {
        let asked = unless_stopped(&mut self.stop, self.session.request()).await?;
        let mut answer = asked.with_context(|| format!("no connection to {service}"))?;
        self.reporter.connected(&answer)?;
        let mut since = Instant::now();
        let mut watch = Watch::start(&self.session);
        let mut again_at = self.again_at(&answer);
        loop {
            let wait = refresh_after(SystemTime::now(), answer.expires);
            let loss = tokio::select! {
                () = self.stop.wait() => return Err(Ended::Asked),
                () = tokio::time::sleep(wait) => self.refresh(&mut answer, &mut watch).await?,
                () = until(again_at) => Some(Loss::Path),
                news = watch.next() => match news {
                    News::RefreshRequested => self.refresh(&mut answer, &mut watch).await?,
                    News::PathUp => {
                        again_at = None;
                        None
                    }
                    News::Lost(loss, reason) => {
                        self.reporter.down(&reason)?;
                        Some(loss)
                    }
                },
            };
            if let Some(loss) = loss {
                answer = self.recover(loss, since.elapsed(), &mut watch).await?;
                since = Instant::now();
                watch = Watch::start(&self.session);
                again_at = self.again_at(&answer);
            }
        }
    }

    /// When to look for a better path, where there was none.
    fn again_at(&mut self, answer: &Answer) -> Option<Instant> {
        answer.view.path_down.as_ref()?;
        let wait = self
            .healer
            .handle_bad_grant(since(self.began), rand::random());
        Some(Instant::now() + wait)
    }

    /// A refresh; what is lost where it failed.
    async fn refresh(
        &mut self,
        answer: &mut Answer,
        watch: &mut Watch,
    ) -> Result<Option<Loss>, Ended> {
        match unless_stopped(&mut self.stop, self.session.request()).await? {
            Ok(again) => {
                *answer = again;
                self.reporter.refreshed(answer)?;
                Ok(None)
            }
            Err(error) => {
                self.reporter.error(&error.to_string())?;
                let failure = failure(&error);
                if !matches!(failure, Failure::Unavailable | Failure::Unknown) {
                    return Ok(Some(failure.loss()));
                }
                // The monitor has the cause, perhaps a moment later: the endpoint is gone, or an agent on the way.
                let next = tokio::time::timeout(SHORTEST_WAIT, watch.next_loss());
                match unless_stopped(&mut self.stop, next).await? {
                    Ok((loss, reason)) => {
                        self.reporter.down(&reason)?;
                        Ok(Some(loss))
                    }
                    Err(_) => Ok(Some(failure.loss())),
                }
            }
        }
    }

    /// Asks until there is a connection again, in place of one that lived for so long. As long as it is the same that is asked for,
    /// news of it count; after that the news are about what is being replaced.
    async fn recover(
        &mut self,
        loss: Loss,
        lived: Duration,
        watch: &mut Watch,
    ) -> Result<Answer, Ended> {
        let now = since(self.began);
        let (mut step, mut wait) = self.healer.handle_loss(loss, lived, now, rand::random());
        loop {
            match self.try_again(step, wait, watch).await? {
                Tried::Asked(answered) => match *answered {
                    Ok(answer) => {
                        self.reporter.connected(&answer)?;
                        return Ok(answer);
                    }
                    Err(error) => {
                        self.reporter.error(&error.to_string())?;
                        let (failure, now) = (failure(&error), since(self.began));
                        (step, wait) = self.healer.handle_failure(failure, now, rand::random());
                    }
                },
                Tried::Overtaken(other) => (step, wait) = (other, Duration::ZERO),
            }
        }
    }

    /// Asks once, after a wait, unless more is lost meanwhile.
    async fn try_again(
        &mut self,
        step: Step,
        wait: Duration,
        watch: &mut Watch,
    ) -> Result<Tried, Ended> {
        let again = async {
            tokio::time::sleep(wait).await;
            match step {
                Step::Same => self.session.same_again().await,
                Step::Reselect { closes } => self.session.reselect(closes).await,
            }
        };
        tokio::pin!(again);
        loop {
            let (loss, reason) = tokio::select! {
                () = self.stop.wait() => return Err(Ended::Asked),
                answered = &mut again => return Ok(Tried::Asked(Box::new(answered))),
                more = watch.next_loss(), if step == Step::Same => more,
            };
            if let Some(other) = self.healer.handle_news(loss, since(self.began)) {
                self.reporter.down(&reason)?;
                return Ok(Tried::Overtaken(other));
            }
        }
    }
}

/// What came of a try to mend a connection.
enum Tried {
    /// It was asked for.
    Asked(Box<Result<Answer, CallError>>),
    /// Something else is to be asked for at once.
    Overtaken(Step),
}

/// The healer's clock.
fn since(began: Instant) -> Monotonic {
    Monotonic::default() + began.elapsed()
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn unless_stopped<T>(stop: &mut Stop, work: impl Future<Output = T>) -> Result<T, Ended> {
    tokio::select! {
        done = work => Ok(done),
        () = stop.wait() => Err(Ended::Asked),
    }
}

fn failure(error: &CallError) -> Failure {
    match error {
        CallError::Unreachable { .. } => Failure::Agent,
        CallError::Silent { .. } => Failure::Silence,
        CallError::Refused { code, .. } => match code {
            Code::Unavailable => Failure::Unavailable,
            Code::DeadlineExceeded => Failure::Silence,
            Code::NotFound => Failure::Unknown,
            _ => Failure::Refused,
        },
        CallError::BadAnswer { .. } => Failure::Refused,
    }
}
