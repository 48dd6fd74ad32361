//! The agent as an operator handles it: what it serves beside NSM, what it hears, how it ends.
//! Without the forwarder role it needs no root.

use std::{net::TcpListener, path::Path, process::Stdio, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nsm_controlplane::transport::dial::dial;
use nsm_proto::networkservice::{
    NetworkServiceRequest, network_service_client::NetworkServiceClient,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStderr},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::support::{PATIENCE, command, soon};

/// An agent's process and its log.
pub(crate) struct Agent {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
}

impl Agent {
    pub(crate) async fn start(config: &Path) -> Self {
        let mut child = command(&["agent", "--config", config.to_str().unwrap()])
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut agent = Self { child, log };
        agent.says("the agent serves").await;
        agent
    }

    /// Reads the log up to a line with these words.
    async fn says(&mut self, words: &str) -> String {
        soon(words, async {
            while let Some(line) = self.log.next_line().await.unwrap() {
                if line.contains(words) {
                    return line;
                }
            }
            panic!("the log ended without: {words}")
        })
        .await
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }
}

pub(crate) fn config(folder: &Path, ports: [u16; 2], more: &str) -> String {
    let folder = folder.display();
    let [proxy, registry] = ports;
    format!(
        "name: node-1\nforwarder: false\nmap_ip_file: {folder}/map-ip.yaml\n\
         public_address: {{metadata: 'off', kubernetes: 'off'}}\n\
         listen:\n  metrics: 'off'\n  nsmgr: unix://{folder}/nsm.sock\n  \
         admin: unix://{folder}/admin.sock\n  proxy: tcp://127.0.0.1:{proxy}\n  registry: tcp://127.0.0.1:{registry}\n{more}\n"
    )
}

/// Ports that are free now; the agent refuses port 0.
pub(crate) fn free_ports() -> [u16; 2] {
    let listeners = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

#[tokio::test]
async fn health_reflection_reload_and_drain() {
    let folder = tempfile::tempdir().unwrap();
    let (file, map) = (
        folder.path().join("config.yaml"),
        folder.path().join("map-ip.yaml"),
    );
    let ports = free_ports();
    let write = |more: &str| std::fs::write(&file, config(folder.path(), ports, more)).unwrap();
    write("domain: one.example");
    std::fs::write(&map, "").unwrap();
    let mut agent = Agent::start(&file).await;

    let socket = format!("unix://{}/nsm.sock", folder.path().display());
    let proxy = format!("tcp://127.0.0.1:{}", ports[0]);
    for url in [&socket, &proxy] {
        let channel = dial(&url.parse().unwrap(), PATIENCE).await.unwrap();
        let mut health = HealthClient::new(channel.clone());
        soon("SERVING", async {
            for service in ["", "networkservice.NetworkService"] {
                let service = service.to_owned();
                loop {
                    let request = HealthCheckRequest {
                        service: service.clone(),
                    };
                    let answer = health.check(request).await;
                    if answer
                        .is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving)
                    {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        })
        .await;
        let served = services(ServerReflectionClient::new(channel)).await;
        for service in [
            "networkservice.NetworkService",
            "connection.MonitorConnection",
            "registry.NetworkServiceRegistry",
            "grpc.health.v1.Health",
        ] {
            assert!(served.iter().any(|name| name == service), "{served:?}");
        }
    }

    std::fs::write(&map, "10.0.0.1: 203.0.113.1\n").unwrap();
    agent.says("took over the IP map").await;
    std::fs::write(&map, "10.0.0.1: nowhere\n").unwrap();
    let refused = agent.says("the IP map stays as it was").await;
    assert!(refused.contains("nowhere"), "{refused}");

    write("domain: two.example\nlog: {level: debug}");
    agent.signal(Signal::SIGHUP);
    let restart = agent.says("need a restart").await;
    assert!(restart.contains("domain"), "{restart}");
    let reloaded = agent.says("reloaded").await;
    assert!(reloaded.contains("log.level"), "{reloaded}");
    write("domian: three.example");
    agent.signal(Signal::SIGHUP);
    let refused = agent.says("is not reloaded").await;
    assert!(refused.contains("domian"), "{refused}");

    agent.signal(Signal::SIGTERM);
    let status = soon("the agent's end", agent.child.wait()).await.unwrap();
    assert_eq!(status.code(), Some(0));
    for socket in ["nsm.sock", "admin.sock"] {
        assert!(
            !folder.path().join(socket).exists(),
            "{socket} stays behind"
        );
    }
}

/// The services that reflection lists.
async fn services(mut client: ServerReflectionClient<tonic::transport::Channel>) -> Vec<String> {
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let answer = soon("reflection", answers.message())
        .await
        .unwrap()
        .unwrap();
    match answer.message_response {
        Some(MessageResponse::ListServicesResponse(list)) => list
            .service
            .into_iter()
            .map(|service| service.name)
            .collect(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_with_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let [other, _] = free_ports();
    std::fs::write(&file, config(folder.path(), [port, other], "")).unwrap();
    let (code, _, said) = crate::support::run(&["agent", "--config", file.to_str().unwrap()]).await;
    assert_eq!(code, 1);
    assert!(
        said.contains(&format!("tcp://127.0.0.1:{port}")) && said.contains("listen.proxy"),
        "{said}"
    );
}

#[tokio::test]
async fn sources_that_differ_about_the_public_address_are_told_with_both_values() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    // A STUN server that sees us as 192.0.2.9, in XOR-MAPPED-ADDRESS.
    let stun = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let server = stun.local_addr().unwrap();
    tokio::spawn(async move {
        let mut request = [0; 20];
        while let Ok((_, from)) = stun.recv_from(&mut request).await {
            let mut answer = vec![1, 1, 0, 12];
            answer.extend(&request[4..]);
            answer.extend([0, 0x20, 0, 8, 0, 1, 0, 0]);
            answer.extend((0xc000_0209u32 ^ 0x2112_a442).to_be_bytes());
            stun.send_to(&answer, from).await.unwrap();
        }
    });
    std::fs::write(folder.path().join("map-ip.yaml"), "").unwrap();
    let text = config(folder.path(), free_ports(), "domain: one.example").replace(
        "public_address: {",
        &format!("public_address: {{ip: 203.0.113.7, stun: '{server}', "),
    );
    std::fs::write(&file, text).unwrap();
    let _agent = Agent::start(&file).await;
    let admin = format!("unix://{}/admin.sock", folder.path().display());
    let words = [
        "public address: 203.0.113.7 (configuration)".to_owned(),
        format!("conflict: 203.0.113.7 by configuration, but 192.0.2.9 by STUN {server}"),
    ];
    soon("the conflict in `status`", async {
        loop {
            let (code, table, said) = crate::support::run(&["status", "--admin", &admin]).await;
            assert_eq!(code, 0, "{said}");
            if words.iter().all(|words| table.contains(words)) {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn metrics_are_served_in_the_text_that_prometheus_reads() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    let ([metrics, _], ports) = (free_ports(), free_ports());
    std::fs::write(folder.path().join("map-ip.yaml"), "").unwrap();
    let text = config(folder.path(), ports, "domain: one.example").replace(
        "metrics: 'off'",
        &format!("metrics: 'tcp://127.0.0.1:{metrics}'"),
    );
    std::fs::write(&file, text).unwrap();
    let _agent = Agent::start(&file).await;
    let ask = async |head: &str| {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", metrics))
            .await
            .unwrap();
        let request = format!("{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        soon("an answer", stream.read_to_string(&mut answer))
            .await
            .unwrap();
        answer
    };
    let proxy = format!("tcp://127.0.0.1:{}", ports[0]).parse().unwrap();
    let proxy = dial(&proxy, PATIENCE).await;
    let refused = NetworkServiceClient::new(proxy.unwrap())
        .request(NetworkServiceRequest::default())
        .await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::InvalidArgument);
    let page = ask("GET /metrics").await;
    assert!(page.starts_with("HTTP/1.1 200 OK"), "{page}");
    assert!(page.contains("application/openmetrics-text; version=1.0.0"));
    assert!(page.trim_end().ends_with("# EOF"), "{page}");
    for line in [
        "# TYPE proxy_nsmgr_build info",
        "# TYPE proxy_nsmgr_request_duration_seconds histogram",
        "proxy_nsmgr_request_duration_seconds_count{code=\"InvalidArgument\"} 1",
        "proxy_nsmgr_connections{state=\"UP\"} 0",
        "proxy_nsmgr_connections{state=\"DOWN\"} 0",
        "proxy_nsmgr_registry_endpoints 0",
        "proxy_nsmgr_public_address_conflicts 0",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\n{page}");
    }
    assert!(ask("GET /").await.starts_with("HTTP/1.1 404"));
    assert!(ask("POST /metrics").await.starts_with("HTTP/1.1 405"));
    assert!(!ask("HEAD /metrics").await.contains("# EOF"));
    assert!(ask("nonsense").await.starts_with("HTTP/1.1 400"));
}
