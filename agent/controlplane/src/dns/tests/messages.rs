//! Whatever a server sends is judged without a panic, and only an answer to the question counts.

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{
        Name, RData, Record,
        rdata::{A, CNAME},
    },
};
use proptest::prelude::*;

use super::*;
use crate::dns::{exchange::Question, upstream::read};

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn question() -> Question {
    Question {
        name: name("a.example."),
        kind: RecordType::A,
    }
}

fn answer(id: u16, records: Vec<Record>) -> Message {
    let mut message = Message::response(id, OpCode::Query);
    message.add_query(Query::query(question().name, RecordType::A));
    message.add_answers(records);
    message
}

fn alias(from: &str, to: &str) -> Record {
    Record::from_rdata(name(from), 9, RData::CNAME(CNAME(name(to))))
}

#[test]
fn only_the_answer_to_the_question_counts() {
    let judged = |message: &Message| {
        let bytes = message.to_vec().unwrap();
        question().judge(7, &bytes).unwrap().is_some()
    };
    let good = answer(7, Vec::new());
    assert!(judged(&good));
    assert!(!judged(&answer(8, Vec::new())), "another id");

    let mut asked_back = good.clone();
    asked_back.metadata.message_type = MessageType::Query;
    assert!(!judged(&asked_back), "a query");

    let mut other = good.clone();
    other.queries[0].name = name("b.example.");
    assert!(!judged(&other), "another name");
    other.queries[0] = Query::query(name("A.Example."), RecordType::A);
    assert!(judged(&other), "case does not matter");
    other.queries[0].query_type = RecordType::AAAA;
    assert!(!judged(&other), "another type");
    other.queries.clear();
    assert!(!judged(&other), "no question");
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
    let found = read(&question(), answer(7, chain));
    assert_eq!(found.canonical, name("c.example."));
    assert_eq!(found.answers.len(), 1);
    assert_eq!(found.answers[0].name, name("c.example."));

    let ring = vec![
        alias("a.example.", "b.example."),
        alias("b.example.", "a.example."),
    ];
    assert!(read(&question(), answer(7, ring)).answers.is_empty());
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

proptest! {
    #[test]
    fn no_bytes_are_too_odd(noise in proptest::collection::vec(any::<u8>(), 0..600)) {
        // The right id, or nothing else would be looked at.
        let bytes = [&7_u16.to_be_bytes()[..], &noise].concat();
        if let Ok(Some(message)) = question().judge(7, &bytes) {
            read(&question(), message);
        }
    }

    /// An answer with some bytes changed reaches deeper than noise.
    #[test]
    fn no_damage_is_too_odd(damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let records = vec![alias("a.example.", "b.example."), alias("b.example.", "c.example.")];
        let mut bytes = answer(7, records).to_vec().unwrap();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(Some(message)) = question().judge(7, &bytes) {
            read(&question(), message);
        }
    }
}
