use nsm_spiffe::{Authority, Issued, Wanted, self_signed};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::*;
use crate::identity::{
    certificate::{BadCertificate, Bundles},
    svid::Svid,
};

const ID: &str = "spiffe://one.example/agent";

fn svid(issued: &Issued) -> Svid {
    let chain = issued.chain.iter().cloned().map(Into::into).collect();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(issued.key.clone()));
    Svid::new(chain, &key).unwrap()
}

fn bundles(authorities: &[&Authority]) -> Bundles {
    let mut bundles = Bundles::default();
    for authority in authorities {
        let trust_domain = authority.trust_domain().parse().unwrap();
        bundles
            .insert(trust_domain, [authority.bundle().into()])
            .unwrap();
    }
    bundles
}

fn tls(issued: &Issued, believed: &[&Authority]) -> Tls {
    let identity = Identity::from_source("a test");
    identity.replace(svid(issued), bundles(believed));
    Tls::of(identity)
}

/// Both ends of a handshake.
async fn shake(
    client: &Tls,
    server: &Tls,
) -> (
    Result<Secured<DuplexStream>, TlsError>,
    Result<Secured<DuplexStream>, TlsError>,
) {
    let (near, far) = duplex(1 << 16);
    tokio::join!(client.connect(near, "far"), server.accept(far, "near"))
}

#[tokio::test]
async fn both_ends_have_the_id_of_the_other_and_bytes_pass() {
    let [one, two] = ["one.example", "two.example"].map(Authority::of);
    let client = tls(&one.svid("nsc"), &[&one, &two]);
    let server = tls(&two.svid("nsmgr"), &[&one, &two]);
    let (near, far) = shake(&client, &server).await;
    let (mut near, mut far) = (near.unwrap(), far.unwrap());
    let id = |stream: &Secured<DuplexStream>| stream.session().unwrap().peer().to_string();
    assert_eq!(id(&near), "spiffe://two.example/nsmgr");
    assert_eq!(id(&far), "spiffe://one.example/nsc");
    near.write_all(b"ping").await.unwrap();
    near.flush().await.unwrap();
    let mut read = [0; 4];
    far.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"ping");
}

#[tokio::test]
async fn a_connection_keeps_what_it_began_with_and_the_next_has_what_came_since() {
    let authority = Authority::of("one.example");
    let client = tls(&authority.svid("nsc"), &[&authority]);
    let server = tls(&authority.svid("nsmgr"), &[&authority]);
    let (first, _far) = shake(&client, &server).await;
    let first = first.unwrap();
    client
        .identity()
        .replace(svid(&authority.svid("other")), bundles(&[&authority]));
    let (_near, second) = shake(&client, &server).await;
    assert_eq!(second.unwrap().session().unwrap().peer().path(), "/other");
    let session = first.session().unwrap();
    assert_eq!(
        (session.svid().id().path(), session.generation()),
        ("/nsc", 1)
    );
    assert!(!session.is_due(SystemTime::now()));
    assert!(session.is_due(SystemTime::now() + Duration::from_secs(1900)));
}

/// Whoever has shown a certificate that ends is not served by it for ever.
#[tokio::test]
async fn a_connection_ends_with_the_certificate_that_ends_first() {
    let authority = Authority::of("one.example");
    let short = Wanted {
        ends: 2,
        ..Wanted::of(&authority.id("nsc"))
    };
    let client = tls(&authority.issue(&short), &[&authority]);
    let server = tls(&authority.svid("nsmgr"), &[&authority]);
    let (near, far) = shake(&client, &server).await;
    let (mut near, mut far) = (near.unwrap(), far.unwrap());
    let (here, there) = tokio::join!(near.read_u8(), far.read_u8());
    for error in [here.unwrap_err(), there.unwrap_err()] {
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{error}");
    }
}

/// What the server says of a client that shows such a certificate.
async fn refused(issued: &Issued, authority: &Authority) -> TlsError {
    let server = tls(&authority.svid("nsmgr"), &[authority]);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(issued.key.clone()));
    let chain = issued.chain.iter().cloned().map(Into::into).collect();
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(anybody(authority))
        .with_client_auth_cert(chain, key)
        .unwrap();
    attempt(&server, config).await
}

/// Believes servers of this authority; of clients it takes no notice.
fn anybody(authority: &Authority) -> Arc<verifier::Verifier> {
    let client = tls(&authority.svid("any"), &[authority]);
    verifier::Verifier::of(client.identity().current().unwrap())
}

async fn attempt(server: &Tls, config: rustls::ClientConfig) -> TlsError {
    let (near, far) = duplex(1 << 16);
    let name = ServerName::try_from("spiffe.invalid").unwrap();
    let client = async {
        let stream = TlsConnector::from(Arc::new(config))
            .connect(name, near)
            .await;
        if let Ok(mut stream) = stream {
            // In TLS 1.3 the refusal comes after the client's handshake.
            let error = stream.read_u8().await.unwrap_err();
            assert!(alert(&error).is_some(), "{error}");
        }
    };
    let ((), outcome) = tokio::join!(client, server.accept(far, "near"));
    outcome.unwrap_err()
}

#[tokio::test]
async fn certificates_that_are_not_to_be_believed_are_refused_by_their_own_names() {
    let authority = Authority::of("one.example");
    let good = || Wanted::of(ID);
    let two_uris = vec![ID.to_owned(), "spiffe://one.example/two".to_owned()];
    let issued = [
        (
            "unknown_trust_domain",
            Authority::of("two.example").svid("nsc"),
        ),
        ("untrusted", Authority::of("one.example").svid("nsc")),
        ("untrusted", self_signed(&good())),
        (
            "authority",
            authority.issue(&Wanted {
                is_authority: true,
                ..good()
            }),
        ),
        (
            "expired",
            authority.issue(&Wanted {
                begins: -60,
                ends: -1,
                ..good()
            }),
        ),
        (
            "uri_names",
            authority.issue(&Wanted {
                uris: two_uris,
                ..good()
            }),
        ),
    ];
    for (reason, issued) in issued {
        let error = refused(&issued, &authority).await;
        assert_eq!(error.reason(), reason, "{error}");
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let authority = Authority::of("one.example");
    let server = tls(&authority.svid("nsmgr"), &[&authority]);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(anybody(&authority))
        .with_no_client_auth();
    assert_eq!(attempt(&server, config).await.reason(), "no_certificate");
}

#[tokio::test]
async fn a_server_that_is_not_to_be_believed_is_refused_too() {
    let [one, two] = ["one.example", "two.example"].map(Authority::of);
    let client = tls(&one.svid("nsc"), &[&one]);
    let server = tls(&two.svid("nsmgr"), &[&one, &two]);
    let (near, far) = shake(&client, &server).await;
    let refused = near.unwrap_err();
    let is_named = matches!(
        &refused,
        TlsError::Certificate(BadCertificate::UnknownTrustDomain { .. })
    );
    assert!(is_named, "{refused}");
    assert_eq!(far.unwrap_err().reason(), "refused_by_peer");
}

/// A ClientHello of TLS 1.1 (RFC 4346 section 7.4.1.2).
fn hello_of_tls_1_1() -> Vec<u8> {
    let mut hello = vec![3, 2];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x13, 1, 0]);
    let length = u8::try_from(hello.len()).unwrap();
    let mut record = vec![HANDSHAKE, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    record
}

#[tokio::test]
async fn what_is_no_tls_of_today_is_named() {
    let authority = Authority::of("one.example");
    let server = tls(&authority.svid("nsmgr"), &[&authority]);
    let said = async |bytes: &[u8]| {
        let (mut near, far) = duplex(1 << 16);
        let client = async {
            near.write_all(bytes).await.unwrap();
            near.shutdown().await.unwrap();
            let mut answer = Vec::new();
            near.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let (answer, outcome) = tokio::join!(client, server.accept(far, "near"));
        let error = outcome.unwrap_err();
        println!("{error}");
        (error.reason(), answer)
    };
    assert_eq!(said(&hello_of_tls_1_1()).await.0, "version");
    let (reason, answer) = said(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert_eq!(reason, "plain_text");
    assert!(answer.ends_with(b"this listener speaks TLS only"));
    assert_eq!(said(b"").await.0, "abandoned");
    assert_eq!(said(&hello_of_tls_1_1()[..20]).await.0, "abandoned");
}

#[tokio::test]
async fn plain_text_and_tls_name_each_other_to_who_dials() {
    let authority = Authority::of("one.example");
    let client = tls(&authority.svid("nsc"), &[&authority]);
    // A server's preface in plain text: SETTINGS.
    let (near, mut far) = duplex(1 << 16);
    far.write_all(&GOAWAY[..9]).await.unwrap();
    assert_eq!(
        client.connect(near, "far").await.unwrap_err().reason(),
        "plain_text"
    );
    // An alert of TLS to who speaks plain text.
    let (near, mut far) = duplex(1 << 16);
    far.write_all(&[21, 3, 3, 0, 2, 2, 10]).await.unwrap();
    let error = Secured::dialled_plain(near).read_u8().await.unwrap_err();
    assert!(error.to_string().contains("speaks TLS"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_trickles_ends() {
    let authority = Authority::of("one.example");
    let server = tls(&authority.svid("nsmgr"), &[&authority]);
    let (mut near, far) = duplex(1 << 16);
    let trickle = async {
        for byte in hello_of_tls_1_1() {
            if near.write_all(&[byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let ((), outcome) = tokio::join!(trickle, server.accept(far, "near"));
    assert_eq!(outcome.unwrap_err().reason(), "late");
}

#[tokio::test]
async fn without_an_svid_nothing_is_served_and_nothing_is_dialled() {
    let absent = Tls::of(Identity::from_source("the Workload API at unix:///nowhere"));
    let (near, far) = shake(&absent, &absent).await;
    let error = near.unwrap_err().to_string();
    assert!(error.contains("unix:///nowhere"), "{error}");
    assert_eq!(far.unwrap_err().reason(), "no_identity");
}

#[tokio::test]
async fn a_line_about_a_peer_comes_once_a_minute_and_the_metrics_count_each() {
    let authority = Authority::of("one.example");
    let server = tls(&authority.svid("nsmgr"), &[&authority]);
    for _ in 0..3 {
        let (mut near, far) = duplex(1 << 16);
        near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        near.shutdown().await.unwrap();
        server.accept(far, "192.0.2.1").await.unwrap_err();
    }
    let mut registry = prometheus_client::registry::Registry::default();
    server.handshakes().register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let wanted = r#"tls_handshakes_total{side="server",outcome="plain_text"} 3"#;
    assert!(text.contains(wanted), "{text}");
}
