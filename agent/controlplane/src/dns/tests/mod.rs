//! The resolver against DNS servers on loopback.

mod messages;
mod server;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use hickory_server::net::xfer::Protocol;
use tokio::net::{TcpListener, UdpSocket};

use self::server::{DnsServer, Fault, Zone};
use super::*;

const X: &str = "cluster-2.example";
const REGISTRY: &str = "registry.nsm-system.cluster-2.example";
const PROXY: &str = "nsmgr-proxy.nsm-system.cluster-2.example";

fn domain(text: &str) -> Domain {
    text.parse().unwrap()
}

fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn config(servers: &[SocketAddr]) -> ResolverConfig {
    ResolverConfig {
        servers: servers.to_vec(),
        ..ResolverConfig::default()
    }
}

fn resolver(server: &DnsServer) -> Resolver {
    Resolver::new(config(&[server.address]))
}

/// Lets the resolver's time pass, and only its.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// A server that is given garbage to say.
async fn garbage_server() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let listener = TcpListener::bind(address).await;
    tokio::spawn(async move {
        // Accepted and closed: TCP is no better.
        let Ok(listener) = listener else { return };
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream);
        }
    });
    tokio::spawn(async move {
        let mut question = [0; 512];
        while let Ok((_, from)) = socket.recv_from(&mut question).await {
            // The id is right, the rest says 65535 questions and has none.
            let mut answer = vec![question[0], question[1]];
            answer.extend([0xff; 30]);
            let _ = socket.send_to(&answer, from).await;
        }
    });
    address
}

#[tokio::test]
async fn service_records_are_honoured_with_target_and_port() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 7001, "gw.cluster-2.example")
        .srv(PROXY, 30, 0, 7002, "gw.cluster-2.example")
        .a("gw.cluster-2.example", 30, "192.0.2.2")
        .a(X, 30, "192.0.2.99")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:7001"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.2:7002"]));
    assert_eq!(found.question, format!("SRV {REGISTRY}"));
    assert_eq!(
        found.answer,
        "registry 192.0.2.2:7001, proxy 192.0.2.2:7002"
    );
    assert_eq!(found.server, server.address.to_string());
    assert!(!found.cached);
}

#[tokio::test]
async fn addresses_that_come_with_service_records_are_not_asked_for() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 5005, "gw.cluster-2.example")
        .srv(PROXY, 30, 0, 5006, "gw.cluster-2.example")
        .additional_a(REGISTRY, "gw.cluster-2.example", 30, "192.0.2.2")
        .additional_a(PROXY, "gw.cluster-2.example", 30, "192.0.2.2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.2:5006"]));
    assert_eq!(server.asked("gw.cluster-2.example", RecordType::A), 0);
}

#[tokio::test]
async fn service_records_are_ordered_by_priority() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 20, 1, "b.cluster-2.example")
        .srv(REGISTRY, 30, 10, 2, "a.cluster-2.example")
        .srv(REGISTRY, 30, 30, 3, "missing.cluster-2.example")
        .srv(PROXY, 30, 0, 5006, "a.cluster-2.example")
        .aaaa("a.cluster-2.example", 30, "2001:db8::1")
        .a("a.cluster-2.example", 30, "192.0.2.1")
        .a("b.cluster-2.example", 30, "192.0.2.2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    let wanted = addresses(&["192.0.2.1:2", "[2001:db8::1]:2", "192.0.2.2:1"]);
    assert_eq!(found.registry, wanted);
}

#[tokio::test]
async fn a_service_without_record_is_at_the_address_of_the_domain() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 7001, "gw.cluster-2.example")
        .a("gw.cluster-2.example", 30, "192.0.2.2")
        .a(X, 30, "192.0.2.99")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:7001"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.99:5006"]));
}

#[tokio::test]
async fn a_domain_with_an_address_only_has_the_default_ports() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .aaaa(X, 30, "2001:db8::2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    let registry = addresses(&["192.0.2.2:5005", "[2001:db8::2]:5005"]);
    assert_eq!(found.registry, registry);
    let proxy = addresses(&["192.0.2.2:5006", "[2001:db8::2]:5006"]);
    assert_eq!(found.proxy, proxy);
    assert_eq!(found.question, format!("A {X}"));
}

#[tokio::test]
async fn an_address_does_not_wait_for_one_of_the_other_family() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .fault(X, RecordType::AAAA, Fault::Silent)
        .serve()
        .await;
    let start = Clock::now();
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
}

#[tokio::test]
async fn an_alias_is_followed() {
    let server = Zone::new()
        .cname(X, 30, "gw.cluster-2.example")
        .a("gw.cluster-2.example", 30, "192.0.2.2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
}

#[tokio::test]
async fn a_domain_may_have_a_registry_and_no_proxy() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 5005, "gw.cluster-2.example")
        .a("gw.cluster-2.example", 30, "192.0.2.2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    assert_eq!(found.proxy, []);
    assert_eq!(found.answer, "registry 192.0.2.2:5005, no proxy");
}

#[tokio::test]
async fn a_service_that_is_not_offered_is_told_so() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 0, ".")
        .a(X, 30, "192.0.2.2")
        .serve()
        .await;
    let error = resolver(&server).resolve(&domain(X)).await.unwrap_err();
    assert!(matches!(error, ResolveError::NotOffered { .. }), "{error}");
}

#[tokio::test]
async fn addresses_need_no_question() {
    // Nothing listens there: a question would fail.
    let resolver = Resolver::new(config(&addresses(&["127.0.0.1:1"])));
    let found = resolver.resolve(&domain("192.0.2.1:6000")).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.1:6000"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.1:6000"]));
    let found = resolver.resolve(&domain("192.0.2.1")).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.1:5005"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.1:5006"]));
    let found = resolver.resolve(&domain("[2001:db8::1]:6000")).await;
    assert_eq!(found.unwrap().registry, addresses(&["[2001:db8::1]:6000"]));
}

#[tokio::test]
async fn configured_hosts_come_first_and_are_replaced_by_a_reload() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .a("gw.example", 30, "192.0.2.7")
        .serve()
        .await;
    let mut config = config(&[server.address]);
    let entry = |registry: &str, proxy: &str| HostEntry {
        registry: registry.parse().unwrap(),
        proxy: proxy.parse().unwrap(),
    };
    config
        .hosts
        .insert(domain(X), entry("198.51.100.1", "198.51.100.2:7002"));
    config.hosts.insert(
        domain("cluster-3.example"),
        entry("gw.example", "gw.example:7002"),
    );
    let resolver = Resolver::new(config.clone());

    let found = resolver.resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["198.51.100.1:5005"]));
    assert_eq!(found.proxy, addresses(&["198.51.100.2:7002"]));
    assert_eq!(server.questions(), 0);

    let by_name = resolver.resolve(&domain("cluster-3.example")).await;
    let by_name = by_name.unwrap();
    assert_eq!(by_name.registry, addresses(&["192.0.2.7:5005"]));
    assert_eq!(by_name.proxy, addresses(&["192.0.2.7:7002"]));
    assert_eq!(by_name.question, "A gw.example");

    config.hosts.clear();
    resolver.reload(config);
    let found = resolver.resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    let gone = resolver.resolve(&domain("cluster-3.example")).await;
    assert!(matches!(gone, Err(ResolveError::NoDomain { .. })));
}

#[tokio::test]
async fn a_domain_that_does_not_exist_names_question_and_server() {
    let server = Zone::new().serve().await;
    let error = resolver(&server).resolve(&domain(X)).await.unwrap_err();
    let ResolveError::NoDomain {
        question,
        server: by,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!(*question, format!("A {X}"));
    assert_eq!(*by, server.address.to_string());
    assert!(error.to_string().contains("NXDOMAIN"), "{error}");
}

#[tokio::test]
async fn nothing_is_waited_for_once_a_name_does_not_exist_or_a_server_fails() {
    let nowhere = Zone::new().fault(X, RecordType::AAAA, Fault::Silent);
    let failing = Zone::new().fault_all(X, Fault::Silent).fault(
        REGISTRY,
        RecordType::SRV,
        Fault::Code(ResponseCode::ServFail),
    );
    for zone in [nowhere, failing] {
        let server = zone.serve().await;
        let start = Clock::now();
        resolver(&server).resolve(&domain(X)).await.unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

#[tokio::test]
async fn a_name_without_addresses_is_told_from_one_that_does_not_exist() {
    let server = Zone::new()
        .a("other.cluster-2.example", 30, "192.0.2.1")
        .serve()
        .await;
    let error = resolver(&server).resolve(&domain(X)).await.unwrap_err();
    assert!(matches!(error, ResolveError::NoAddress { .. }), "{error}");
}

#[tokio::test]
async fn an_error_of_the_server_is_reported_without_delay() {
    for (code, text) in [
        (ResponseCode::ServFail, "SERVFAIL"),
        (ResponseCode::Refused, "REFUSED"),
    ] {
        let server = Zone::new().fault_all(X, Fault::Code(code)).serve().await;
        let start = Clock::now();
        let error = resolver(&server).resolve(&domain(X)).await.unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(1));
        assert!(
            matches!(error, ResolveError::ServerFailed { .. }),
            "{error}"
        );
        let told = error.to_string();
        assert!(told.contains(text), "{told}");
        assert!(told.contains(&server.address.to_string()), "{told}");
        assert!(told.contains("cluster-2.example"), "{told}");
        assert_eq!(server.asked_by(Protocol::Tcp), 0);
    }
}

#[tokio::test]
async fn a_failed_service_question_does_not_fall_back_to_default_ports() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .fault(
            REGISTRY,
            RecordType::SRV,
            Fault::Code(ResponseCode::ServFail),
        )
        .serve()
        .await;
    let error = resolver(&server).resolve(&domain(X)).await.unwrap_err();
    let told = error.to_string();
    assert!(told.contains(&format!("SRV {REGISTRY}")), "{told}");
}

#[tokio::test]
async fn a_silent_server_is_named_when_the_time_is_over() {
    let server = Zone::new().fault_all(X, Fault::Silent).serve().await;
    let mut config = config(&[server.address]);
    config.timeout = Duration::from_millis(600);
    let start = Clock::now();
    let error = Resolver::new(config).resolve(&domain(X)).await.unwrap_err();
    let took = start.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(matches!(error, ResolveError::Timeout { .. }), "{error}");
    let told = error.to_string();
    assert!(told.contains(&server.address.to_string()), "{told}");
    assert!(told.contains("600 ms"), "{told}");
    assert!(told.contains(X), "{told}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unreachable_at_once() {
    let free = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let start = Clock::now();
    let resolver = Resolver::new(config(&[address]));
    let error = resolver.resolve(&domain(X)).await.unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(matches!(error, ResolveError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[tokio::test]
async fn the_next_server_answers_for_one_that_is_not_there_or_silent() {
    let silent = Zone::new().fault_all(X, Fault::Silent).serve().await;
    let failing = Zone::new()
        .fault_all(X, Fault::Code(ResponseCode::ServFail))
        .serve()
        .await;
    let good = Zone::new().a(X, 30, "192.0.2.2").serve().await;
    let gone: SocketAddr = "127.0.0.1:1".parse().unwrap();
    for first in [gone, failing.address, silent.address] {
        let resolver = Resolver::new(config(&[first, good.address]));
        let found = resolver.resolve(&domain(X)).await.unwrap();
        assert_eq!(found.server, good.address.to_string());
        assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    }
}

#[tokio::test]
async fn a_truncated_answer_is_asked_for_by_tcp() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .fault_all(X, Fault::Truncated)
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    assert!(server.asked_by(Protocol::Tcp) >= 1);
}

#[tokio::test]
async fn tcp_is_tried_where_udp_does_not_pass() {
    let server = Zone::new().a(X, 30, "192.0.2.2").serve().await;
    // The same port, by TCP only: what comes by UDP is taken and dropped.
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let listener = TcpListener::bind(address).await.unwrap();
    let behind = server.address;
    let relay = tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = tokio::net::TcpStream::connect(behind).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let mut config = config(&[address]);
    config.timeout = Duration::from_secs(1);
    let found = Resolver::new(config).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    relay.abort();
}

#[tokio::test]
async fn garbage_is_no_answer() {
    let address = garbage_server().await;
    let mut config = config(&[address]);
    config.timeout = Duration::from_secs(1);
    let start = Clock::now();
    let error = Resolver::new(config).resolve(&domain(X)).await.unwrap_err();
    assert!(start.elapsed() < Duration::from_millis(1500));
    assert!(matches!(error, ResolveError::BadAnswer { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[tokio::test]
async fn an_answer_is_asked_for_once_a_ttl() {
    let server = Zone::new()
        .negative_ttl(3600)
        .a(X, 30, "192.0.2.2")
        .serve()
        .await;
    let resolver = resolver(&server);
    let first = resolver.resolve(&domain(X)).await.unwrap();
    let asked = server.questions();
    let left = first.expires - Instant::now();
    assert!(left <= Duration::from_secs(30) && left > Duration::from_secs(28));

    let again = resolver.resolve(&domain(X)).await.unwrap();
    assert!(again.cached);
    assert_eq!(again.registry, first.registry);
    pass(Duration::from_secs(25)).await;
    assert!(resolver.resolve(&domain(X)).await.unwrap().cached);
    assert_eq!(server.questions(), asked);

    pass(Duration::from_secs(6)).await;
    assert!(!resolver.resolve(&domain(X)).await.unwrap().cached);
    assert_eq!(server.asked(X, RecordType::A), 2);
}

#[tokio::test]
async fn ttls_are_bounded_on_both_sides() {
    for (ttl, least, most) in [(0, 0, 1), (86400, 3598, 3600)] {
        let server = Zone::new()
            .srv(REGISTRY, ttl, 0, 5005, X)
            .srv(PROXY, ttl, 0, 5006, X)
            .a(X, ttl, "192.0.2.2")
            .serve()
            .await;
        let found = resolver(&server).resolve(&domain(X)).await.unwrap();
        let left = found.expires - Instant::now();
        assert!(left <= Duration::from_secs(most), "{left:?}");
        assert!(left > Duration::from_secs(least), "{left:?}");
    }
}

#[tokio::test]
async fn a_failure_is_kept_briefly() {
    let server = Zone::new().serve().await;
    let resolver = resolver(&server);
    resolver.resolve(&domain(X)).await.unwrap_err();
    let asked = server.questions();
    resolver.resolve(&domain(X)).await.unwrap_err();
    assert_eq!(server.questions(), asked);
    pass(Duration::from_secs(6)).await;
    resolver.resolve(&domain(X)).await.unwrap_err();
    assert!(server.questions() > asked);
}

#[tokio::test]
async fn callers_share_one_flight_and_one_that_leaves_harms_no_other() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .fault(X, RecordType::A, Fault::Held)
        .serve()
        .await;
    let resolver = resolver(&server);
    let mut callers = Vec::new();
    for _ in 0..50 {
        let resolver = resolver.clone();
        callers.push(tokio::spawn(
            async move { resolver.resolve(&domain(X)).await },
        ));
    }
    let asked = async {
        while server.asked(X, RecordType::A) == 0 {
            tokio::task::yield_now().await;
        }
    };
    let asked = tokio::time::timeout(Duration::from_secs(1), asked).await;
    asked.expect("the question within the resolver's time");
    callers.remove(0).abort();
    server.release();
    for caller in callers {
        let found = caller.await.unwrap().unwrap();
        assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    }
    assert_eq!(server.asked(REGISTRY, RecordType::SRV), 1);
    assert_eq!(server.asked(X, RecordType::A), 1);
    let setup = Arc::clone(&resolver.setup.read().unwrap());
    assert_eq!(setup.cache().len(), (1, 0));
}

#[tokio::test]
async fn a_domain_too_long_for_the_service_name_is_resolved_by_its_address() {
    let label = "a".repeat(60);
    let long = format!("{label}.{label}.{label}.{}", "b".repeat(60));
    let server = Zone::new().a(&long, 30, "192.0.2.2").serve().await;
    let found = resolver(&server).resolve(&domain(&long)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
}

#[tokio::test]
async fn the_cache_is_bounded() {
    let mut cache = Cache::default();
    let now = Instant::now();
    let failed = || -> Outcome {
        Err(ResolveError::Interrupted {
            domain: String::new(),
        })
    };
    let name = |i: usize| domain(&format!("d{i}.example"));
    for i in 0..cache::MAX_ANSWERS + 100 {
        // The later, the longer it holds: what goes is the oldest.
        let expires = now + Duration::from_secs(1 + i as u64);
        cache.land(name(i), failed(), expires, now);
    }
    assert_eq!(cache.len(), (cache::MAX_ANSWERS, 0));
    assert!(matches!(
        cache.look_up(&name(100), now),
        Known::Answer(Err(_))
    ));
    let mut flights = Vec::new();
    for i in 0..MAX_FLIGHTS {
        let known = cache.look_up(&domain(&format!("f{i}.example")), now);
        let Known::Unknown(sender, _) = known else {
            panic!("a new domain opens a flight");
        };
        flights.push(sender);
    }
    assert!(matches!(cache.look_up(&name(0), now), Known::Full));
    // A flight that crashed counts as none.
    flights.pop();
    assert!(matches!(cache.look_up(&name(0), now), Known::Unknown(..)));
    let long_after = now + Duration::from_secs(10_000);
    cache.land(name(0), failed(), long_after, long_after);
    assert_eq!(cache.len().0, 1);
}

#[test]
fn hosts_are_read_from_text() {
    let ip = "192.0.2.1".parse::<HostTarget>().unwrap();
    assert_eq!(ip, HostTarget::Ip("192.0.2.1".parse().unwrap()));
    let socket = "[2001:db8::1]:7".parse::<HostTarget>().unwrap();
    assert_eq!(
        socket,
        HostTarget::Socket("[2001:db8::1]:7".parse().unwrap())
    );
    for text in ["gw.example", "gw.example:7001", "192.0.2.1:7001"] {
        assert_eq!(text.parse::<HostTarget>().unwrap().to_string(), text);
    }
    for text in ["gw.example:0", "gw.example:70000", "gw.example:x"] {
        let error = text.parse::<HostTarget>().unwrap_err();
        assert!(matches!(error, HostError::Port { .. }), "{text}: {error}");
    }
    assert!("gw..example".parse::<HostTarget>().is_err());
    assert!("".parse::<HostTarget>().is_err());
}

#[test]
fn weights_share_the_load() {
    use hickory_proto::rr::{Name, rdata::SRV};
    let record = |priority, weight, port| SRV::new(priority, weight, port, Name::root());
    let records = vec![record(1, 3, 10), record(0, 1, 11), record(0, 3, 12)];
    let mut first = BTreeMap::new();
    for draw in 0..=4 {
        let mut draws = [draw, 0, 0].into_iter();
        let ordered = srv::order(records.clone(), |_| draws.next().unwrap());
        assert_eq!(ordered[2].port, 10, "priority before weight");
        *first.entry(ordered[0].port).or_insert(0) += 1;
    }
    // The draws 0 and 1 take the weight of 1, the draws 2 to 4 that of 3.
    assert_eq!(first, BTreeMap::from([(11, 2), (12, 3)]));
    let many = vec![record(0, 0, 1); 1000];
    assert_eq!(srv::order(many, |_| 0).len(), 16);
}
