//! Which server answers, and by which transport.

use super::*;

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
