//! HTTP servers on the loopback that behave as metadata services and the Kubernetes API do.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use ::http::{Method, Request, Response, StatusCode};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

use super::super::BaseUrl;

/// A running server; it ends with this.
pub(super) struct Server {
    url: BaseUrl,
    task: JoinHandle<()>,
}

impl Server {
    pub(super) fn url(&self) -> BaseUrl {
        self.url.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) fn answer(status: StatusCode, body: &str) -> Response<String> {
    Response::builder()
        .status(status)
        .body(body.to_owned())
        .unwrap()
}

pub(super) type Handler = Arc<dyn Fn(&Request<Incoming>) -> Response<String> + Send + Sync>;

/// The certificate of a new authority as PEM, and a server's certificate by it for 127.0.0.1.
pub(super) fn certificates() -> (String, TlsAcceptor) {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap(),
        )
        .unwrap();
    (pem, TlsAcceptor::from(Arc::new(config)))
}

/// Serves `handler`, by TLS with `acceptor`.
pub(super) async fn serve(acceptor: Option<TlsAcceptor>, handler: Handler) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let scheme = if acceptor.is_some() { "https" } else { "http" };
    let url = format!("{scheme}://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, handler) = (acceptor.clone(), Arc::clone(&handler));
            tokio::spawn(async move {
                match acceptor {
                    None => exchange(stream, handler).await,
                    Some(acceptor) => {
                        // A client that does not trust us goes away.
                        if let Ok(stream) = acceptor.accept(stream).await {
                            exchange(stream, handler).await;
                        }
                    }
                }
            });
        }
    });
    Server {
        url: url.parse().unwrap(),
        task,
    }
}

async fn exchange(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, handler: Handler) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = handler(&request);
        async move { Ok::<_, Infallible>(response) }
    });
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// A service that takes connections and never answers, as AWS's answer to a token request ends at the hop limit.
pub(super) async fn silent() -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    Server {
        url: url.parse().unwrap(),
        task,
    }
}

/// AWS's service, as of IMDSv2 with tokens required.
pub(super) struct Aws {
    server: Server,
    state: Arc<AwsState>,
}

struct AwsState {
    address: Mutex<Option<String>>,
    /// The number of the token that is valid.
    token: AtomicU32,
    /// Tokens given.
    given: AtomicU32,
}

pub(super) async fn aws(address: Option<&str>) -> Aws {
    let state = Arc::new(AwsState {
        address: Mutex::new(address.map(str::to_owned)),
        token: AtomicU32::new(0),
        given: AtomicU32::new(0),
    });
    let shared = Arc::clone(&state);
    let handler = move |request: &Request<Incoming>| {
        let header = |name: &str| {
            let value = request.headers().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        let token = format!("token-{}", shared.token.load(Ordering::SeqCst));
        match (request.method(), request.uri().path()) {
            (&Method::PUT, "/latest/api/token") => {
                let lifetime = header("x-aws-ec2-metadata-token-ttl-seconds")
                    .and_then(|text| text.parse::<u32>().ok());
                if !lifetime.is_some_and(|seconds| (1..=21600).contains(&seconds)) {
                    return answer(StatusCode::BAD_REQUEST, "");
                }
                shared.given.fetch_add(1, Ordering::SeqCst);
                answer(StatusCode::OK, &token)
            }
            (&Method::PUT, _) => answer(StatusCode::METHOD_NOT_ALLOWED, ""),
            (_, path) => {
                if header("x-aws-ec2-metadata-token") != Some(token) {
                    return answer(StatusCode::UNAUTHORIZED, "");
                }
                match &*shared.address.lock().unwrap() {
                    Some(address) if path == "/latest/meta-data/public-ipv4" => {
                        answer(StatusCode::OK, address)
                    }
                    _ => answer(StatusCode::NOT_FOUND, "<html>404 - Not Found</html>"),
                }
            }
        }
    };
    Aws {
        server: serve(None, Arc::new(handler)).await,
        state,
    }
}

impl Aws {
    pub(super) fn url(&self) -> BaseUrl {
        self.server.url()
    }

    /// Tokens given so far are not valid any more.
    pub(super) fn expire_tokens(&self) {
        self.state.token.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn tokens_given(&self) -> u32 {
        self.state.given.load(Ordering::SeqCst)
    }

    pub(super) fn set_address(&self, address: Option<&str>) {
        *self.state.address.lock().unwrap() = address.map(str::to_owned);
    }
}

/// Google's service: 403 without its header, 404 where the interface has no access config.
pub(super) async fn gcp(address: Option<&'static str>) -> Server {
    let path = "/computeMetadata/v1/instance/network-interfaces/0/access-configs/0/external-ip";
    let handler = move |request: &Request<Incoming>| {
        let flavor = request.headers().get("metadata-flavor");
        let mut answer = match address {
            _ if flavor.is_none_or(|flavor| flavor != "Google") => answer(
                StatusCode::FORBIDDEN,
                "Missing Metadata-Flavor:Google header.",
            ),
            Some(address) if request.uri().path() == path => answer(StatusCode::OK, address),
            _ => answer(StatusCode::NOT_FOUND, "<html>"),
        };
        let headers = answer.headers_mut();
        headers.insert("metadata-flavor", "Google".parse().unwrap());
        answer
    };
    serve(None, Arc::new(handler)).await
}

/// Azure's service: 400 without its header or an API version; an empty body where there is no address of the machine's own.
/// `load_balancer`: what it answers about the addresses before the machine.
pub(super) async fn azure(own: &'static str, load_balancer: (StatusCode, &'static str)) -> Server {
    let handler = move |request: &Request<Incoming>| {
        let query = request.uri().query().unwrap_or_default();
        let metadata = request.headers().get("metadata");
        if metadata.is_none_or(|metadata| metadata != "true") {
            return answer(
                StatusCode::BAD_REQUEST,
                "Required metadata header not specified",
            );
        }
        if !query.contains("api-version=") {
            return answer(StatusCode::BAD_REQUEST, "api-version was not specified");
        }
        match request.uri().path() {
            "/metadata/instance/network/interface/0/ipv4/ipAddress/0/publicIpAddress"
                if query.contains("format=text") =>
            {
                answer(StatusCode::OK, own)
            }
            "/metadata/loadbalancer" => answer(load_balancer.0, load_balancer.1),
            _ => answer(StatusCode::NOT_FOUND, ""),
        }
    };
    serve(None, Arc::new(handler)).await
}

/// Equinix Metal's service.
pub(super) async fn equinix(address: Option<&'static str>) -> Server {
    let handler = move |request: &Request<Incoming>| match address {
        Some(address) if request.uri().path() == "/2009-04-04/meta-data/public-ipv4" => {
            answer(StatusCode::OK, address)
        }
        _ => answer(StatusCode::NOT_FOUND, ""),
    };
    serve(None, Arc::new(handler)).await
}
