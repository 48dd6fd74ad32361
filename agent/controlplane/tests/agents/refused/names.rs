//! Names, paths, tokens and expiries.

use std::time::{Duration, SystemTime};

use nsm_controlplane::identity::token::{EXPIRES_KEY, TOKEN_KEY};
use nsm_proto::{connection::PathSegment, networkservice::NetworkServiceRequest};
use tonic::{Code, metadata::MetadataValue};

use super::{SERVICE, all_are_refused, connection, index, segments, service};
use crate::support::{Client, MAX_MESSAGE, World, assert_refusal, stamp};

#[tokio::test]
async fn names_and_paths() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    all_are_refused(
        &client,
        &[
            (
                "nothing before the @",
                |it| service(it, "@x"),
                Code::InvalidArgument,
                &["`@x`", "before the `@`"],
            ),
            (
                "nothing after it",
                |it| service(it, "a@"),
                Code::InvalidArgument,
                &["`a@`", "after the `@`"],
            ),
            (
                "two of them",
                |it| service(it, "a@b@c"),
                Code::InvalidArgument,
                &["`a@b@c`", "more than one"],
            ),
            (
                "a long label",
                |it| service(it, &format!("a@{}.example", "x".repeat(64))),
                Code::InvalidArgument,
                &["64 bytes", "63"],
            ),
            (
                "a long domain",
                |it| service(it, &format!("a@{}x", "x.".repeat(150))),
                Code::InvalidArgument,
                &["301 bytes", "253"],
            ),
            (
                "an empty label",
                |it| service(it, "a@b..c"),
                Code::InvalidArgument,
                &["`b..c`", "empty label"],
            ),
            (
                "no address",
                |it| service(it, "a@10.0.0.300"),
                Code::InvalidArgument,
                &["10.0.0.300", "IPv4"],
            ),
            (
                "a port of a name",
                |it| service(it, "a@b.example:5006"),
                Code::InvalidArgument,
                &["b.example:5006", "SRV"],
            ),
            (
                "a space",
                |it| service(it, "a b@c"),
                Code::InvalidArgument,
                &["`a b`", "' '"],
            ),
            (
                "a bad endpoint",
                |it| connection(it).network_service_endpoint_name = "@x".into(),
                Code::InvalidArgument,
                &["`@x`"],
            ),
            (
                "no name at all",
                |it| service(it, ""),
                Code::InvalidArgument,
                &["network_service"],
            ),
            (
                "two domains",
                |it| {
                    connection(it).network_service_endpoint_name = "nse-1@cluster-1.example".into()
                },
                Code::InvalidArgument,
                &["cluster-1.example", "cluster-2.example"],
            ),
            (
                "no connection",
                |it| it.connection = None,
                Code::InvalidArgument,
                &["no connection"],
            ),
            (
                "no id",
                |it| connection(it).id.clear(),
                Code::InvalidArgument,
                &["connection.id is empty"],
            ),
            (
                "another id",
                |it| connection(it).id = "other".into(),
                Code::InvalidArgument,
                &["other", "client-", "must be equal"],
            ),
            (
                "no path",
                |it| connection(it).path = None,
                Code::InvalidArgument,
                &["no path segments"],
            ),
            (
                "no segments",
                |it| segments(it).clear(),
                Code::InvalidArgument,
                &["no path segments"],
            ),
            (
                "index behind the end",
                |it| *index(it) = 1,
                Code::InvalidArgument,
                &["path.index 1", "1 segments"],
            ),
            (
                "index far behind it",
                |it| *index(it) = u32::MAX,
                Code::InvalidArgument,
                &["path.index 4294967295"],
            ),
            (
                "65 segments",
                |it| segments(it).resize(65, PathSegment::default()),
                Code::InvalidArgument,
                &["65 segments", "64"],
            ),
            (
                "64 and ours",
                |it| {
                    let own = segments(it)[0].clone();
                    segments(it).resize(64, own);
                    *index(it) = 63;
                },
                Code::InvalidArgument,
                &["65 segments"],
            ),
            (
                "a novel",
                |it| service(it, &format!("a@b@{}", "novel ".repeat(2_000))),
                Code::InvalidArgument,
                &["a@b@novel", "…"],
            ),
            (
                "an oversized message",
                |it| service(it, &"x".repeat(MAX_MESSAGE)),
                Code::OutOfRange,
                &["length too large"],
            ),
        ],
    )
    .await;
    assert!(endpoint.requests().is_empty());
    world.settles(&before).await;
}

#[tokio::test]
async fn tokens_and_expiries() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let mut client = Client::on_node(a).await;
    let expires = |it: &mut NetworkServiceRequest, at: SystemTime| {
        segments(it)[0].expires = Some(stamp(at));
    };

    // Metadata that is there and cannot be read.
    for (key, value, word) in [
        (EXPIRES_KEY, "soon", "\"soon\""),
        (EXPIRES_KEY, "2026-13-01T00:00:00Z", "2026-13-01"),
        (TOKEN_KEY, "", "empty"),
    ] {
        let mut call = client.call(client.request_for(SERVICE));
        call.metadata_mut()
            .insert(key, value.parse().expect("ASCII"));
        let status = client.send_call(call).await.expect_err(key);
        assert_refusal(&status, Code::InvalidArgument, &[key, word]);
    }
    let mut call = client.call(client.request_for(SERVICE));
    let bytes = MetadataValue::try_from(&b"\xff\xfe"[..]).expect("opaque bytes");
    call.metadata_mut().insert(TOKEN_KEY, bytes);
    let status = client.send_call(call).await.expect_err("no text");
    assert_refusal(&status, Code::InvalidArgument, &[TOKEN_KEY, "ASCII"]);

    // Without metadata the segment itself counts.
    client.lifetime = None;
    let status = client.refused(client.request_for(SERVICE)).await;
    let words = [
        "expiration for the previous path segment cannot be nil",
        client.name(),
    ];
    assert_refusal(&status, Code::InvalidArgument, &words);
    let mut request = client.request_for(SERVICE);
    expires(&mut request, SystemTime::now() - Duration::from_secs(90));
    let status = client.refused(request).await;
    assert_refusal(
        &status,
        Code::Unauthenticated,
        &[client.name(), "expired 90"],
    );
    let mut request = client.request_for(SERVICE);
    segments(&mut request)[0].expires = Some(prost_types::Timestamp {
        seconds: -5,
        nanos: i32::MAX,
    });
    let status = client.refused(request).await;
    assert_refusal(&status, Code::InvalidArgument, &["cannot be nil"]);
    world.settles(&before).await;

    // A time beyond every calendar is a time all the same.
    let mut request = client.request_for(SERVICE);
    expires(
        &mut request,
        SystemTime::now() + Duration::from_secs(1 << 37),
    );
    let granted = client.send(request).await.expect("granted");
    client.close(&granted.connection).await.expect("closed");
    // A Close breaks no rules either.
    let mut wrong = granted.connection;
    wrong.id = "other".to_owned();
    let status = client.close(&wrong).await.expect_err("another id");
    assert_refusal(&status, Code::InvalidArgument, &["must be equal"]);
    world.settles(&before).await;
}
