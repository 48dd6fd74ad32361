//! Metrics for Prometheus: `GET /metrics` on `listen.metrics`, as OpenMetrics text.
//!
//! Events are counted beside the code that handles them ([`ControlPlane::register_metrics`]); the present state, and the kernel's counters,
//! come from the evidence, which each scrape gathers.
//!
//! [`ControlPlane::register_metrics`]: nsm_controlplane::plane::ControlPlane::register_metrics

use std::{convert::Infallible, sync::Arc, time::Duration};

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

use super::Observer;

mod now;
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
    observer: Observer,
    /// What is counted as it happens.
    counted: Registry,
    /// One scrape gathers at a time and others wait, so that many readers cost no more than one.
    turn: Mutex<()>,
}

impl Metrics {
    /// The metrics of the agent that `observer` observes.
    pub(crate) fn new(observer: Observer) -> Arc<Self> {
        let mut counted = Registry::with_prefix(PREFIX);
        observer.plane.register_metrics(&mut counted);
        if let Some(tls) = &observer.tls {
            tls.handshakes().register(&mut counted);
        }
        Arc::new(Self {
            observer,
            counted,
            turn: Mutex::default(),
        })
    }

    /// Answers for ever.
    pub(crate) async fn serve(self: Arc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let place = Arc::clone(&places).acquire_owned().await;
            let place = place.expect("the semaphore is never closed");
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
                // A client may go away in the middle of an answer.
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
        let evidence = self.observer.evidence().await;
        now::register(&evidence, &mut now);
        paths::register(&evidence, &mut now);
        let mut page = String::new();
        let encoded = text::encode_registry(&mut page, &self.counted)
            .and_then(|()| text::encode_registry(&mut page, &now))
            .and_then(|()| text::encode_eof(&mut page));
        encoded.expect("a String takes every text");
        page
    }
}
