//! Each source against a local server that behaves as the real one does.

mod kubernetes;
mod metadata;
mod server;
mod stun;

use std::net::IpAddr;

use futures_util::StreamExt as _;
use nsm_core::address::public::{Outcome, Provider, Source};

use super::{Lookup, LookupConfig};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The sentence of a failure.
fn trouble(outcome: Outcome) -> String {
    match outcome {
        Outcome::Failed(trouble) => trouble,
        other => panic!("expected a failure, got {other:?}"),
    }
}

/// The answer to a node at the loopback address.
async fn ask(lookup: &Lookup) -> Vec<(Source, Outcome)> {
    let mut all: Vec<_> = lookup.ask(Some(ip("127.0.0.1"))).collect().await;
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// The one answer where one is asked.
async fn ask_one(lookup: &Lookup) -> Outcome {
    let mut all = ask(lookup).await;
    assert_eq!(all.len(), 1);
    all.remove(0).1
}

#[tokio::test]
async fn all_are_asked_at_once_and_each_answers_for_itself() {
    let aws = server::aws(Some("203.0.113.1")).await;
    let gcp = server::gcp(None).await;
    let stun = stun::server(stun::Manner::Honest).await;
    let lookup = Lookup::new(LookupConfig {
        metadata: vec![(Provider::Aws, aws.url()), (Provider::Gcp, gcp.url())],
        kubernetes: None,
        stun: vec![stun.to_string().parse().unwrap()],
    });
    assert_eq!(
        ask(&lookup).await,
        [
            (
                Source::Metadata(Provider::Aws),
                Outcome::Address(ip("203.0.113.1"))
            ),
            (Source::Metadata(Provider::Gcp), Outcome::None),
            (
                Source::Stun(stun.to_string()),
                Outcome::Address(ip("127.0.0.1"))
            ),
        ]
    );
    assert_eq!(ask(&Lookup::new(LookupConfig::default())).await, []);
}
