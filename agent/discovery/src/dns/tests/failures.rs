//! The errors of a domain that cannot be resolved.

use super::*;

/// A server that answers garbage.
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
            // The id is right, the rest counts 65535 questions and has none.
            let mut answer = vec![question[0], question[1]];
            answer.extend([0xff; 30]);
            let _ = socket.send_to(&answer, from).await;
        }
    });
    address
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
        let shown = error.to_string();
        assert!(shown.contains(text), "{shown}");
        assert!(shown.contains(&server.address.to_string()), "{shown}");
        assert!(shown.contains("cluster-2.example"), "{shown}");
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
    let shown = error.to_string();
    assert!(shown.contains(&format!("SRV {REGISTRY}")), "{shown}");
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
    let shown = error.to_string();
    assert!(shown.contains(&server.address.to_string()), "{shown}");
    assert!(shown.contains("600 ms"), "{shown}");
    assert!(shown.contains(X), "{shown}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_with_what_refused() {
    let free = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let mut config = config(&[address]);
    config.timeout = Duration::from_millis(600);
    let start = Clock::now();
    let error = Resolver::new(config).resolve(&domain(X)).await.unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(1));
    // By UDP a refusal cannot be shown from silence, by TCP it can.
    assert!(matches!(error, ResolveError::Timeout { .. }), "{error}");
    let shown = error.to_string();
    assert!(
        shown.contains(&format!("{address} by UDP: no answer")),
        "{shown}"
    );
    assert!(
        shown.contains(&format!("{address} by TCP: cannot be reached")),
        "{shown}"
    );
    assert!(shown.contains("refused"), "{shown}");
}

#[tokio::test]
async fn a_server_without_a_route_is_unreachable_at_once() {
    // Nobody may send to everybody.
    let resolver = Resolver::new(config(&addresses(&["255.255.255.255:53"])));
    let start = Clock::now();
    let error = resolver.resolve(&domain(X)).await.unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(matches!(error, ResolveError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("255.255.255.255:53"), "{error}");
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

/// Who gives up and asks again has not ended its question.
#[tokio::test]
async fn a_question_is_held_until_it_is_answered() {
    let server = Zone::new().fault_all(X, Fault::Silent).serve().await;
    let mut config = config(&[server.address]);
    config.timeout = Duration::from_millis(300);
    let resolver = Resolver::new(config);
    let held = Arc::new(());
    let domain = domain(X);
    {
        let asked = resolver.resolve_holding(&domain, Arc::clone(&held));
        let outcome = tokio::time::timeout(Duration::from_millis(20), asked).await;
        assert!(outcome.is_err(), "{outcome:?}");
    }
    assert_eq!(Arc::strong_count(&held), 2);
    // Another one that asks for the same waits for this answer, and holds nothing longer.
    let outcome = resolver.resolve_holding(&domain, Arc::clone(&held)).await;
    assert!(outcome.is_err());
    while Arc::strong_count(&held) > 1 {
        tokio::task::yield_now().await;
    }
}
