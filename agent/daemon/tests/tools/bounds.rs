//! What one stranger makes an agent keep: the memory of the process shows it.

use std::time::Duration;

use http_body_util::StreamBody;
use hyper::body::{Bytes, Frame};
use nsm_controlplane::{identity::token::TokenSource, transport::dial::dial};
use nsm_proto::{
    connection::{
        Connection, ConnectionEvent, MonitorScopeSelector, Path, PathSegment,
        monitor_connection_client::MonitorConnectionClient,
    },
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
    registry::{NetworkService, network_service_registry_client::NetworkServiceRegistryClient},
};
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tonic::{
    Code, Request, Status, Streaming, body::Body, codegen::Service as _, transport::Channel,
};

use crate::{
    agent::{Agent, config, free_ports},
    support::{PATIENCE, soon},
};

/// How much the agent may grow: what its one caller may hold, and what the allocator keeps of what was freed.
const GROWTH_KIB: u64 = 64 << 10;

/// Larger than any limit of one connection or entry, smaller than a message may be.
const LARGE: usize = 900 << 10;

/// Somebody on the network.
struct Stranger {
    url: String,
    channel: Channel,
}

impl Stranger {
    async fn of(port: u16) -> Self {
        let url = format!("tcp://127.0.0.1:{port}");
        let channel = dial(&url.parse().unwrap(), PATIENCE).await.unwrap();
        Self { url, channel }
    }

    fn call<T>(message: T) -> Request<T> {
        let mut request = Request::new(message);
        let life = Duration::from_secs(600);
        TokenSource::hs256("spiffe://tests/stranger", b"secret", life)
            .apply(request.metadata_mut());
        request
    }

    /// Asks for connections with very many labels.
    async fn asks_for_much(&self) {
        for number in 0..60 {
            let id = format!("stranger-{number}");
            let connection = Connection {
                id: id.clone(),
                network_service: "svc".to_owned(),
                labels: [("text".to_owned(), "x".repeat(LARGE))].into(),
                path: Some(Path {
                    index: 0,
                    path_segments: vec![PathSegment {
                        name: "stranger".to_owned(),
                        id,
                        ..PathSegment::default()
                    }],
                }),
                ..Connection::default()
            };
            let request = Self::call(NetworkServiceRequest {
                connection: Some(connection),
                mechanism_preferences: Vec::new(),
            });
            let mut client = NetworkServiceClient::new(self.channel.clone());
            let refused = soon("a refusal", client.request(request)).await;
            let status = refused.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        }
    }

    /// Begins Requests and leaves each a byte short; gives those that the agent has not refused, when it has refused one.
    async fn begins_much(&self) -> JoinSet<Code> {
        let mut begun = JoinSet::new();
        for _ in 0..200 {
            begun.spawn(begin(self.channel.clone()));
        }
        let refused = soon("a refusal", begun.join_next()).await;
        assert_eq!(refused.unwrap().unwrap(), Code::ResourceExhausted);
        begun
    }

    /// Registers a large service.
    async fn registers(&self, number: usize) -> Result<(), Code> {
        let service = NetworkService {
            name: format!("svc-{number}"),
            payload: "x".repeat(60 << 10),
            ..NetworkService::default()
        };
        let mut services = NetworkServiceRegistryClient::new(self.channel.clone());
        let registered = services.register(Self::call(service));
        let registered = soon("an answer", registered).await;
        registered.map(drop).map_err(|status| status.code())
    }

    async fn unregisters(&self, number: usize) {
        let service = NetworkService {
            name: format!("svc-{number}"),
            ..NetworkService::default()
        };
        let mut services = NetworkServiceRegistryClient::new(self.channel.clone());
        let gone = services.unregister(Self::call(service));
        soon("an answer", gone).await.unwrap();
    }

    /// Opens monitors with long selectors and reads none of them; gives those that were opened.
    async fn monitors_much(&self) -> Vec<Streaming<ConnectionEvent>> {
        let mut open = Vec::new();
        for _ in 0..5 {
            let endpoint = Channel::from_shared(self.url.replace("tcp://", "http://")).unwrap();
            // Not even one event fits.
            let endpoint = endpoint.initial_stream_window_size(1);
            let channel = endpoint.connect().await.unwrap();
            for _ in 0..1_000 {
                let selector = MonitorScopeSelector {
                    network_services: vec!["x".repeat(50 << 10)],
                    ..MonitorScopeSelector::default()
                };
                let mut monitor = MonitorConnectionClient::new(channel.clone());
                match soon("an answer", monitor.monitor_connections(selector)).await {
                    Ok(events) => open.push(events.into_inner()),
                    Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}"),
                }
            }
        }
        open
    }
}

/// A Request of which the last byte never comes: the code of its end.
async fn begin(mut channel: Channel) -> Code {
    let mut message = vec![0];
    message.extend(u32::try_from(LARGE).unwrap().to_be_bytes());
    message.resize(message.len() + LARGE - 1, b'x');
    let first = Frame::data(Bytes::from(message));
    let frames = tokio_stream::once(Ok::<_, Status>(first)).chain(tokio_stream::pending());
    let request = http::Request::post("http://agent/networkservice.NetworkService/Request")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(StreamBody::new(frames)))
        .unwrap();
    std::future::poll_fn(|context| channel.poll_ready(context))
        .await
        .unwrap();
    match channel.call(request).await {
        Ok(answer) => {
            let status = Status::from_header_map(answer.headers());
            status.map_or(Code::Ok, |status| status.code())
        }
        Err(_) => Code::Unavailable,
    }
}

fn resident_kib(agent: &Agent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.unwrap().trim().trim_end_matches(" kB");
    number.parse().unwrap()
}

/// In a debug build this takes half a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_does_not_fill_the_memory() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    let ports = free_ports();
    let limits = "domain: one.example\nlimits: {max_bytes_per_source: 16MiB}";
    std::fs::write(&file, config(folder.path(), ports, limits)).unwrap();
    std::fs::write(folder.path().join("map-ip.yaml"), "").unwrap();
    let agent = Agent::start(&file).await;
    let before = resident_kib(&agent);
    let grown = |what: &str| {
        let grown = resident_kib(&agent).saturating_sub(before);
        assert!(grown < GROWTH_KIB, "{grown} KiB after {what}");
    };
    let stranger = Stranger::of(ports[0]).await;
    stranger.asks_for_much().await;
    grown("large Requests");
    let begun = stranger.begins_much().await;
    grown("Requests without an end");
    drop((begun, stranger));

    let stranger = Stranger::of(ports[1]).await;
    soon("the end of these Requests", async {
        while stranger.registers(0).await.is_err() {}
    })
    .await;
    let mut taken = 1;
    for number in 1..1_500 {
        taken += usize::from(stranger.registers(number).await.is_ok());
    }
    assert!((200..300).contains(&taken), "{taken}");
    grown("services");
    let unread = stranger.monitors_much().await;
    assert!(unread.len() < 10, "{}", unread.len());
    for number in 0..1_500 {
        stranger.unregisters(number).await;
    }
    let unread = stranger.monitors_much().await;
    assert!((100..300).contains(&unread.len()), "{}", unread.len());
    grown("monitors");
}
