//! SPIFFE's Workload API as the source of the identity: a stream over a unix socket, which brings SVID and bundles each time that one is
//! renewed ("The SPIFFE Workload API", section 5).
//!
//! While it is away the identity stays as it was; it is asked again until it is back. What it gives that cannot be used changes nothing.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use nsm_core::{backoff::Backoff, identity::SpiffeId};
use nsm_proto::workload::{
    X509svidRequest, X509svidResponse, spiffe_workload_api_client::SpiffeWorkloadApiClient,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::UnixStream;
use tonic::{Code, Request, Status, transport::Endpoint};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use super::{
    certificate::{BadCertificate, Bundles},
    source::Identity,
    svid::{BadSvid, Svid},
};

/// Without it the Workload API refuses: a request that was forwarded by a browser or a proxy has none (section 5.1 of "The SPIFFE Workload
/// Endpoint").
const HEADER: &str = "workload.spiffe.io";

/// The pauses between two tries: an agent of SPIRE that is restarted is back within seconds, and one that has no entry for us gets it within
/// some.
const SHORTEST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The largest answer, in bytes: some hundred bundles.
const LARGEST: usize = 4 << 20;

/// How long a connection to the socket may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Why an answer of the Workload API is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadAnswer {
    /// No SVID.
    #[error("it has no SVID for this process")]
    Empty,
    /// A certificate that cannot be parsed.
    #[error("a certificate in it cannot be parsed")]
    Certificate,
    /// An SVID that cannot be shown.
    #[error("its SVID cannot be shown: {0}")]
    Svid(#[from] BadSvid),
    /// A bundle that cannot be used.
    #[error("the bundle of {name} cannot be used: {cause}")]
    Bundle {
        /// Whose it is.
        name: String,
        /// What is wrong.
        cause: BadCertificate,
    },
}

/// Follows the Workload API behind `socket` for ever, and keeps `identity` what it says.
pub async fn follow(socket: PathBuf, identity: Identity) {
    let mut backoff = Backoff::new(SHORTEST_PAUSE, LONGEST_PAUSE);
    let mut said = None;
    loop {
        let outcome = stream(&socket, &identity, || {
            backoff.reset();
            said = None;
        });
        let error = match outcome.await {
            Ok(()) => "the stream has ended".to_owned(),
            Err(status) => explain(&status),
        };
        // Once for each reason: it may be away for hours.
        if said.as_ref() == Some(&error) {
            tracing::debug!(socket = %socket.display(), error, "the Workload API is away");
        } else {
            tracing::warn!(socket = %socket.display(), error, "the Workload API is away; the identity stays as it was, trying again");
            said = Some(error);
        }
        tokio::time::sleep(backoff.next(rand::random())).await;
    }
}

fn explain(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    match status.code() {
        Code::PermissionDenied => format!(
            "it has no SVID for this process: create a registration entry that selects it ({})",
            status.message()
        ),
        _ => cause.to_string(),
    }
}

/// Takes over what comes, until the stream breaks. `taken` is called after each answer that was good.
async fn stream(socket: &Path, identity: &Identity, mut taken: impl FnMut()) -> Result<(), Status> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    // Nobody looks at the name: the socket says where.
    let endpoint = Endpoint::from_static("http://localhost").connect_timeout(DIAL_TIMEOUT);
    let channel = endpoint.connect_with_connector(connector).await;
    let channel = channel.map_err(|error| Status::from_error(Box::new(error)))?;
    let mut client = SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(LARGEST);
    let mut request = Request::new(X509svidRequest {});
    request
        .metadata_mut()
        .insert(HEADER, "true".parse().expect("an ASCII text"));
    let mut answers = client.fetch_x509svid(request).await?.into_inner();
    while let Some(answer) = answers.message().await? {
        match parse(&answer) {
            Ok((svid, bundles)) => {
                tracing::info!(id = %svid.id(), "the Workload API has given an SVID");
                identity.replace(svid, bundles);
                taken();
            }
            Err(error) => {
                tracing::error!(%error, "the Workload API's answer cannot be used: the identity stays as it was");
            }
        }
    }
    Ok(())
}

/// The identity in an answer: its first SVID, and all bundles.
///
/// # Errors
/// It holds none that can be used.
pub fn parse(answer: &X509svidResponse) -> Result<(Svid, Bundles), BadAnswer> {
    let first = answer.svids.first().ok_or(BadAnswer::Empty)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(first.x509_svid_key.as_slice()));
    let svid = Svid::new(certificates(&first.x509_svid)?, &key)?;
    let mut bundles = Bundles::default();
    add(
        &mut bundles,
        &svid.id().trust_domain().to_string(),
        &first.bundle,
    )?;
    for (name, bundle) in &answer.federated_bundles {
        let name = name.strip_prefix(SpiffeId::SCHEME).unwrap_or(name);
        add(&mut bundles, name, bundle)?;
    }
    Ok((svid, bundles))
}

fn add(bundles: &mut Bundles, name: &str, bundle: &[u8]) -> Result<(), BadAnswer> {
    let bad = |cause| BadAnswer::Bundle {
        name: name.to_owned(),
        cause,
    };
    let trust_domain = name
        .parse()
        .map_err(|error| bad(BadCertificate::Id(error)))?;
    bundles
        .insert(trust_domain, certificates(bundle)?)
        .map_err(bad)
}

/// Certificates in DER, one behind the other.
fn certificates(mut bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, BadAnswer> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (rest, _) = X509Certificate::from_der(bytes).map_err(|_| BadAnswer::Certificate)?;
        let length = bytes.len() - rest.len();
        found.push(CertificateDer::from(bytes[..length].to_vec()));
        bytes = rest;
    }
    Ok(found)
}
