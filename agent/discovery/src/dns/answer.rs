//! A question, and the meaning of an answer to it. Pure.

use std::{fmt, time::Duration};

use hickory_resolver::proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType},
};

/// Aliases that are followed, within one answer and by asking again.
pub(super) const MAX_ALIASES: usize = 8;

/// A question that is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) name: Name,
    pub(super) kind: RecordType,
}

/// What a server answered.
pub(super) struct Answer {
    /// Of the type asked for, aliases followed.
    pub(super) records: Vec<Record>,
    pub(super) additionals: Vec<Record>,
    /// Where the aliases lead; the name asked for when there are none.
    pub(super) canonical: Name,
    /// The smallest of the records and the aliases that led to them.
    pub(super) ttl: Duration,
    /// False for NXDOMAIN: the canonical name has no records of any type.
    pub(super) exists: bool,
    /// How long absence holds, where the zone has a time for it (RFC 2308 section 5).
    pub(super) negative_ttl: Option<Duration>,
}

impl Answer {
    /// Reads a message, following its aliases in whatever order they stand.
    pub(super) fn read(question: &Question, message: Message) -> Self {
        let mut canonical = question.name.clone();
        let mut ttl = u32::MAX;
        for _ in 0..MAX_ALIASES {
            let alias = message
                .answers
                .iter()
                .find_map(|record| match &record.data {
                    RData::CNAME(target) if record.name == canonical => {
                        Some((record.ttl, &target.0))
                    }
                    _ => None,
                });
            let Some((alias_ttl, target)) = alias else {
                break;
            };
            ttl = ttl.min(alias_ttl);
            canonical = target.clone();
        }
        let negative_ttl = message
            .authorities
            .iter()
            .find_map(|record| match &record.data {
                RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
                _ => None,
            });
        let wanted =
            |record: &Record| record.record_type() == question.kind && record.name == canonical;
        let records: Vec<_> = message.answers.into_iter().filter(wanted).collect();
        let ttl = records.iter().map(|record| record.ttl).fold(ttl, u32::min);
        Self {
            records,
            additionals: message.additionals,
            canonical,
            ttl: seconds(ttl),
            exists: message.metadata.response_code != ResponseCode::NXDomain,
            negative_ttl: negative_ttl.map(seconds),
        }
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.to_ascii();
        write!(f, "{} {}", self.kind, name.trim_end_matches('.'))
    }
}

fn seconds(count: u32) -> Duration {
    Duration::from_secs(count.into())
}
