//! Metrics for Prometheus: `GET /metrics` on `listen.metrics`, as OpenMetrics text.
//!
//! What happens is counted beside the code that does it ([`ControlPlane::register_metrics`]); what is there now, and what the kernel
//! counts, is gathered when it is asked for, so that it costs nothing in between and cannot go stale.
//!
//! [`ControlPlane::register_metrics`]: nsm_controlplane::plane::ControlPlane::register_metrics

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{encoding::text, registry::Registry};
use tokio::{
    net::TcpListener,
    sync::{Mutex, Semaphore},
};

use super::Told;

mod gathered;
mod paths;

/// What stands before every name.
const PREFIX: &str = "proxy_nsmgr";

/// Connections served at once; a Prometheus server has one, a person another.
const MAX_CONNECTIONS: usize = 16;

/// The longest time that a client may take for its request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// How long accepting waits after it failed, as it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The version of the text that is written, for readers to choose their parser.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of one agent.
pub(crate) struct Metrics {
    told: Told,
    /// What is counted as it happens.
    counted: Registry,
    /// One gathers at a time: whoever comes meanwhile waits, and a reader that hammers costs no more than one.
    turn: Mutex<()>,
}

/// Binds the listener.
pub(crate) async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on tcp://{address}: choose another `listen.metrics`, or `off`, or stop whoever listens there"
        )
    })
}

impl Metrics {
    /// The metrics of the agent that `told` tells about.
    pub(crate) fn new(told: Told) -> Arc<Self> {
        let mut counted = Registry::with_prefix(PREFIX);
        told.plane.register_metrics(&mut counted);
        Arc::new(Self {
            told,
            counted,
            turn: Mutex::default(),
        })
    }

    /// Answers for ever.
    pub(crate) async fn serve(self: Arc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let place = Arc::clone(&places).acquire_owned().await;
            let place = place.expect("nobody closes the semaphore");
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection for metrics");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let metrics = Arc::clone(&self);
            tokio::spawn(async move {
                let service = service_fn(|request| metrics.answer(request));
                // Whoever goes away in the middle of an answer is no concern of ours.
                let _ = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                drop(place);
            });
        }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let plain = |status, words: &'static str| {
            let mut response = Response::new(Full::from(words));
            *response.status_mut() = status;
            Ok(response)
        };
        if request.uri().path() != "/metrics" {
            return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "ask by GET\n");
        }
        let mut response = Response::new(Full::from(self.text().await));
        let content_type = header::HeaderValue::from_static(CONTENT_TYPE);
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, content_type);
        Ok(response)
    }

    async fn text(&self) -> String {
        let _turn = self.turn.lock().await;
        let mut now = Registry::with_prefix(PREFIX);
        gathered::register(&self.told, &mut now).await;
        paths::register(&self.told, &mut now).await;
        let mut page = String::new();
        let encoded = text::encode_registry(&mut page, &self.counted)
            .and_then(|()| text::encode_registry(&mut page, &now))
            .and_then(|()| text::encode_eof(&mut page));
        encoded.expect("a String takes every text");
        page
    }
}
