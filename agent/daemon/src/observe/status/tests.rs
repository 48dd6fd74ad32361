use nsm_proto::admin::{
    AddressFinding, Bpf, Bundle, Counters, DrainRequest, DrainResponse, Frames, Identity, Listener,
    PairedLink, PathHealth, Peer, PublicAddress, Tunnel, WayHealth,
    admin_server::{Admin, AdminServer},
};

use super::*;

fn full() -> Status {
    let connection = |id: &str, tunnel: Option<Tunnel>| ConnectionStatus {
        id: id.to_owned(),
        network_service: "icmp-responder@cluster-2.example".to_owned(),
        endpoint: "nse-1".to_owned(),
        state: "UP".to_owned(),
        path: ["nsc", "agent-1", "agent-2", "nse"]
            .map(str::to_owned)
            .to_vec(),
        expires_in_seconds: 599,
        client_mechanism: "KERNEL".to_owned(),
        endpoint_mechanism: "VXLAN".to_owned(),
        src_addresses: vec!["172.16.1.1/32".to_owned()],
        dst_addresses: vec!["172.16.1.0/32".to_owned(), "fd00::/128".to_owned()],
        mtu: 1450,
        tunnel,
        health: None,
        down_reason: String::new(),
        pair: Vec::new(),
    };
    let tunnel = Tunnel {
        vni: 4242,
        port: 4789,
        local: "10.0.0.1".to_owned(),
        remote: "203.0.113.2".to_owned(),
        interface: "nsm-1".to_owned(),
        netns: "file:///run/netns/pod".to_owned(),
        counters: Some(Counters {
            tx_packets: 20,
            tx_bytes: 2680,
            rx_packets: 19,
            rx_bytes: 2546,
            ..Counters::default()
        }),
        observed: None,
        link: Some(Counters {
            tx_packets: 21,
            rx_packets: 0,
            ..Counters::default()
        }),
    };
    let uncounted = Tunnel {
        counters: None,
        link: None,
        ..tunnel.clone()
    };
    Status {
        name: "node-1".to_owned(),
        domain: "cluster-1.example".to_owned(),
        version: "0.1.0".to_owned(),
        ready: true,
        waiting_for: Vec::new(),
        degraded: vec!["no probes: UDP port 4789 is in use".to_owned()],
        bpf: Some(Bpf {
            hook: "clsact".to_owned(),
            object_sha256: "0123456789abcdef".to_owned(),
            pin_path: "/sys/fs/bpf/proxy-nsmgr".to_owned(),
            interfaces: vec!["eth0".to_owned()],
            frames: Some(Frames {
                fast_out: 18,
                slow_out: 2,
                fast_in: 16,
                slow_in: 3,
            }),
        }),
        connections: vec![
            connection("11111111-aaaa", Some(tunnel)),
            connection("22222222-bbbb", Some(uncounted)),
            connection("33333333-cccc", None),
        ],
        peers: vec![Peer {
            url: "tcp://203.0.113.2:5006".to_owned(),
            state: "watched".to_owned(),
            connections: 2,
            state_for_ms: 61_000,
            spiffe_id: "spiffe://two.example/nsmgr".to_owned(),
        }],
        identity: Some(Identity {
            source: "the file /svid.pem".to_owned(),
            spiffe_id: "spiffe://one.example/agent".to_owned(),
            ends_in_seconds: 1800,
            bundles: vec![Bundle {
                trust_domain: "two.example".to_owned(),
                authorities: 2,
            }],
            ..Identity::default()
        }),
        dns: vec![
            DnsAnswer {
                domain: "cluster-2.example".to_owned(),
                answer: "203.0.113.2:5005".to_owned(),
                server: "192.0.2.53:53".to_owned(),
                age_ms: 1_500,
                expires_in_ms: 58_500,
                ..DnsAnswer::default()
            },
            DnsAnswer {
                domain: "nowhere.example".to_owned(),
                trouble: "no such domain".to_owned(),
                expires_in_ms: 5_000,
                ..DnsAnswer::default()
            },
        ],
        drops: [("wrong source".to_owned(), 3), ("malformed".to_owned(), 0)].into(),
        listeners: vec![Listener {
            role: "proxy".to_owned(),
            url: "tcp://0.0.0.0:5006".to_owned(),
        }],
        public_address: Some(PublicAddress {
            address: "203.0.113.1".to_owned(),
            source: "AWS metadata".to_owned(),
            local: "10.0.0.1".to_owned(),
            conflicts: vec![AddressFinding {
                source: "STUN stun.example:3478".to_owned(),
                address: "203.0.113.9".to_owned(),
                trouble: String::new(),
            }],
            sources: Vec::new(),
        }),
    }
}

#[test]
fn a_full_answer_is_shown_as_tables() {
    let expected = "\
node-1 of cluster-1.example, version 0.1.0: ready
  degraded: no probes: UDP port 4789 is in use
  bpf: clsact on eth0, maps in /sys/fs/bpf/proxy-nsmgr, object 01234567
  frames out: 18 fast, 2 slow; in: 16 fast, 3 slow
  public address: 203.0.113.1 (AWS metadata)
  conflict: 203.0.113.1 by AWS metadata, but 203.0.113.9 by STUN stun.example:3478
  identity: spiffe://one.example/agent, ends in 30m0s, from the file /svid.pem
  believed: two.example (2)
  proxy: tcp://0.0.0.0:5006

CONNECTIONS
  ID        SERVICE                           ENDPOINT  STATE  MECHANISM       CLIENT         SERVER                      MTU  EXPIRES  PATH
  11111111  icmp-responder@cluster-2.example  nse-1     UP     KERNEL → VXLAN  172.16.1.1/32  172.16.1.0/32, fd00::/128  1450    9m59s  nsc → agent-1 → agent-2 → nse
  22222222  icmp-responder@cluster-2.example  nse-1     UP     KERNEL → VXLAN  172.16.1.1/32  172.16.1.0/32, fd00::/128  1450    9m59s  nsc → agent-1 → agent-2 → nse
  33333333  icmp-responder@cluster-2.example  nse-1     UP     KERNEL → VXLAN  172.16.1.1/32  172.16.1.0/32, fd00::/128  1450    9m59s  nsc → agent-1 → agent-2 → nse

TUNNELS
  ID         VNI  PORT  LOCAL     REMOTE       INTERFACE  NETNS                  TX PACKETS  TX BYTES  RX PACKETS  RX BYTES
  11111111  4242  4789  10.0.0.1  203.0.113.2  nsm-1      file:///run/netns/pod          20      2680          19      2546
  22222222  4242  4789  10.0.0.1  203.0.113.2  nsm-1      file:///run/netns/pod           -         -           -         -

PEERS
  PEER                    STATE    CONNECTIONS  SPIFFE ID
  tcp://203.0.113.2:5006  watched            2  spiffe://two.example/nsmgr

DNS
  DOMAIN             ANSWER            BY             AGE  EXPIRES
  cluster-2.example  203.0.113.2:5005  192.0.2.53:53   1s      58s
  nowhere.example    no such domain    -               0s       5s

DROPS
  REASON        PACKETS
  wrong source        3
";
    assert_eq!(render(&full()), expected);
}

#[test]
fn the_ways_to_a_peer_are_shown_with_their_evidence() {
    let mut status = full();
    let way = |state: &str, reason: &str, last_heard_ms| WayHealth {
        state: state.to_owned(),
        reason: reason.to_owned(),
        last_heard_ms,
        reason_code: String::new(),
    };
    let health = PathHealth {
        state: "down".to_owned(),
        peer: "203.0.113.2".to_owned(),
        port: 4789,
        r#in: Some(way("down", "let UDP 4789 in", Some(171))),
        out: Some(way("unknown", "nothing comes back", Some(3200))),
        round_trip_p50_ns: Some(22_000),
        round_trip_p99_ns: Some(12_340_000),
        loss: Some(0.0523),
        path_mtu: Some(1450),
    };
    status.connections[0].health = Some(health);
    status.connections[1].health = Some(PathHealth {
        peer: "203.0.113.2".to_owned(),
        r#in: Some(way(
            "unverified",
            "the peer offers no S-BFD reflector",
            None,
        )),
        out: Some(way(
            "unverified",
            "the peer offers no S-BFD reflector",
            None,
        )),
        ..PathHealth::default()
    });
    let expected = "
PATHS
  ID        PEER         WAY  STATE        RTT P50  RTT P99   LOSS   MTU   HEARD  LINK PACKETS  UNDERLAY PACKETS  REASON
  11111111  203.0.113.2  out  unknown     0.022 ms  12.3 ms  5.2 %  1450   3.2 s            21                20  nothing comes back
  11111111  203.0.113.2  in   down        0.022 ms  12.3 ms  5.2 %  1450  171 ms             0                19  let UDP 4789 in
  22222222  203.0.113.2  out  unverified         -        -      -     -       -             -                 -  the peer offers no S-BFD reflector
  22222222  203.0.113.2  in   unverified         -        -      -     -       -             -                 -  the peer offers no S-BFD reflector

PEERS
";
    let text = render(&status);
    assert!(text.contains(expected), "{text}");
    // Without BPF the counters are the link's own: they prove nothing about the card.
    status.bpf = None;
    let text = render(&status);
    let line = text.lines().find(|line| line.contains(" in   down "));
    assert!(line.unwrap().contains("0                 -  let"), "{text}");
}

/// Under `prefer` a connection is granted without proof: `status` must show that.
#[test]
fn a_connection_whose_path_is_not_proved_is_marked() {
    let mut status = full();
    for (state, path, expected) in [
        ("UP", "up", "UP"),
        ("UP", "down", "UP, path down"),
        ("UP", "unknown", "UP, path unknown"),
        ("UP", "unverified", "UP, path unverified"),
        ("DOWN", "down", "DOWN"),
    ] {
        let connection = &mut status.connections[0];
        connection.state = state.to_owned();
        connection.health = Some(PathHealth {
            state: path.to_owned(),
            ..PathHealth::default()
        });
        let text = render(&status);
        assert!(text.contains(&format!("nse-1     {expected}  ")), "{text}");
    }
}

/// Names and endpoints are those of other domains, too.
#[test]
fn what_others_write_does_not_reach_the_terminal() {
    let mut status = full();
    status.connections[0].path[2] = "\u{1b}[31magent\n".to_owned();
    let text = render(&status);
    assert!(
        text.contains("nsc → agent-1 → \\u{1b}[31magent\\n → nse"),
        "{text}"
    );
}

#[test]
fn a_connection_that_is_down_is_shown_with_the_reason() {
    let mut status = full();
    let connection = &mut status.connections[1];
    connection.state = "DOWN".to_owned();
    connection.down_reason =
        "the agent of tcp://203.0.113.2:5006 is not heard any more; the path is good".to_owned();
    let expected = "
DOWN
  ID        REASON
  22222222  the agent of tcp://203.0.113.2:5006 is not heard any more; the path is good

TUNNELS
";
    let text = render(&status);
    assert!(text.contains(expected), "{text}");
}

#[test]
fn both_links_of_a_pair_are_shown() {
    let mut status = full();
    let link = |netns: &str, counters| PairedLink {
        interface: "nsm-1".to_owned(),
        netns: netns.to_owned(),
        counters,
        observed: None,
    };
    let counters = Counters {
        tx_packets: 20,
        tx_bytes: 1960,
        rx_packets: 19,
        rx_bytes: 1862,
        ..Counters::default()
    };
    status.connections.truncate(1);
    status.connections[0].tunnel = None;
    let ends = [
        link("inode://4/1", Some(counters)),
        link("inode://4/2", None),
    ];
    status.connections[0].pair = ends.into();
    let text = render(&status);
    let expected = "
TUNNELS: none

PAIRS
  ID        END       INTERFACE  NETNS        TX PACKETS  TX BYTES  RX PACKETS  RX BYTES
  11111111  client    nsm-1      inode://4/1          20      1960          19      1862
  11111111  endpoint  nsm-1      inode://4/2           -         -           -         -
";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn an_agent_that_has_nothing_says_so() {
    let status = Status {
        name: "node-1".to_owned(),
        domain: "cluster.local".to_owned(),
        version: "0.1.0".to_owned(),
        waiting_for: vec!["the proxy's listener".to_owned()],
        bpf: Some(Bpf {
            hook: "none".to_owned(),
            ..Bpf::default()
        }),
        ..Status::default()
    };
    let expected = "\
node-1 of cluster.local, version 0.1.0: NOT READY
  waiting for: the proxy's listener
  bpf: none

CONNECTIONS: none

TUNNELS: none

PEERS: none

DROPS: none
";
    assert_eq!(render(&status), expected);
}

#[test]
fn times_are_short() {
    assert_eq!(seconds(0), "0s");
    assert_eq!(seconds(60), "1m0s");
    assert_eq!(seconds(86399), "23h59m");
}

struct Fixed(Status);

#[tonic::async_trait]
impl Admin for Fixed {
    async fn get_status(
        &self,
        _: tonic::Request<StatusRequest>,
    ) -> Result<tonic::Response<Status>, tonic::Status> {
        Ok(tonic::Response::new(self.0.clone()))
    }

    async fn drain(
        &self,
        _: tonic::Request<DrainRequest>,
    ) -> Result<tonic::Response<DrainResponse>, tonic::Status> {
        Err(tonic::Status::unimplemented("this one goes on"))
    }
}

#[tokio::test]
async fn the_agent_is_asked_over_its_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let url = PeerUrl::unix(&path);

    let error = format!("{:#}", ask(&url).await.unwrap_err());
    assert!(
        error.contains("no agent is running") && error.contains("admin.sock"),
        "{error}"
    );

    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(AdminServer::new(Fixed(full())))
        .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener));
    let server = tokio::spawn(server);
    assert_eq!(ask(&url).await.unwrap(), full());
    server.abort();
    let _ = server.await;

    let error = format!("{:#}", ask(&url).await.unwrap_err());
    assert!(error.contains("not running any more"), "{error}");
}

/// Some 1 KiB a connection, more than gRPC reads unasked.
#[tokio::test]
async fn a_node_with_ten_thousand_connections_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let mut status = full();
    let mut connection = status.connections[0].clone();
    connection.endpoint = "nse".repeat(200);
    status.connections = vec![connection; 10_000];
    let server = tonic::transport::Server::builder()
        .add_service(AdminServer::new(Fixed(status)))
        .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener));
    let server = tokio::spawn(server);
    let answer = ask(&PeerUrl::unix(&path)).await.unwrap();
    assert_eq!(answer.connections.len(), 10_000);
    server.abort();
}

#[tokio::test]
async fn a_socket_of_something_else_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let server = tonic::transport::Server::builder()
        .add_routes(tonic::service::Routes::default())
        .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener));
    let server = tokio::spawn(server);
    let error = ask(&PeerUrl::unix(&path)).await.unwrap_err().to_string();
    assert!(error.contains("serves no admin API"), "{error}");
    server.abort();
}
