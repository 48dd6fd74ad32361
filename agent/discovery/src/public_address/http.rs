//! One HTTP/1.1 exchange, with TLS for an https URL. Each has a connection of its own: there is one a minute.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use ::http::{
    HeaderMap, Method, Request, StatusCode, Uri,
    header::HOST,
    uri::{Authority, Scheme},
};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::LookupError;

/// The longest answer that is read. A Kubernetes node lists up to 50 images with all their names, some 100 KiB.
const MAX_ANSWER: usize = 1 << 20;

/// Where distributions keep the certificates of public authorities: Debian, Alpine and their kin; Red Hat and its.
const SYSTEM_BUNDLES: [&str; 2] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
];

/// `http://host[:port]` or `https://host[:port]`, perhaps with a path before those that are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl {
    is_tls: bool,
    authority: Authority,
    /// Without a slash at its end.
    prefix: String,
}

/// Whose certificates are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// The machine's list of public authorities.
    System,
    /// A PEM file.
    File(PathBuf),
}

/// What came back.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
}

impl Answer {
    /// A header's text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

impl BaseUrl {
    /// The URL of a path below it; for messages.
    pub(super) fn at(&self, path: &str) -> String {
        format!("{self}{path}")
    }

    /// One exchange, without a body in the request.
    pub(super) async fn exchange(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        trust: &Trust,
    ) -> Result<Answer, LookupError> {
        let failed = |cause: String| LookupError::Http {
            url: self.at(path),
            cause,
        };
        let host = self
            .authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']');
        let port = self
            .authority
            .port_u16()
            .unwrap_or(if self.is_tls { 443 } else { 80 });
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header(HOST, self.authority.as_str());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Empty::<Bytes>::new())
            .map_err(|error| failed(error.to_string()))?;
        let stream = TcpStream::connect((host, port))
            .await
            .map_err(|error| failed(error.to_string()))?;
        let answer = if self.is_tls {
            let name =
                ServerName::try_from(host.to_owned()).map_err(|error| failed(error.to_string()))?;
            let stream = TlsConnector::from(tls(trust)?)
                .connect(name, stream)
                .await
                .map_err(|error| failed(error.to_string()))?;
            send(stream, request).await
        } else {
            send(stream, request).await
        };
        answer.map_err(failed)
    }
}

async fn send<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
    request: Request<Empty<Bytes>>,
) -> Result<Answer, String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| error.to_string())?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| error.to_string())?
            .to_bytes();
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    };
    // Driven here and not by a task: when the caller gives up, the connection goes with it.
    tokio::pin!(exchange, connection);
    let mut is_driven = true;
    loop {
        tokio::select! {
            answer = &mut exchange => return answer,
            // Its error, if it ends with one, is the exchange's too.
            _ = &mut connection, if is_driven => is_driven = false,
        }
    }
}

fn tls(trust: &Trust) -> Result<Arc<ClientConfig>, LookupError> {
    let (path, pem) = match trust {
        Trust::File(path) => {
            let pem = std::fs::read(path).map_err(|cause| LookupError::File {
                path: path.clone(),
                cause,
            })?;
            (path.clone(), pem)
        }
        Trust::System => first_bundle(&SYSTEM_BUNDLES)?,
    };
    let mut roots = RootCertStore::empty();
    // Some public authorities are older than what can be parsed today: they are left out.
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok));
    if roots.is_empty() {
        return Err(LookupError::File {
            path,
            cause: std::io::Error::other("it holds no certificate in PEM"),
        });
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks the default versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// The first of these files that can be read.
pub(super) fn first_bundle(paths: &[impl AsRef<Path>]) -> Result<(PathBuf, Vec<u8>), LookupError> {
    let mut causes = Vec::new();
    for path in paths {
        let path = path.as_ref();
        match std::fs::read(path) {
            Ok(pem) => return Ok((path.to_owned(), pem)),
            Err(cause) => causes.push(format!("{}: {cause}", path.display())),
        }
    }
    Err(LookupError::NoAuthorities {
        causes: causes.join("; "),
    })
}

impl FromStr for BaseUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        const ALLOWED: &str = "http://host[:port] or https://host[:port], perhaps with a path";
        let parts = text.parse::<Uri>().map_err(|_| ALLOWED)?.into_parts();
        let is_tls = match &parts.scheme {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            _ => return Err(ALLOWED),
        };
        let authority = parts.authority.ok_or(ALLOWED)?;
        if authority.host().is_empty() || authority.as_str().contains('@') {
            return Err(ALLOWED);
        }
        let prefix = match &parts.path_and_query {
            Some(path) if path.query().is_some() => return Err(ALLOWED),
            Some(path) => path.path().trim_end_matches('/').to_owned(),
            None => String::new(),
        };
        Ok(Self {
            is_tls,
            authority,
            prefix,
        })
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority, self.prefix)
    }
}
