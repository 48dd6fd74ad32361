//! A question, and the meaning of an answer to it. Pure: messages come from anybody who can reach this node's DNS servers.

use std::{fmt, net::IpAddr, time::Duration};

use hickory_resolver::proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::SRV},
};

use super::srv;

/// Aliases that are followed, within one answer and by asking again.
pub(super) const MAX_ALIASES: usize = 8;

/// A question that is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Whose records.
    pub name: Name,
    /// Which of them.
    pub kind: RecordType,
}

/// What a server answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Of the type asked for, aliases followed.
    pub records: Vec<Record>,
    /// What the server sent along, such as the addresses of targets.
    pub additionals: Vec<Record>,
    /// Where the aliases lead; the name asked for when there are none.
    pub canonical: Name,
    /// The smallest of the records and the aliases that led to them.
    pub ttl: Duration,
    /// False for NXDOMAIN: the canonical name has no records of any type.
    pub exists: bool,
    /// How long absence holds, where the zone has a time for it (RFC 2308 section 5).
    pub negative_ttl: Option<Duration>,
}

impl Answer {
    /// Reads a message, following its aliases in whatever order they stand.
    pub fn read(question: &Question, message: Message) -> Self {
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

/// The targets of service records in the order in which they are tried, without those that name no place; none where the service is not
/// offered (RFC 2782). `pick(n)` is a random number from 0 to `n`, both included.
pub fn targets(answers: &[Record], pick: impl FnMut(u32) -> u32) -> Vec<SRV> {
    let records = answers.iter().filter_map(|record| match &record.data {
        RData::SRV(srv) if !srv.target.is_root() && srv.port != 0 => Some(srv.clone()),
        _ => None,
    });
    srv::order(records.collect(), pick)
}

/// The addresses in records, IPv4 first, without those that no host has.
#[must_use]
pub fn ips(records: &[Record]) -> Vec<IpAddr> {
    let mut ips: Vec<_> = records
        .iter()
        .filter_map(|record| match &record.data {
            RData::A(a) => Some(IpAddr::V4(a.0)),
            RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
            _ => None,
        })
        .filter(|ip| !ip.is_unspecified() && !ip.is_multicast())
        .collect();
    ips.sort_by_key(IpAddr::is_ipv6);
    ips
}

/// The shortest time that one of the records holds; none for no records.
pub(super) fn min_ttl(records: &[Record]) -> Duration {
    seconds(records.iter().map(|record| record.ttl).min().unwrap_or(0))
}
