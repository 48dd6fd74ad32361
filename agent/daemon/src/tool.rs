//! What the tools for people share: who they are, how they speak to the agent, what they print.

use std::{
    future::Future,
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use nsm_controlplane::{
    identity::token::{Token, TokenSource},
    transport::{
        dial::{DialError, Link, dial_with},
        tls::{Tls, alert},
        unix::{Descriptors, Passed},
    },
};
use nsm_core::{net::PeerUrl, text::printable};
use nsm_proto::connection::PathSegment;
use prost_types::Timestamp;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tonic::{Code, Request, Response, Status, transport::Channel};

use crate::{
    cli::{ClientArgs, IdentityArgs},
    identity,
};

/// How long closing may take: the person who pressed Ctrl-C waits for it.
pub(crate) const GOODBYE: Duration = Duration::from_secs(5);

/// How long a connection to the agent may take; it is on this node.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The agent, as a tool speaks to it.
#[derive(Debug)]
pub(crate) struct Agent {
    /// Where it is.
    pub(crate) url: PeerUrl,
    /// The connection to it, which comes back by itself after a break.
    pub(crate) channel: Channel,
    /// What both have shown each other on it; none in plain text.
    link: Link,
    /// What this tool serves with, too; none in plain text.
    pub(crate) tls: Option<Arc<Tls>>,
    /// What follows the source of the identity.
    _following: JoinSet<()>,
    /// What travels beside the calls to it.
    descriptors: Arc<Descriptors>,
    /// The tool's identity.
    pub(crate) tokens: TokenSource,
    /// The longest time for one call.
    timeout: Duration,
}

/// Why a call brought nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The agent, or a hop behind it, refused.
    #[error("{url} refused ({code:?}): {message}")]
    Refused {
        /// Who was asked.
        url: PeerUrl,
        /// The kind of refusal.
        code: Code,
        /// The reason.
        message: String,
    },
    /// The agent cannot be reached.
    #[error("{url} is not reachable: {message}")]
    Unreachable {
        /// Who was asked.
        url: PeerUrl,
        /// What is known of the reason.
        message: String,
    },
    /// The agent took the call and did not answer.
    #[error("{url} gave no answer within {timeout:?}")]
    Silent {
        /// Who was asked.
        url: PeerUrl,
        /// How long was waited.
        timeout: Duration,
    },
    /// The answer is no answer to what was asked.
    #[error("{url} answered with what cannot be: {reason}")]
    BadAnswer {
        /// Who was asked.
        url: PeerUrl,
        /// What is wrong with it.
        reason: String,
    },
}

impl Agent {
    /// Connects to the agent as `name`.
    ///
    /// # Errors
    ///
    /// The agent cannot be connected to.
    pub(crate) async fn connect(args: &ClientArgs, name: &str) -> anyhow::Result<Self> {
        let url = args.connect_to.clone();
        let descriptors = Arc::default();
        let timeout = args.timeout.min(DIAL_TIMEOUT);
        let mut following = JoinSet::new();
        let tls = open_identity(&args.identity, args.timeout, &mut following).await?;
        let dialed = dial_with(&url, &descriptors, tls.as_ref(), timeout).await;
        let link = dialed.map_err(|error: DialError| {
            anyhow::Error::new(error).context(
                "is the agent running, and is this its listen.nsmgr? (--connect-to, NSM_CONNECT_TO)",
            )
        })?;
        let spiffe_id = format!("spiffe://local/{name}");
        let secret = args.token_secret.as_bytes();
        Ok(Self {
            url,
            channel: link.channel.clone(),
            link,
            tls,
            _following: following,
            descriptors,
            tokens: TokenSource::hs256(&spiffe_id, secret, args.max_token_lifetime),
            timeout: args.timeout,
        })
    }

    /// Whether the agent needs descriptors of what we name: it believes paths of root of the node only.
    pub(crate) fn wants_descriptor(&self) -> bool {
        self.url.socket_path().is_some() && !is_root_of_the_node()
    }

    /// Passes a descriptor with the next call.
    pub(crate) fn pass(&self, descriptor: OwnedFd) {
        self.descriptors.send(Passed::new(descriptor));
    }

    /// A call with our token and the deadline in its metadata.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = self.stream_request(message);
        request.set_timeout(self.timeout);
        request
    }

    /// The same for a stream, which ends when it ends.
    pub(crate) fn stream_request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let session = self.link.session();
        self.tokens
            .apply_for(session.as_deref(), request.metadata_mut());
        request
    }

    /// Waits for the answer of a call, no longer than its deadline.
    ///
    /// # Errors
    ///
    /// What went wrong, with the agent's URL.
    pub(crate) async fn answer<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<Response<T>, CallError> {
        match tokio::time::timeout(self.timeout, call).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(status)) => Err(self.failed(&status)),
            Err(_) => Err(CallError::Silent {
                url: self.url.clone(),
                timeout: self.timeout,
            }),
        }
    }

    /// What a status of the agent means.
    pub(crate) fn failed(&self, status: &Status) -> CallError {
        let url = self.url.clone();
        if let Some(alert) = alert(status) {
            let message = alert.to_string();
            return CallError::Unreachable { url, message };
        }
        // A status that never was on the wire has the transport's error as its source.
        if let Some(mut cause) = std::error::Error::source(status) {
            while let Some(next) = cause.source() {
                cause = next;
            }
            if cause.is::<tonic::TimeoutExpired>() {
                let timeout = self.timeout;
                return CallError::Silent { url, timeout };
            }
            let message = cause.to_string();
            return CallError::Unreachable { url, message };
        }
        CallError::Refused {
            url,
            code: status.code(),
            message: shown(status.message()),
        }
    }

    /// A token for the agent that is valid now.
    pub(crate) fn token(&self) -> Token {
        let session = self.link.session();
        self.tokens.token_for(session.as_deref(), SystemTime::now())
    }

    /// An answer that cannot be.
    pub(crate) fn bad_answer(&self, reason: impl ToString) -> CallError {
        CallError::BadAnswer {
            url: self.url.clone(),
            reason: reason.to_string(),
        }
    }

    /// Our segment of a path, with a token that is valid now.
    pub(crate) fn segment(&self, name: &str, id: &str) -> PathSegment {
        let token = self.token();
        PathSegment {
            name: name.to_owned(),
            id: id.to_owned(),
            token: token.text,
            expires: Some(Timestamp::from(token.expires)),
            metrics: std::collections::BTreeMap::new(),
        }
    }
}

/// TLS by the identity of the command line, once there is one; none where there is to be none.
///
/// # Errors
///
/// The files are no identity, or the Workload API gives none in time.
pub(crate) async fn open_identity(
    args: &IdentityArgs,
    timeout: Duration,
    following: &mut JoinSet<()>,
) -> anyhow::Result<Option<Arc<Tls>>> {
    let Some(source) = args.source()? else {
        return Ok(None);
    };
    let (tls, follow) = identity::open(source)?;
    following.spawn(follow);
    let arrived = tokio::time::timeout(timeout, tls.identity().arrived()).await;
    arrived.map_err(|_| {
        let origin = tls.identity().origin();
        anyhow::anyhow!("{origin} has given no SVID within {:?}: is it running, and has it an entry for this process?", timeout)
    })?;
    Ok(Some(tls))
}

/// Whether this process is root and in no container, as far as it can see: in the machine's first pid namespace, and not elsewhere than
/// process 1, where that may be looked at. In a container of its own a process sees another process 1.
fn is_root_of_the_node() -> bool {
    /// PROC_PID_INIT_INO of linux/proc_ns.h, the inode of the first pid namespace.
    const FIRST_PIDS: u64 = 0xeffffffc;
    let namespace = |process: &str, kind: &str| {
        let file = std::fs::metadata(format!("/proc/{process}/ns/{kind}")).ok()?;
        Some((file.dev(), file.ino()))
    };
    let is_elsewhere = |kind| {
        let first = namespace("1", kind);
        first.is_some() && first != namespace("self", kind)
    };
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
        && namespace("self", "pid").is_some_and(|(_, inode)| inode == FIRST_PIDS)
        && !["pid", "mnt", "user"].into_iter().any(is_elsewhere)
}

/// `prefix-` and eight random digits.
pub(crate) fn random_name(prefix: &str) -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    format!("{prefix}-{}", &id[..8])
}

/// The most characters of foreign text that are shown in one place.
const LONGEST_WORDS: usize = 2000;

/// Foreign text, safe for a terminal: names, addresses and reasons come from other domains, too.
pub(crate) fn shown(words: &str) -> String {
    printable(words, LONGEST_WORDS)
}

/// Prints a line at once: who reads us through a pipe must not wait for a full buffer.
///
/// # Errors
///
/// Standard output is closed.
pub(crate) fn print_line(line: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("standard output is closed")
}

/// Ctrl-C, SIGTERM, and SIGHUP, by which a terminal that is closed ends what runs in it.
#[derive(Debug)]
pub(crate) struct Stop {
    hangup: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Stop {
    /// From here on the signals are ours.
    ///
    /// # Errors
    ///
    /// The system has no room for a handler.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen to signals");
        Ok(Self {
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// Waits for the next of them.
    pub(crate) async fn wait(&mut self) {
        tokio::select! {
            _ = self.hangup.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Runs the goodbye until it is done, its time is over, or somebody asks again.
pub(crate) async fn goodbye(stop: &mut Stop, goodbye: impl Future<Output = ()>) {
    tokio::select! {
        () = goodbye => {}
        () = tokio::time::sleep(GOODBYE) => {}
        () = stop.wait() => {}
    }
}
