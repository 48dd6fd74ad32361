//! Calls to peers: with our token, in time, and to who should answer.

use std::{sync::Arc, time::Duration};

use nsm_core::{
    identity::access::{Role, Server},
    net::PeerUrl,
};
use nsm_proto::{
    connection::Connection,
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Request, Response, Status};

use super::peers::{Peer, Peers};
use crate::{
    error::RequestError,
    identity::session::Session,
    transport::{
        dial::{self, DialError, Link},
        tls,
    },
};

/// What the timeouts of calls to peers are rounded to.
const TIMEOUT_STEP: Duration = Duration::from_millis(10);

/// What a next hop has granted.
pub(crate) struct Granted {
    pub(crate) connection: Connection,
    /// What both ends had shown of the connection that the answer came by; none in plain text.
    pub(crate) session: Option<Arc<Session>>,
}

impl Peers {
    /// Sends a Request to the peer, once it is known to be who it should be.
    pub(crate) async fn request(
        &self,
        peer: &Peer,
        server: Server<'_>,
        request: NetworkServiceRequest,
        deadline: Instant,
    ) -> Result<Granted, RequestError> {
        again_if_unsent(peer, request, |request| {
            self.request_once(peer, server, request, deadline)
        })
        .await
    }

    async fn request_once(
        &self,
        peer: &Peer,
        server: Server<'_>,
        request: NetworkServiceRequest,
        deadline: Instant,
    ) -> Result<Granted, RequestError> {
        let link = self.link_to(peer, deadline).await?;
        let session = link.session();
        self.check(session.as_ref(), server, Role::Proxy)?;
        let request = self.outgoing(&link, request, Some(deadline));
        let mut client = NetworkServiceClient::new(link.channel)
            .max_decoding_message_size(peer.max_message_bytes);
        let response = call(
            &peer.url,
            "Request",
            deadline,
            Box::pin(client.request(request)),
        )
        .await?;
        let connection = response.into_inner();
        Ok(Granted {
            connection,
            session,
        })
    }

    /// Sends a Close to the peer.
    pub(crate) async fn close(
        &self,
        peer: &Peer,
        connection: Connection,
        deadline: Instant,
    ) -> Result<(), RequestError> {
        again_if_unsent(peer, connection, |connection| {
            self.close_once(peer, connection, deadline)
        })
        .await
    }

    async fn close_once(
        &self,
        peer: &Peer,
        connection: Connection,
        deadline: Instant,
    ) -> Result<(), RequestError> {
        let link = self.link_to(peer, deadline).await?;
        let request = self.outgoing(&link, connection, Some(deadline));
        let mut client = NetworkServiceClient::new(link.channel)
            .max_decoding_message_size(peer.max_message_bytes);
        call(
            &peer.url,
            "Close",
            deadline,
            Box::pin(client.close(request)),
        )
        .await?;
        Ok(())
    }

    /// A message with our token for who is at the other end of `link`, and with what is left of the time as its gRPC timeout.
    pub(crate) fn outgoing<T>(
        &self,
        link: &Link,
        message: T,
        deadline: Option<Instant>,
    ) -> Request<T> {
        let mut request = Request::new(message);
        let session = link.session();
        self.tokens
            .apply_for(session.as_deref(), request.metadata_mut());
        if let Some(deadline) = deadline {
            request.set_timeout(sent_timeout(
                deadline.saturating_duration_since(Instant::now()),
            ));
        }
        request
    }

    /// Decides whether the other end of a link is who it should be. One that has shown no certificate is not decided on here.
    ///
    /// # Errors
    /// The rule that denies it.
    pub(crate) fn check(
        &self,
        session: Option<&Arc<Session>>,
        server: Server<'_>,
        role: Role,
    ) -> Result<(), RequestError> {
        if let (Some(session), Some(gate)) = (session, &self.gate) {
            gate.admit_server(session.shown(), server, role)?;
        }
        Ok(())
    }

    /// Checks that the tokens of an answer prove its path. Its index is that of our segment.
    ///
    /// # Errors
    /// The rule that refuses it.
    pub(crate) fn prove(&self, granted: &Granted) -> Result<(), RequestError> {
        let (Some(session), Some(gate)) = (&granted.session, &self.gate) else {
            return Ok(());
        };
        let path = granted.connection.path.as_ref();
        let (index, segments) = path.map_or((0, &[][..]), |it| (it.index, &it.path_segments));
        let tokens: Vec<&str> = segments.iter().map(|it| it.token.as_str()).collect();
        gate.prove_answer(session.shown(), &tokens, index as usize)?;
        Ok(())
    }
}

/// Makes a call, and once more where it was not sent because the channel answered with the error of an earlier try to connect. Only a
/// peer that is in doubt costs a copy of the message.
async fn again_if_unsent<M: Clone, T, F>(
    peer: &Peer,
    message: M,
    send: impl Fn(M) -> F + Send + Sync,
) -> Result<T, RequestError>
where
    F: Future<Output = Result<T, RequestError>> + Send,
{
    let spare = (peer.is_reached() && peer.is_doubtful()).then(|| message.clone());
    let mut outcome = send(message).await;
    peer.note(&outcome);
    if let (Err(RequestError::Dial(_)), Some(spare)) = (&outcome, spare) {
        outcome = send(spare).await;
        peer.note(&outcome);
    }
    outcome
}

/// What is left of a call's time as it is sent, rounded up: [`call`] keeps the time, and most calls of a peer then have the same value.
/// HTTP/2 sends a header again as one byte; each new value pushes others, such as our token, out of its table.
fn sent_timeout(left: Duration) -> Duration {
    let steps = left.as_nanos().div_ceil(TIMEOUT_STEP.as_nanos());
    TIMEOUT_STEP * u32::try_from(steps).unwrap_or(u32::MAX)
}

/// Awaits a call until `deadline`. Its error names the peer and the fault.
pub(crate) async fn call<T>(
    url: &PeerUrl,
    method: &'static str,
    deadline: Instant,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Response<T>, RequestError> {
    let began = Instant::now();
    let silent = || RequestError::Silent {
        url: url.to_string(),
        method,
        after: began.elapsed(),
    };
    match timeout_at(deadline, answer).await {
        Ok(Ok(response)) => Ok(response),
        // The client side reports our own timeout as cancelled or deadline exceeded.
        Ok(Err(_)) if Instant::now() >= deadline => Err(silent()),
        Ok(Err(status)) => Err(refused(url, method, &status)),
        Err(_) => Err(silent()),
    }
}

/// The peer's status as our error. Tonic reports a broken transport as `Unknown`, and one that broke under the call as `Cancelled`: our
/// caller must get that the peer could not be reached.
pub(crate) fn refused(url: &PeerUrl, method: &'static str, status: &Status) -> RequestError {
    let alert = tls::alert(status).map(|alert| alert.to_string());
    let cause = alert.or_else(|| root_cause(status));
    if let (true, Some(cause)) = (dial::is_unsent(status), &cause) {
        let (url, cause) = (url.clone(), cause.clone());
        return DialError::Connect { url, cause }.into();
    }
    let code = match status.code() {
        Code::Unknown | Code::Cancelled if cause.is_some() => Code::Unavailable,
        code => code,
    };
    let mut message = status.message().to_owned();
    if let Some(cause) = cause.filter(|cause| !message.contains(cause)) {
        message = format!("{message} ({cause})");
    }
    RequestError::Refused {
        url: url.to_string(),
        method,
        code,
        message,
    }
}

/// The innermost cause of a broken transport; a peer that answered has none.
pub(crate) fn root_cause(status: &Status) -> Option<String> {
    let mut cause = std::error::Error::source(status)?;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    Some(cause.to_string())
}
