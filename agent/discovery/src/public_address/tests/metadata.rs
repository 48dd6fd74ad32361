use std::{sync::Arc, time::Duration};

use ::http::StatusCode;
use nsm_core::address::public::{Outcome, Provider};

use super::{
    super::{BaseUrl, Lookup, LookupConfig, Trust, http::first_bundle},
    ask_one, ip, server, trouble,
};

fn lookup(provider: Provider, base: BaseUrl) -> Lookup {
    Lookup::new(LookupConfig {
        metadata: vec![(provider, base)],
        ..LookupConfig::default()
    })
}

#[tokio::test]
async fn aws_tells_the_address_for_a_token_and_404_where_there_is_none() {
    let aws = server::aws(Some("203.0.113.1")).await;
    let lookup = lookup(Provider::Aws, aws.url());
    assert_eq!(ask_one(&lookup).await, Outcome::Address(ip("203.0.113.1")));
    aws.set_address(None);
    assert_eq!(ask_one(&lookup).await, Outcome::None);
    aws.set_address(Some("203.0.113.2"));
    assert_eq!(ask_one(&lookup).await, Outcome::Address(ip("203.0.113.2")));
    assert_eq!(aws.tokens_given(), 1, "a token is kept");
}

#[tokio::test]
async fn an_old_token_of_aws_is_replaced() {
    let aws = server::aws(Some("203.0.113.1")).await;
    let lookup = lookup(Provider::Aws, aws.url());
    for round in 1..=3 {
        assert_eq!(ask_one(&lookup).await, Outcome::Address(ip("203.0.113.1")));
        assert_eq!(aws.tokens_given(), round);
        aws.expire_tokens();
    }
}

#[tokio::test]
async fn a_service_that_takes_no_token_of_its_own_is_asked_no_third_time() {
    let handler = |request: &::http::Request<hyper::body::Incoming>| {
        if request.method() == ::http::Method::PUT {
            server::answer(StatusCode::OK, "token")
        } else {
            server::answer(StatusCode::UNAUTHORIZED, "")
        }
    };
    let odd = server::serve(None, Arc::new(handler)).await;
    let lookup = lookup(Provider::Aws, odd.url());
    for _ in 0..2 {
        let trouble = trouble(ask_one(&lookup).await);
        assert!(trouble.contains("401"), "{trouble}");
    }
}

#[tokio::test(start_paused = true)]
async fn silence_behind_a_hop_limit_ends_after_a_second() {
    let silent = server::silent().await;
    for provider in Provider::ALL {
        let started = tokio::time::Instant::now();
        let trouble = trouble(ask_one(&lookup(provider, silent.url())).await);
        assert!(
            trouble.contains("did not answer within 1s") && trouble.contains("HopLimit"),
            "{trouble}"
        );
        // The clock is the test's own: no other second passes.
        assert!(started.elapsed() < Duration::from_millis(1100));
    }
}

#[tokio::test]
async fn gcp_wants_its_header_and_sends_it() {
    let gcp = server::gcp(Some("203.0.113.1")).await;
    assert_eq!(
        ask_one(&lookup(Provider::Gcp, gcp.url())).await,
        Outcome::Address(ip("203.0.113.1"))
    );
    // The server does refuse a question without one: that of another provider.
    let trouble_of = trouble(ask_one(&lookup(Provider::Equinix, gcp.url())).await);
    assert!(trouble_of.contains("403"), "{trouble_of}");
    let gcp = server::gcp(None).await;
    assert_eq!(
        ask_one(&lookup(Provider::Gcp, gcp.url())).await,
        Outcome::None
    );
    // Whatever else answers at that address is not believed.
    let other = server::equinix(Some("203.0.113.1")).await;
    let trouble = trouble(ask_one(&lookup(Provider::Gcp, other.url())).await);
    assert!(trouble.contains("metadata-flavor"), "{trouble}");
}

/// The answer to a machine without a load balancer.
const NO_LOAD_BALANCER: (StatusCode, &str) =
    (StatusCode::NOT_FOUND, "No load balancer metadata is found");

#[tokio::test]
async fn azure_tells_its_own_address_or_that_of_the_load_balancer() {
    let azure = server::azure("203.0.113.1", NO_LOAD_BALANCER).await;
    assert_eq!(
        ask_one(&lookup(Provider::Azure, azure.url())).await,
        Outcome::Address(ip("203.0.113.1"))
    );
    let balanced = r#"{"loadbalancer":{"publicIpAddresses":[{"frontendIpAddress":"203.0.113.9","privateIpAddress":"10.0.0.4"}],"inboundRules":[],"outboundRules":[]}}"#;
    let azure = server::azure("", (StatusCode::OK, balanced)).await;
    assert_eq!(
        ask_one(&lookup(Provider::Azure, azure.url())).await,
        Outcome::Address(ip("203.0.113.9"))
    );
    let none = r#"{"loadbalancer":{"publicIpAddresses":[]}}"#;
    for none in [
        NO_LOAD_BALANCER,
        (StatusCode::BAD_REQUEST, ""),
        (StatusCode::OK, none),
    ] {
        let azure = server::azure("", none).await;
        assert_eq!(
            ask_one(&lookup(Provider::Azure, azure.url())).await,
            Outcome::None
        );
    }
    for wrong in ["{}", "[", r#"{"loadbalancer":{"publicIpAddresses":[{}]}}"#] {
        let azure = server::azure("", (StatusCode::OK, wrong)).await;
        let trouble = trouble(ask_one(&lookup(Provider::Azure, azure.url())).await);
        assert!(trouble.contains("/metadata/loadbalancer"), "{trouble}");
    }
}

#[tokio::test]
async fn an_azure_that_is_busy_or_out_of_order_does_not_deny_the_load_balancers_address() {
    for status in [
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::INTERNAL_SERVER_ERROR,
        StatusCode::GONE,
    ] {
        let azure = server::azure("", (status, "")).await;
        let trouble = trouble(ask_one(&lookup(Provider::Azure, azure.url())).await);
        assert!(
            trouble.contains("/metadata/loadbalancer") && trouble.contains(status.as_str()),
            "{trouble}"
        );
    }
}

#[tokio::test]
async fn equinix_metal_tells_the_address() {
    let equinix = server::equinix(Some("203.0.113.1")).await;
    assert_eq!(
        ask_one(&lookup(Provider::Equinix, equinix.url())).await,
        Outcome::Address(ip("203.0.113.1"))
    );
    let equinix = server::equinix(None).await;
    assert_eq!(
        ask_one(&lookup(Provider::Equinix, equinix.url())).await,
        Outcome::None
    );
}

#[tokio::test]
async fn https_is_asked_with_the_authorities_of_a_file() {
    let (authority, acceptor) = server::certificates();
    let handler =
        |_: &::http::Request<hyper::body::Incoming>| server::answer(StatusCode::OK, "203.0.113.1");
    let equinix = server::serve(Some(acceptor), Arc::new(handler)).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("authorities.pem");
    let lookup = Lookup {
        trust: Trust::File(file.clone()),
        ..lookup(Provider::Equinix, equinix.url())
    };
    let missing = trouble(ask_one(&lookup).await);
    assert!(missing.contains(file.to_str().unwrap()), "{missing}");
    let (stranger, _) = server::certificates();
    std::fs::write(&file, &stranger).unwrap();
    let untrusted = trouble(ask_one(&lookup).await);
    assert!(untrusted.contains("certificate"), "{untrusted}");
    std::fs::write(&file, stranger + &authority).unwrap();
    assert_eq!(ask_one(&lookup).await, Outcome::Address(ip("203.0.113.1")));
}

#[test]
fn the_machines_authorities_are_looked_for_in_each_place_and_each_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let places = ["first.crt", "second.crt"].map(|name| folder.path().join(name));
    let missing = first_bundle(&places).unwrap_err().to_string();
    for place in &places {
        assert!(missing.contains(place.to_str().unwrap()), "{missing}");
    }
    assert!(missing.contains("ca-certificates"), "{missing}");
    std::fs::write(&places[1], "PEM").unwrap();
    let found = first_bundle(&places).unwrap();
    assert_eq!(found, (places[1].clone(), b"PEM".to_vec()));
}

#[tokio::test]
async fn a_service_that_is_not_there_and_an_answer_without_end_are_failures() {
    let base: BaseUrl = {
        let gone = server::equinix(None).await;
        gone.url()
    };
    let refused = trouble(ask_one(&lookup(Provider::Equinix, base)).await);
    assert!(
        refused.contains("refused") || refused.contains("closed") || refused.contains("reset"),
        "{refused}"
    );

    let endless = "1".repeat(3 << 20);
    let handler =
        move |_: &::http::Request<hyper::body::Incoming>| server::answer(StatusCode::OK, &endless);
    let huge = server::serve(None, Arc::new(handler)).await;
    let trouble = trouble(ask_one(&lookup(Provider::Equinix, huge.url())).await);
    assert!(trouble.contains("length limit"), "{trouble}");
}

#[test]
fn base_urls_are_read() {
    for (text, shown) in [
        ("http://169.254.169.254", "http://169.254.169.254"),
        ("http://169.254.169.254/", "http://169.254.169.254"),
        (
            "https://kubernetes.default.svc:443",
            "https://kubernetes.default.svc:443",
        ),
        (
            "https://[2001:db8::1]:6443/proxy/",
            "https://[2001:db8::1]:6443/proxy",
        ),
    ] {
        let url: BaseUrl = text.parse().unwrap();
        assert_eq!(url.to_string(), shown);
        assert_eq!(url.at("/x"), format!("{shown}/x"));
    }
    for text in [
        "",
        "169.254.169.254",
        "ftp://x",
        "http://",
        "http://user:secret@x",
        "http://x?y",
        "http://x y",
    ] {
        assert!(text.parse::<BaseUrl>().is_err(), "{text}");
    }
}
