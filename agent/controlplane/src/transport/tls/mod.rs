//! Mutual TLS of SPIFFE on every stream, TCP's and unix sockets'.
//!
//! Each connection is made with the identity as it is at its handshake, and keeps it: its [`Session`] has both certificates. What fails
//! is counted by reason, and one line a minute and peer says why.
//!
//! On a unix socket descriptors travel below TLS: beside the bytes of the records.

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

pub(crate) mod error;
mod metrics;
mod stream;
mod verifier;

pub(crate) use self::stream::{Secured, SecuredInfo};
pub use self::{
    error::{TlsError, alert},
    metrics::Handshakes,
};
use self::{
    metrics::Side,
    stream::{HANDSHAKE, Opening, is_tls},
    verifier::Configs,
};
use crate::{
    identity::{certificate::Leaf, session::Session, source::Identity},
    sync::lock,
};

/// How long a handshake may take: over the longest ways it takes a second.
pub(crate) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// How long a client that is refused may take to close, and how many bytes are read of it meanwhile.
const FAREWELL: Duration = Duration::from_secs(1);
const MOST_READ: u64 = 64 << 10;

/// What a client that speaks HTTP/2 without TLS gets: an empty SETTINGS frame, and GOAWAY with the code INADEQUATE_SECURITY and a
/// sentence (RFC 9113 sections 6.5 and 6.8).
const GOAWAY: &[u8] = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\
\x00\x00\x25\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0cthis listener speaks TLS only";

/// TLS with the identity of this process.
#[derive(Debug)]
pub struct Tls {
    identity: Identity,
    /// Those of the generation that was used last.
    configs: Mutex<Option<Configs>>,
    handshakes: Handshakes,
}

impl Tls {
    /// TLS that shows and believes what `identity` says.
    #[must_use]
    pub fn of(identity: Identity) -> Self {
        Self {
            identity,
            configs: Mutex::default(),
            handshakes: Handshakes::default(),
        }
    }

    /// The identity.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What has come of the handshakes.
    #[must_use]
    pub const fn handshakes(&self) -> &Handshakes {
        &self.handshakes
    }

    /// Takes the server's part on a stream of `peer`, as logs name it.
    ///
    /// # Errors
    /// There is no TLS connection; the stream is closed.
    pub(crate) async fn accept<S>(&self, stream: S, peer: &str) -> Result<Secured<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let outcome = tokio::time::timeout(HANDSHAKE_LIMIT, self.try_accept(stream)).await;
        let outcome = outcome.unwrap_or(Err(TlsError::Late(HANDSHAKE_LIMIT)));
        self.handshakes.note(Side::Server, peer, &outcome);
        outcome
    }

    /// Takes the client's part on a stream that was dialled as `peer`. Who dials limits the time.
    ///
    /// # Errors
    /// As [`Self::accept`].
    pub(crate) async fn connect<S>(&self, stream: S, peer: &str) -> Result<Secured<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let outcome = self.try_connect(stream).await;
        self.handshakes.note(Side::Client, peer, &outcome);
        outcome
    }

    async fn try_accept<S>(&self, stream: S) -> Result<Secured<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let configs = self.configs()?;
        let mut stream = Opening::of(stream);
        let first = stream.read_u8().await.map_err(TlsError::of_handshake)?;
        if first != HANDSHAKE {
            turn_away(stream, GOAWAY).await;
            return Err(TlsError::PlainText);
        }
        stream.put_back();
        let accepting = TlsAcceptor::from(Arc::clone(&configs.server)).accept(stream);
        match accepting.into_fallible().await {
            Ok(stream) => session(configs, stream.into()),
            Err((error, stream)) => {
                // The alert is written already.
                turn_away(stream, &[]).await;
                Err(TlsError::of_handshake(error))
            }
        }
    }

    async fn try_connect<S>(&self, stream: S) -> Result<Secured<S>, TlsError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let configs = self.configs()?;
        // Nobody reads it: names of hosts play no part.
        let name = ServerName::try_from("spiffe.invalid").expect("a DNS name");
        let connector = TlsConnector::from(Arc::clone(&configs.client));
        let connecting = connector.connect(name, Opening::of(stream)).into_fallible();
        let stream = connecting.await.map_err(|(error, stream)| {
            let is_plain = stream.first().is_some_and(|first| !is_tls(first));
            match is_plain {
                true => TlsError::PlainText,
                false => TlsError::of_handshake(error),
            }
        })?;
        session(configs, stream.into())
    }

    /// Both sides' configurations with the identity as it is now.
    fn configs(&self) -> Result<Configs, TlsError> {
        let material = self.identity.current()?;
        let mut configs = lock(&self.configs);
        match &*configs {
            Some(known) if Arc::ptr_eq(&known.material, &material) => Ok(known.clone()),
            _ => Ok(configs.insert(Configs::of(material)).clone()),
        }
    }
}

/// Writes the last words. What the client has sent is read before the end: closing with unread bytes would take back what was written.
async fn turn_away<S>(mut stream: Opening<S>, words: &[u8])
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let farewell = async {
        stream.write_all(words).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(MOST_READ), &mut tokio::io::sink()).await
    };
    // Who does not close gets no words.
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
}

/// A stream after its handshake.
fn session<S>(configs: Configs, stream: TlsStream<Opening<S>>) -> Result<Secured<S>, TlsError> {
    let (_, connection) = stream.get_ref();
    let shown = connection.peer_certificates();
    let leaf = shown.and_then(<[CertificateDer<'_>]>::first);
    let leaf = Leaf::read(leaf.ok_or(TlsError::NoCertificate)?)?;
    let session = Session::new(configs.material, leaf, SystemTime::now());
    Ok(Secured::tls(stream, Arc::new(session)))
}

/// A stream that was dialled, in TLS where there is any.
///
/// # Errors
/// There is no TLS connection.
pub(crate) async fn dialled<S>(tls: Option<&Tls>, stream: S, peer: &str) -> io::Result<Secured<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match tls {
        Some(tls) => Ok(tls.connect(stream, peer).await?),
        None => Ok(Secured::dialled_plain(stream)),
    }
}

#[cfg(test)]
mod tests;
