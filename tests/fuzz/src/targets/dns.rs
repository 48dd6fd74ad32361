//! The answers of DNS servers.

use hickory_resolver::proto::{
    op::Message,
    rr::{Name, RecordType},
};
use nsm_discovery::dns::answer::{Answer, Question, ips, targets};

/// A message, as the answer to each question that we ask.
pub(super) fn answer(bytes: &[u8]) {
    let Ok(message) = Message::from_vec(bytes) else {
        return;
    };
    for kind in [RecordType::A, RecordType::AAAA, RecordType::SRV] {
        let name = Name::from_ascii("x.example.").expect("a name");
        let question = Question { name, kind };
        let answer = Answer::read(&question, message.clone());
        for record in &answer.records {
            assert_eq!(record.record_type(), kind);
            assert_eq!(record.name, answer.canonical);
        }
        for ip in ips(&answer.records)
            .into_iter()
            .chain(ips(&answer.additionals))
        {
            assert!(!ip.is_unspecified() && !ip.is_multicast(), "{ip}");
        }
        let ordered = targets(&answer.records, |highest| highest / 2);
        assert!(ordered.len() <= answer.records.len().min(16));
        assert!(
            ordered
                .iter()
                .all(|srv| srv.port != 0 && !srv.target.is_root())
        );
        assert!(ordered.is_sorted_by_key(|srv| srv.priority));
    }
}
