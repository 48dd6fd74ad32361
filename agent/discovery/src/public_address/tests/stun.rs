use std::net::SocketAddr;

use nsm_core::address::public::Outcome;
use tokio::net::UdpSocket;

use super::{
    super::{Lookup, LookupConfig, StunServer},
    ask_one, ip, trouble,
};

/// How a server answers.
#[derive(Debug, Clone, Copy)]
pub(super) enum Manner {
    Honest,
    /// The first so many requests are lost.
    Loses(u32),
    /// First noise and an answer of another transaction with a wrong address, then the right one.
    WithNoise,
    /// Error 401.
    Refuses,
    Silent,
}

pub(super) async fn server(manner: Manner) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut lost = 0;
        let mut buffer = [0; 1500];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            let request = &buffer[..length];
            assert_eq!(request.len(), 20);
            assert_eq!(request[..8], [0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42]);
            let id: [u8; 12] = request[8..].try_into().unwrap();
            let answers: Vec<Vec<u8>> = match manner {
                Manner::Silent => Vec::new(),
                Manner::Loses(count) if lost < count => {
                    lost += 1;
                    Vec::new()
                }
                Manner::Honest | Manner::Loses(_) => vec![success(&id, from)],
                Manner::WithNoise => vec![
                    b"noise".to_vec(),
                    success(&[7; 12], "192.0.2.66:1".parse().unwrap()),
                    success(&id, from),
                ],
                Manner::Refuses => vec![message(0x0111, &id, &[0, 9, 0, 4, 0, 0, 4, 1])],
            };
            for answer in answers {
                socket.send_to(&answer, from).await.unwrap();
            }
        }
    });
    address
}

fn message(kind: u16, id: &[u8; 12], attributes: &[u8]) -> Vec<u8> {
    [
        &kind.to_be_bytes()[..],
        &u16::try_from(attributes.len()).unwrap().to_be_bytes(),
        &[0x21, 0x12, 0xa4, 0x42],
        id,
        attributes,
    ]
    .concat()
}

fn success(id: &[u8; 12], mapped: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(mapped) = mapped else {
        panic!("an IPv4 server")
    };
    let port = mapped.port() ^ 0x2112;
    let address = mapped.ip().to_bits() ^ 0x2112_a442;
    let attribute = [
        &[0, 0x20, 0, 8, 0, 1][..],
        &port.to_be_bytes(),
        &address.to_be_bytes(),
    ]
    .concat();
    message(0x0101, id, &attribute)
}

fn lookup(server: SocketAddr) -> Lookup {
    Lookup::new(LookupConfig {
        stun: vec![server.to_string().parse().unwrap()],
        ..LookupConfig::default()
    })
}

#[tokio::test]
async fn the_mapped_address_is_told_whatever_noise_comes_first() {
    for manner in [Manner::Honest, Manner::WithNoise] {
        let lookup = lookup(server(manner).await);
        assert_eq!(ask_one(&lookup).await, Outcome::Address(ip("127.0.0.1")));
    }
}

#[tokio::test]
async fn a_lost_request_is_sent_again() {
    let lookup = lookup(server(Manner::Loses(1)).await);
    assert_eq!(ask_one(&lookup).await, Outcome::Address(ip("127.0.0.1")));
}

#[tokio::test(start_paused = true)]
async fn silence_is_a_failure_in_the_end() {
    let silent = trouble(ask_one(&lookup(server(Manner::Silent).await)).await);
    assert!(
        silent.contains("no answer to 4 requests within 5.5s"),
        "{silent}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_resolver_that_does_not_answer_ends_the_transaction() {
    let server: StunServer = "stun.example.org".parse().unwrap();
    let dead = std::future::pending::<std::io::Result<std::iter::Empty<SocketAddr>>>();
    let trouble = server.transact(None, dead).await.unwrap_err();
    assert!(trouble.contains("not resolved within 7s"), "{trouble}");

    // A resolver whose first server is dead asks its second: what is left of the time is for STUN.
    let started = tokio::time::Instant::now();
    let silent = super::stun::server(Manner::Silent).await;
    let late = async {
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
        Ok([silent].into_iter())
    };
    let trouble = server.transact(None, late).await.unwrap_err();
    assert!(
        trouble.contains("no answer to 3 requests within 2.0s"),
        "{trouble}"
    );
    // The clock is the test's own: no other second passes.
    assert!(started.elapsed() < std::time::Duration::from_millis(7100));
}

#[tokio::test]
async fn a_refusal_is_told_with_its_number() {
    let refused = trouble(ask_one(&lookup(server(Manner::Refuses).await)).await);
    assert!(refused.contains("error 401"), "{refused}");
}

#[test]
fn servers_are_named_with_or_without_a_port() {
    for (text, shown) in [
        ("stun.example.org", "stun.example.org:3478"),
        ("stun:stun.example.org:19302", "stun.example.org:19302"),
        ("192.0.2.1", "192.0.2.1:3478"),
        ("192.0.2.1:1", "192.0.2.1:1"),
        ("2001:db8::1", "[2001:db8::1]:3478"),
        ("[2001:db8::1]", "[2001:db8::1]:3478"),
        ("[2001:db8::1]:1", "[2001:db8::1]:1"),
    ] {
        assert_eq!(text.parse::<StunServer>().unwrap().to_string(), shown);
    }
    for text in [
        "",
        ":1",
        "x:0",
        "x:y",
        "x:70000",
        "x:+1",
        "a b",
        "http://x",
        "192.0.2.1:0",
    ] {
        assert!(text.parse::<StunServer>().is_err(), "{text}");
    }
}
