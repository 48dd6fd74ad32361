//! `endpoint`: what it registers, what it grants, and how it ends.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::sys::signal::Signal;
use nsm_controlplane::{identity::token::TokenSource, transport::dial::dial};
use nsm_core::net::PeerUrl;
use nsm_proto::{
    connection::{
        Connection, ConnectionEventType, Mechanism, MonitorScopeSelector, Path as WirePath,
        PathSegment, monitor_connection_client::MonitorConnectionClient,
    },
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
    registry::{Match, NetworkService},
};
use tonic::{Code, Request, Status, transport::Channel};

use crate::support::{Call, PATIENCE, Reply, Stage, Tool, soon};

struct Served {
    stage: Stage,
    tool: Tool,
    socket: PathBuf,
    channel: Channel,
    _dir: tempfile::TempDir,
}

fn endpoint(stage: &Stage, socket: &Path, more: &[&str]) -> Tool {
    let socket = socket.to_str().unwrap();
    let mut words = vec![
        "endpoint",
        "--service",
        "icmp-responder",
        "--cidr",
        "172.16.1.0/24",
        "--cidr",
        "fd00::/64",
        "--netns",
        "/proc/self/ns/net",
        "--json",
        "--name",
        "nse",
        "--connect-to",
        &stage.url,
        "--listen",
        socket,
    ];
    words.extend(more);
    Tool::start(&words)
}

impl Served {
    /// An endpoint that is registered and watched.
    async fn start(replies: impl IntoIterator<Item = Reply>) -> Self {
        let mut stage = Stage::new(replies);
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nse.sock");
        let mut tool = endpoint(&stage, &socket, &["--label", "app=web"]);
        let (Call::RegisterService(service), _) = stage.call().await else {
            panic!("no service")
        };
        assert_eq!(
            (service.name.as_str(), service.payload.as_str()),
            ("icmp-responder", "IP")
        );
        let (Call::Register(entry), metadata) = stage.call().await else {
            panic!("no endpoint")
        };
        assert_eq!(entry.name, "nse");
        assert_eq!(entry.network_service_names, ["icmp-responder"]);
        assert_eq!(
            entry.network_service_labels["icmp-responder"].labels["app"],
            "web"
        );
        // Whoever is not root of the node passes the socket's descriptor.
        let path = format!("unix://{}", socket.display());
        assert!(
            entry.url == path || entry.url.starts_with("inode://"),
            "{}",
            entry.url
        );
        assert!(metadata.contains_key("nsm-client-token"));
        let path = metadata.get("path").unwrap().to_str().unwrap();
        assert!(
            path.starts_with(r#"{"Index":0,"PathSegments":[{"token":"#),
            "{path}"
        );
        tool.expect("registered").await;
        let (Call::Watch(query), _) = stage.call().await else {
            panic!("no watch")
        };
        assert!(query.watch && query.network_service_endpoint.unwrap().name == "nse");
        let channel = dial(&PeerUrl::unix(&socket), PATIENCE).await.unwrap();
        Self {
            stage,
            tool,
            socket,
            channel,
            _dir: dir,
        }
    }

    /// Asks as an agent does, with a token of this life.
    async fn ask(&self, id: &str, life: Duration) -> Result<Connection, Status> {
        let mut request = Request::new(request(id));
        TokenSource::hs256("spiffe://x/agent", b"insecure", life).apply(request.metadata_mut());
        let mut client = NetworkServiceClient::new(self.channel.clone());
        let answer = soon("an answer", client.request(request)).await?;
        Ok(answer.into_inner())
    }

    /// Ends it by a signal; it unregisters and leaves nothing.
    async fn end(mut self, signal: Signal) {
        self.tool.signal(signal);
        loop {
            match self.stage.call().await.0 {
                Call::Unregister(entry) => break assert_eq!(entry.name, "nse"),
                Call::Watch(_) | Call::Register(_) | Call::RegisterService(_) => {}
                other => panic!("{other:?}"),
            }
        }
        while self.tool.event().await["event"] != "unregistered" {}
        assert_eq!(self.tool.end().await, (0, String::new()));
        assert!(!self.socket.exists());
    }
}

fn request(id: &str) -> NetworkServiceRequest {
    NetworkServiceRequest {
        connection: Some(Connection {
            id: id.to_owned(),
            network_service: "icmp-responder".to_owned(),
            path: Some(WirePath {
                index: 0,
                path_segments: vec![PathSegment {
                    name: "agent".to_owned(),
                    id: id.to_owned(),
                    ..PathSegment::default()
                }],
            }),
            ..Connection::default()
        }),
        mechanism_preferences: vec![Mechanism {
            cls: "LOCAL".to_owned(),
            r#type: "KERNEL".to_owned(),
            ..Mechanism::default()
        }],
    }
}

const LIFE: Duration = Duration::from_secs(600);

#[tokio::test]
async fn it_grants_tells_and_leaves_in_order() {
    let mut served = Served::start([]).await;
    let mut monitor = MonitorConnectionClient::new(served.channel.clone())
        .monitor_connections(MonitorScopeSelector::default())
        .await
        .unwrap()
        .into_inner();
    let mut heard = async || {
        let event = soon("an event", monitor.message()).await.unwrap();
        event.map(|event| (event.r#type(), event.connections.into_values().next()))
    };
    assert_eq!(
        heard().await,
        Some((ConnectionEventType::InitialStateTransfer, None))
    );

    let answer = served.ask("a", LIFE).await.unwrap();
    let ip = answer.context.clone().unwrap().ip_context.unwrap();
    assert_eq!(ip.src_ip_addrs, ["172.16.1.2/32", "fd00::2/128"]);
    assert_eq!(ip.dst_ip_addrs, ["172.16.1.1/32", "fd00::1/128"]);
    let path = answer.path.clone().unwrap();
    assert_eq!((path.index, path.path_segments.len()), (0, 2));
    assert_eq!(path.path_segments[1].name, "nse");
    let event = served.tool.expect("connected").await;
    assert_eq!(event["connection"]["id"], "a");
    let (kind, view) = heard().await.unwrap();
    assert_eq!(kind, ConnectionEventType::Update);
    assert_eq!(view.unwrap().id, path.path_segments[1].id);

    // A refresh is no news; another connection gets other addresses.
    assert_eq!(served.ask("a", LIFE).await.unwrap().context, answer.context);
    heard().await.unwrap();
    served.ask("b", LIFE).await.unwrap();
    served.tool.expect("connected").await;
    heard().await.unwrap();
    let mut client = NetworkServiceClient::new(served.channel.clone());
    for _ in 0..2 {
        client.close(answer.clone()).await.unwrap();
    }
    let event = served.tool.expect("closed").await;
    assert_eq!(
        (&event["id"], &event["reason"]),
        (&"a".into(), &"asked".into())
    );
    assert_eq!(heard().await.unwrap().0, ConnectionEventType::Delete);

    served.tool.signal(Signal::SIGTERM);
    assert_eq!(heard().await.unwrap().0, ConnectionEventType::Delete);
    assert_eq!(heard().await, None);
    served.tool.expect("unregistered").await;
    assert_eq!(served.tool.end().await, (0, String::new()));
    assert!(!served.socket.exists());
    let Call::Unregister(entry) = served.stage.call().await.0 else {
        panic!("not unregistered")
    };
    assert_eq!(entry.name, "nse");
}

#[tokio::test]
async fn what_is_not_refreshed_is_closed() {
    let mut served = Served::start([]).await;
    served.ask("a", Duration::from_millis(400)).await.unwrap();
    served.tool.expect("connected").await;
    let event = served.tool.expect("closed").await;
    assert_eq!(
        (&event["id"], &event["reason"]),
        (&"a".into(), &"expired".into())
    );
    // Its addresses are free again.
    let answer = served.ask("b", LIFE).await.unwrap();
    let ip = answer.context.unwrap().ip_context.unwrap();
    assert_eq!(ip.src_ip_addrs[0], "172.16.1.2/32");
    served.tool.expect("connected").await;
    served.end(Signal::SIGINT).await;
}

#[tokio::test]
async fn a_caller_without_a_token_is_refused() {
    let served = Served::start([]).await;
    let mut client = NetworkServiceClient::new(served.channel.clone());
    let status = client.request(request("a")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("nsm-client-token"), "{status}");
    let mut wrong = request("a");
    wrong.connection.as_mut().unwrap().network_service = "web".to_owned();
    let mut call = Request::new(wrong);
    TokenSource::hs256("spiffe://x/agent", b"insecure", LIFE).apply(call.metadata_mut());
    let status = client.request(call).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    served.end(Signal::SIGINT).await;
}

#[tokio::test]
async fn its_registration_is_refreshed_and_comes_back() {
    let short = Reply::Grant(Duration::from_millis(900));
    let mut served = Served::start([short]).await;
    // At two thirds of its life.
    let before = SystemTime::now();
    served.tool.expect("registered").await;
    assert!(before.elapsed().unwrap() < Duration::from_millis(900));
    let register = async |stage: &mut Stage| {
        while !matches!(stage.call().await.0, Call::Register(_)) {}
    };
    register(&mut served.stage).await;
    while !matches!(served.stage.call().await.0, Call::Watch(_)) {}
    // The registry is gone for a moment, and has forgotten us.
    served.stage.agent.end_streams();
    served.tool.expect("error").await;
    register(&mut served.stage).await;
    let event = served.tool.expect("registered").await;
    assert_eq!(event["again"], true);
    served.end(Signal::SIGINT).await;
}

/// A service is its operator's: an endpoint registers none that is there, and one that its registry has lost as it was.
#[tokio::test]
async fn the_matches_of_a_service_outlive_its_endpoints_and_its_registry() {
    let mut stage = Stage::new([Reply::Grant(Duration::from_millis(600))]);
    let operators = NetworkService {
        name: "icmp-responder".to_owned(),
        payload: "IP".to_owned(),
        matches: vec![Match {
            source_selector: [("app".to_owned(), "friend".to_owned())].into(),
            ..Match::default()
        }],
        ..NetworkService::default()
    };
    let mut longer = operators.clone();
    longer.name = "an-icmp-responder".to_owned();
    longer.matches.clear();
    stage.agent.has_service(longer);
    stage.agent.has_service(operators.clone());
    let dir = tempfile::tempdir().unwrap();
    let mut tool = endpoint(&stage, &dir.path().join("nse.sock"), &[]);
    // The first registration, and the one that refreshes it.
    for _ in 0..2 {
        let first = stage.call().await.0;
        assert!(matches!(first, Call::Register(_)), "{first:?}");
        tool.expect("registered").await;
        let watch = stage.call().await.0;
        assert!(matches!(watch, Call::Watch(_)), "{watch:?}");
    }
    stage.agent.forget_services();
    stage.agent.end_streams();
    let Call::RegisterService(service) = stage.call().await.0 else {
        panic!("the service does not come back")
    };
    assert_eq!(service, operators);
    tool.signal(Signal::SIGTERM);
    assert_eq!(tool.end().await.0, 0);
}

#[tokio::test]
async fn a_registry_that_refuses_ends_it() {
    let stage = Stage::new([Reply::Refuse(Status::permission_denied("not you"))]);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nse.sock");
    let tool = endpoint(&stage, &socket, &[]);
    let (code, error) = tool.end().await;
    assert_eq!(code, 1);
    assert!(
        error.contains("cannot register") && error.contains("not you"),
        "{error}"
    );
    assert!(!socket.exists());
}
