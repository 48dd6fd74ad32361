use std::{path::Path, sync::Arc};

use ::http::{Request, StatusCode};
use hyper::body::Incoming;
use nsm_core::address::public::Outcome;

use super::{
    super::{BaseUrl, KubernetesNode, Lookup, LookupConfig},
    ask_one, ip, server, trouble,
};

/// A cluster's API server with one node, and a pod's service account for it.
struct Cluster {
    server: server::Server,
    account: tempfile::TempDir,
}

const NODE: &str = r#"{"kind":"Node","apiVersion":"v1","metadata":{"name":"node-1"},"status":{"addresses":[
    {"type":"InternalIP","address":"10.0.0.1"},{"type":"ExternalIP","address":"2001:db8::1"},
    {"type":"ExternalIP","address":"203.0.113.1"},{"type":"Hostname","address":"node-1"}]}}"#;

async fn cluster(node: &'static str) -> Cluster {
    let (authority, acceptor) = server::certificates();
    let handler = move |request: &Request<Incoming>| {
        let bearer = request.headers().get("authorization");
        match (
            bearer.map(|value| value.to_str().unwrap()),
            request.uri().path(),
        ) {
            (Some("Bearer may-read"), "/api/v1/nodes/node-1") => {
                server::answer(StatusCode::OK, node)
            }
            (Some("Bearer may-read"), _) => {
                server::answer(StatusCode::NOT_FOUND, r#"{"kind":"Status","code":404}"#)
            }
            (Some("Bearer may-not"), _) => {
                server::answer(StatusCode::FORBIDDEN, r#"{"kind":"Status","code":403}"#)
            }
            _ => server::answer(StatusCode::UNAUTHORIZED, r#"{"kind":"Status","code":401}"#),
        }
    };
    let account = tempfile::tempdir().unwrap();
    std::fs::write(account.path().join("ca.crt"), authority).unwrap();
    std::fs::write(account.path().join("token"), "may-read\n").unwrap();
    Cluster {
        server: server::serve(Some(acceptor), Arc::new(handler)).await,
        account,
    }
}

fn lookup(api: BaseUrl, name: &str, account: &Path) -> Lookup {
    Lookup::new(LookupConfig {
        kubernetes: Some(KubernetesNode {
            api,
            name: name.to_owned(),
            account: account.to_owned(),
        }),
        ..LookupConfig::default()
    })
}

#[tokio::test]
async fn the_nodes_external_ip_of_our_family_is_found() {
    let cluster = cluster(NODE).await;
    let lookup = lookup(cluster.server.url(), "node-1", cluster.account.path());
    assert_eq!(ask_one(&lookup).await, Outcome::Address(ip("203.0.113.1")));
    let node = lookup.config.kubernetes.as_ref().unwrap();
    let v6 = node.external_ip(Some(ip("fd00::1"))).await.unwrap();
    assert_eq!(v6, Some(ip("2001:db8::1")));
}

#[tokio::test]
async fn a_node_without_one_says_so() {
    for node in [
        r#"{"kind":"Node","status":{"addresses":[{"type":"InternalIP","address":"10.0.0.1"}]}}"#,
        r#"{"kind":"Node","status":{}}"#,
        r#"{"kind":"Node"}"#,
    ] {
        let cluster = cluster(node).await;
        let lookup = lookup(cluster.server.url(), "node-1", cluster.account.path());
        assert_eq!(ask_one(&lookup).await, Outcome::None);
    }
}

#[tokio::test]
async fn refusals_say_what_to_do_and_a_new_token_is_used_at_once() {
    let cluster = cluster(NODE).await;
    let token = cluster.account.path().join("token");
    let lookup_ = lookup(cluster.server.url(), "node-1", cluster.account.path());
    for (held, words) in [("may-not", "grant it `get` on `nodes`"), ("old", "token")] {
        std::fs::write(&token, held).unwrap();
        let trouble = trouble(ask_one(&lookup_).await);
        assert!(trouble.contains(words), "{trouble}");
    }
    std::fs::write(&token, "may-read").unwrap();
    assert!(matches!(ask_one(&lookup_).await, Outcome::Address(_)));

    let other = lookup(cluster.server.url(), "node-2", cluster.account.path());
    let unknown = trouble(ask_one(&other).await);
    assert!(unknown.contains("no node node-2"), "{unknown}");

    std::fs::remove_file(&token).unwrap();
    let gone = trouble(ask_one(&lookup_).await);
    assert!(gone.contains("token"), "{gone}");
}

#[tokio::test]
async fn a_server_of_another_authority_is_told_nothing() {
    let cluster_ = cluster(NODE).await;
    let stranger = cluster(NODE).await;
    let lookup = lookup(stranger.server.url(), "node-1", cluster_.account.path());
    let untrusted = trouble(ask_one(&lookup).await);
    assert!(untrusted.contains("certificate"), "{untrusted}");
    std::fs::write(cluster_.account.path().join("ca.crt"), "none").unwrap();
    let empty = trouble(ask_one(&lookup).await);
    assert!(empty.contains("no certificate"), "{empty}");
}

#[tokio::test]
async fn an_answer_that_is_no_node_is_a_failure() {
    let cluster = cluster("<html>").await;
    let lookup = lookup(cluster.server.url(), "node-1", cluster.account.path());
    let trouble = trouble(ask_one(&lookup).await);
    assert!(trouble.contains("no Node"), "{trouble}");
}
