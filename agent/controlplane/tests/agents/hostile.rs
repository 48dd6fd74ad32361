//! Peers that do wrong: refuse, stay silent, answer nonsense.

use std::{
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use nsm_controlplane::ports::Plan;
use nsm_core::address::ipmap::IpMap;
use nsm_proto::{connection::Connection, connectioncontext::Route};
use tokio::net::TcpListener;
use tonic::{Code, Status};

use crate::support::{
    Client, World, assert_refusal, client_side, endpoint_side, eventually, mechanism,
};

const SERVICE: &str = "svc@peer.example";
const HONEST: &str = "icmp-responder@cluster-2.example";

fn segments(connection: &mut Connection) -> &mut Vec<nsm_proto::connection::PathSegment> {
    &mut connection.path.as_mut().expect("a path").path_segments
}

fn set(mut connection: Connection, key: &str, value: &str) -> Result<Connection, Status> {
    let parameters = &mut connection.mechanism.as_mut().expect("one").parameters;
    parameters.insert(key.to_owned(), value.to_owned());
    Ok(connection)
}

fn ip(connection: &mut Connection) -> &mut nsm_proto::connectioncontext::IpContext {
    let context = connection.context.as_mut().expect("a context");
    context.ip_context.as_mut().expect("addresses")
}

/// A wrong answer names the peer and what is wrong; what it granted is given back.
#[tokio::test]
async fn wrong_answers() {
    type Twist = fn(Connection) -> Result<Connection, Status>;
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let cases: &[(&str, Twist, &[&str])] = &[
        (
            "another id",
            |mut it| {
                it.id = "mine".into();
                Ok(it)
            },
            &["`mine`"],
        ),
        (
            "no path",
            |mut it| {
                it.path = None;
                Ok(it)
            },
            &["path"],
        ),
        (
            "a lost segment",
            |mut it| {
                segments(&mut it).truncate(1);
                Ok(it)
            },
            &["1 path segments", "first 2"],
        ),
        (
            "65 segments",
            |mut it| {
                segments(&mut it).resize_with(65, Default::default);
                Ok(it)
            },
            &["65 segments"],
        ),
        (
            "another index",
            |mut it| {
                it.path.as_mut().expect("one").index = 2;
                Ok(it)
            },
            &["path.index 2, 1 was sent"],
        ),
        (
            "another name for us",
            |mut it| {
                segments(&mut it)[1].name = "you".into();
                Ok(it)
            },
            &["you", "agent-1"],
        ),
        (
            "another id for the client",
            |mut it| {
                segments(&mut it)[0].id = "0".into();
                Ok(it)
            },
            &["the id 0"],
        ),
        (
            "no mechanism",
            |mut it| {
                it.mechanism = None;
                Ok(it)
            },
            &["no mechanism", "REMOTE VXLAN"],
        ),
        (
            "a mechanism nobody offered",
            |mut it| {
                it.mechanism = Some(mechanism("REMOTE", "WIREGUARD", &[]));
                Ok(it)
            },
            &["WIREGUARD", "VXLAN"],
        ),
        ("no VNI", |it| set(it, "vni", ""), &["lacks vni"]),
        (
            "no address",
            |it| set(it, "dst_ip", ""),
            &["lacks", "dst_ip"],
        ),
        ("VNI 0", |it| set(it, "vni", "0"), &["vni = `0`"]),
        (
            "VNI of 25 bits",
            |it| set(it, "vni", "16777216"),
            &["vni = `16777216`"],
        ),
        (
            "a bad address",
            |it| set(it, "dst_ip", "there"),
            &["dst_ip = `there`"],
        ),
        (
            "everyone's address",
            |it| set(it, "dst_ip", "255.255.255.255"),
            &["255.255.255.255"],
        ),
        (
            "a bad port",
            |it| set(it, "dst_port", "-1"),
            &["dst_port = `-1`"],
        ),
        (
            "another service's port",
            |it| set(it, "dst_port", "53"),
            &["dst_port = `53`", "tunnel.peer_ports"],
        ),
        (
            "our loopback",
            |it| set(it, "dst_ip", "127.0.0.1"),
            &["dst_ip = `127.0.0.1`"],
        ),
        (
            "our own address",
            |it| set(it, "dst_ip", "192.0.2.1"),
            &["dst_ip = `192.0.2.1`", "would send to it"],
        ),
        ("a bad MTU", |it| set(it, "MTU", "much"), &["MTU = `much`"]),
        (
            "a bad client address",
            |mut it| {
                ip(&mut it).src_ip_addrs = vec!["172.16.0.1/33".into()];
                Ok(it)
            },
            &["src_ip_addrs", "172.16.0.1/33"],
        ),
        (
            "a bad route",
            |mut it| {
                ip(&mut it).src_routes = vec![Route {
                    prefix: "all".into(),
                    ..Route::default()
                }];
                Ok(it)
            },
            &["src_routes", "all"],
        ),
        (
            "a bad MAC",
            |mut it| {
                let context = it.context.as_mut().expect("a context");
                context.ethernet_context.as_mut().expect("MACs").dst_mac = "zz".into();
                Ok(it)
            },
            &["dst_mac", "zz"],
        ),
    ];
    for (what, twist, words) in cases {
        peer.twist(*twist);
        let status = match client.send(client.request_for(SERVICE)).await {
            Err(status) => status,
            Ok(granted) => panic!("{what}: {granted:?}"),
        };
        assert_eq!(status.code(), Code::Internal, "{what}: {status:?}");
        for word in [peer.url.as_str(), "answered Request wrongly"]
            .iter()
            .chain(*words)
        {
            let message = status.message();
            assert!(message.contains(word), "{what}: `{word}` in `{message}`");
        }
        world.settles(&before).await;
    }
    assert_eq!(peer.closes().len(), cases.len());
    // Its refusals are passed on, with its name.
    for code in [Code::PermissionDenied, Code::NotFound, Code::Unknown] {
        peer.twist(match code {
            Code::PermissionDenied => |_| Err(Status::permission_denied("not you")),
            Code::NotFound => |_| Err(Status::not_found("not you")),
            _ => |_| Err(Status::unknown("not you")),
        });
        let status = client.refused(client.request_for(SERVICE)).await;
        assert_refusal(&status, code, &[&peer.url, "refused Request", "not you"]);
    }
    world.settles(&before).await;
    // Whatever it says fits into what an answer can carry.
    peer.twist(|_| Err(Status::aborted("ä long story ".repeat(200))));
    let status = client.refused(client.request_for(SERVICE)).await;
    assert_refusal(&status, Code::Aborted, &[&peer.url, "ä long story", "…"]);
    assert!(status.message().len() < 3000);
    world.settles(&before).await;
    // An answer too large to be read tells of a connection all the same: it is given back.
    let closed = peer.closes().len();
    peer.twist(|mut it| {
        it.labels.insert("much".into(), "x".repeat(1 << 20));
        Ok(it)
    });
    let status = client.refused(client.request_for(SERVICE)).await;
    assert_refusal(&status, Code::OutOfRange, &[&peer.url, "too large"]);
    eventually(closed + 1, || peer.closes().len()).await;
    world.settles(&before).await;
}

/// Behind a gateway the node's own address is the public one, too: no interface has it, and packets to it come back.
#[tokio::test]
async fn a_tunnel_does_not_end_at_our_public_address() {
    let world = World::two().await;
    let [a, b] = world.agents();
    for (agent, internal, public) in [(a, 1, 101), (b, 2, 102)] {
        let at = |last: u8| IpAddr::from([192, 0, 2, last]);
        let map = IpMap::from_pairs([(at(internal), at(public))]);
        agent.plane.set_ip_map(map.expect("a map"));
    }
    let peer = world.foreign_domain("peer.example", "svc").await;
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    peer.twist(|it| set(it, "dst_ip", "192.0.2.101"));
    let status = client.refused(client.request_for(SERVICE)).await;
    let words = ["dst_ip = `192.0.2.101`", "would send to it"];
    assert_refusal(&status, Code::Internal, &words);
    world.settles(&before).await;

    // The same the other way round: a client that claims to be where the endpoint's node is.
    let stranger = Client::over_network(b).await;
    let mut request = stranger.request_for("icmp-responder");
    let parameters = [("src_ip", "192.0.2.102"), ("src_port", "4789")];
    request.mechanism_preferences = vec![mechanism("REMOTE", "VXLAN", &parameters)];
    let status = stranger.refused(request).await;
    let words = ["src_ip = `192.0.2.102`", "would send to it"];
    assert_refusal(&status, Code::InvalidArgument, &words);
    world.settles(&before).await;
}

/// What an endpoint names and may not have is not given to it with the Close that undoes its answer.
#[tokio::test]
async fn a_refused_namespace_is_not_opened_for_the_endpoint() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let endpoint = world.endpoint(a, "nse-1", "local").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    endpoint.twist(|it| {
        let own = std::fs::metadata("/proc/self/ns/net").expect("our namespace");
        let url = format!("inode://{}/{}", own.dev(), own.ino());
        set(it, "inodeURL", &url)
    });
    let status = client.refused(client.request_for("local")).await;
    assert_refusal(&status, Code::Internal, &[&endpoint.url, "the node's own"]);
    eventually(1, || endpoint.closes().len()).await;
    assert_eq!(a.kernel().opened(), []);
    world.settles(&before).await;

    // The undo of a connection that stood returns its namespace, although the endpoint has not passed one.
    endpoint.mend();
    let granted = client.ask("local").await;
    let Plan::Pair { endpoint: pod, .. } = a.kernel().only().plan else {
        panic!("no pair: {:?}", a.kernel().only());
    };
    client.close(&granted.connection).await.expect("closed");
    assert_eq!(a.kernel().opened(), [pod.netns.url]);
    world.settles(&before).await;
}

/// A refresh that is answered wrongly leaves what stood.
#[tokio::test]
async fn a_wrong_answer_to_a_refresh_leaves_what_stood() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    eventually(1, || peer.monitors()).await;
    let (held, links) = (world.held(), a.kernel().links());
    peer.twist(|mut it| {
        it.mechanism = None;
        Ok(it)
    });
    let status = client.refresh(&granted).await.expect_err("wrong");
    assert_refusal(&status, Code::Internal, &["no mechanism"]);
    assert_eq!((world.held(), a.kernel().links()), (held, links));
    assert!(peer.closes().is_empty());
    peer.mend();
    client.refresh(&granted).await.expect("refreshed");
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}

#[tokio::test]
async fn peers_and_registries_that_stay_silent_are_waited_for_no_longer_than_asked() {
    let timeout = Duration::from_millis(500);
    let world = World::of([client_side().request_timeout(timeout), endpoint_side()]).await;
    let [a, b] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let mute = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mute_url = format!("tcp://{}", mute.local_addr().expect("bound"));
    let holding = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = mute.accept().await {
            kept.push(stream);
        }
    });
    world.publish("mute.example", &mute_url);
    let before = world.held();
    let client = Client::on_node(a).await;
    peer.hold(true);
    endpoint.hold(true);
    for (service, url, method) in [
        ("svc@mute.example", mute_url.as_str(), "Find"),
        (SERVICE, peer.url.as_str(), "Request"),
        (HONEST, b.url.as_str(), "Request"),
    ] {
        let began = Instant::now();
        let status = client.refused(client.request_for(service)).await;
        let words = [url, method, "did not answer within"];
        assert_refusal(&status, Code::DeadlineExceeded, &words);
        let took = began.elapsed();
        assert!(
            (timeout..8 * timeout).contains(&took),
            "{service}: {took:?}"
        );
    }
    // The caller's own limit counts when it is shorter.
    let mut call = client.call(client.request_for(SERVICE));
    call.set_timeout(Duration::from_millis(50));
    let began = Instant::now();
    client.send_call(call).await.expect_err("too late");
    assert!(began.elapsed() < timeout, "{:?}", began.elapsed());
    // What they did after all is undone.
    peer.hold(false);
    endpoint.hold(false);
    world.settles(&before).await;
    assert!(!peer.closes().is_empty());
    holding.abort();
}

/// Nobody waits for the dials of others.
#[tokio::test]
async fn callers_of_a_host_that_swallows_everything_do_not_queue_up() {
    let timeout = Duration::from_millis(400);
    let world = World::of([client_side().dial_timeout(timeout)]).await;
    let [a] = world.agents();
    // A listener whose queue is full: the kernel drops what else comes.
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket
        .bind("127.0.0.1:0".parse().expect("an address"))
        .expect("bound");
    let full = socket.listen(1).expect("listening");
    let address = full.local_addr().expect("bound");
    let mut fillers = Vec::new();
    while let Ok(filler) = tokio::time::timeout(
        Duration::from_millis(200),
        tokio::net::TcpStream::connect(address),
    )
    .await
    {
        fillers.push(filler);
    }
    world.publish("full.example", &format!("tcp://{address}"));
    let before = world.held();
    let client = Client::on_node(a).await;
    let began = Instant::now();
    let refused = (0..8).map(|_| client.refused(client.request_for("svc@full.example")));
    for status in futures_util::future::join_all(refused).await {
        let words = ["cannot connect", &address.to_string()];
        assert_refusal(&status, Code::Unavailable, &words);
    }
    assert!(began.elapsed() < 5 * timeout, "{:?}", began.elapsed());
    world.settles(&before).await;
}

/// An endpoint of this node must not reach into other namespaces by naming their path.
#[tokio::test]
async fn an_endpoint_that_names_a_path_must_be_root() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    endpoint.twist(|it| set(it, "inodeURL", "file:///run/netns/pod"));
    let before = world.held();
    let client = Client::on_node(a).await;
    let outcome = client.send(client.request_for(HONEST)).await;
    // These tests run as root or not, and so does their endpoint.
    let is_root = std::fs::metadata("/proc/self/ns")
        .is_ok_and(|it| std::os::unix::fs::MetadataExt::uid(&it) == 0);
    match outcome {
        Ok(granted) if is_root => {
            client.close(&granted.connection).await.expect("closed");
        }
        Err(status) if !is_root => {
            assert_refusal(&status, Code::Internal, &["/run/netns/pod", "as root"]);
        }
        other => panic!("root: {is_root}, {other:?}"),
    }
    world.settles(&before).await;
}
