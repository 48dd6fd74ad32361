//! Names that stand for other names, in answers of every shape.

use hickory_resolver::proto::{
    op::{Message, OpCode, Query},
    rr::{
        Name, RData, Record,
        rdata::{A, CNAME},
    },
};
use proptest::prelude::*;

use super::*;
use crate::dns::answer::{Answer, Question};

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn question() -> Question {
    Question {
        name: name("a.example."),
        kind: RecordType::A,
    }
}

fn answer(records: Vec<Record>) -> Message {
    let mut message = Message::response(7, OpCode::Query);
    message.add_query(Query::query(question().name, RecordType::A));
    message.add_answers(records);
    message
}

fn alias(from: &str, to: &str) -> Record {
    Record::from_rdata(name(from), 9, RData::CNAME(CNAME(name(to))))
}

#[tokio::test]
async fn an_alias_is_followed_and_its_ttl_counts() {
    let server = Zone::new()
        .cname(X, 10, "gw.cluster-2.example")
        .a("gw.cluster-2.example", 30, "192.0.2.2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    assert!(found.expires - Instant::now() <= Duration::from_secs(10));
}

#[test]
fn aliases_are_followed_in_any_order_and_a_loop_ends() {
    let address = Record::from_rdata(name("c.example."), 30, RData::A(A::new(192, 0, 2, 1)));
    let stray = Record::from_rdata(name("d.example."), 30, RData::A(A::new(192, 0, 2, 66)));
    let chain = vec![
        address,
        stray,
        alias("b.example.", "c.example."),
        alias("a.example.", "b.example."),
    ];
    let found = Answer::read(&question(), answer(chain));
    assert_eq!(found.canonical, name("c.example."));
    assert_eq!(found.records.len(), 1);
    assert_eq!(found.records[0].name, name("c.example."));

    let ring = vec![
        alias("a.example.", "b.example."),
        alias("b.example.", "a.example."),
    ];
    assert!(Answer::read(&question(), answer(ring)).records.is_empty());
}

#[tokio::test]
async fn aliases_are_asked_for_where_the_server_does_not_recurse() {
    let first = "cluster-2.example";
    let server = Zone::new()
        .cname(first, 30, "one.example")
        .cname("one.example", 30, "two.example")
        .a("two.example", 30, "192.0.2.2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(first)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));

    let ring = Zone::new()
        .cname(first, 30, "one.example")
        .cname("one.example", 30, first)
        .serve()
        .await;
    let error = resolver(&ring).resolve(&domain(first)).await.unwrap_err();
    assert!(error.to_string().contains("too many aliases"), "{error}");
}

#[tokio::test]
async fn a_service_record_behind_an_alias_is_honoured() {
    let server = Zone::new()
        .cname(REGISTRY, 30, "registry.example")
        .srv("registry.example", 30, 0, 7001, "gw.example")
        .srv(PROXY, 30, 0, 7002, "gw.example")
        .a("gw.example", 30, "192.0.2.2")
        .a(X, 30, "192.0.2.99")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:7001"]));
    assert_eq!(found.question, format!("SRV {REGISTRY}"));
}

proptest! {
    /// Whatever hickory takes for a message is read without a panic.
    #[test]
    fn no_damage_is_too_odd(damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let records = vec![alias("a.example.", "b.example."), alias("b.example.", "c.example.")];
        let mut bytes = answer(records).to_vec().unwrap();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(message) = Message::from_vec(&bytes) {
            Answer::read(&question(), message);
        }
    }
}
