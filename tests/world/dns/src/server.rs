//! From a query to its answer and its line in the log.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    path::Path,
    str::FromStr as _,
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;
use hickory_server::{
    net::{runtime::Time, xfer::Protocol},
    proto::{
        op::{Header, HeaderCounts, MessageType, Metadata, OpCode, ResponseCode},
        rr::{
            Name, RData, Record, RecordType,
            rdata::{A, AAAA, SOA, SRV},
        },
    },
    server::{Request, RequestHandler, ResponseHandler, ResponseInfo},
    zone_handler::MessageResponseBuilder,
};
use serde_json::json;

use crate::zone::{Fault, Lookup, Records, Zone, ZoneFile};

pub(crate) struct Handler {
    zone: Mutex<ZoneFile>,
    log: Mutex<File>,
}

/// What goes back for a query.
#[derive(Debug)]
enum Answer {
    Records(Vec<Record>),
    /// No records of that type, or no such name; with the SOA that says how long this may be cached (RFC 2308).
    Negative(ResponseCode, Box<Record>),
    Error(ResponseCode),
    Truncated,
    Silence,
}

impl Answer {
    /// The word for the log.
    fn outcome(&self) -> String {
        match self {
            Self::Records(_) => "NOERROR".to_owned(),
            Self::Negative(code, _) | Self::Error(code) => match *code {
                ResponseCode::NoError => "NOERROR".to_owned(),
                ResponseCode::NXDomain => "NXDOMAIN".to_owned(),
                ResponseCode::ServFail => "SERVFAIL".to_owned(),
                ResponseCode::Refused => "REFUSED".to_owned(),
                other => other.to_str().to_owned(),
            },
            Self::Truncated => "TRUNCATED".to_owned(),
            Self::Silence => "SILENT".to_owned(),
        }
    }

    /// The records' data as text.
    fn data(&self) -> Vec<String> {
        match self {
            Self::Records(records) => records
                .iter()
                .map(|record| record.data.to_string())
                .collect(),
            _ => Vec::new(),
        }
    }
}

impl Handler {
    pub(crate) fn open(zone: &Path, log: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(log);
        Ok(Self {
            zone: Mutex::new(ZoneFile::open(zone)?),
            log: Mutex::new(file.with_context(|| format!("create log {}", log.display()))?),
        })
    }

    fn answer(&self, name: &Name, kind: RecordType, protocol: Protocol) -> Answer {
        let mut file = self.zone.lock().unwrap_or_else(PoisonError::into_inner);
        match file.current() {
            Ok(zone) => answer(zone, name, kind, protocol),
            Err(error) => {
                eprintln!("{error:#}");
                Answer::Error(ResponseCode::ServFail)
            }
        }
    }

    fn record(&self, request: &Request, name: &Name, kind: RecordType, answer: &Answer) {
        let line = json!({
            "name": plain(name),
            "type": kind.to_string(),
            "transport": if request.protocol() == Protocol::Udp { "udp" } else { "tcp" },
            "outcome": answer.outcome(),
            "answer": answer.data(),
            "from": request.src().ip().to_string(),
        });
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        // One write a line, so that a reader never sees two of them mixed.
        if let Err(error) = log.write_all(format!("{line}\n").as_bytes()) {
            eprintln!("write the log of queries: {error}");
        }
    }
}

/// A name as the zone has it: lower-case, without the final dot.
fn plain(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_lowercase()
}

fn answer(zone: &Zone, name: &Name, kind: RecordType, protocol: Protocol) -> Answer {
    let key = plain(name);
    match zone.fault(&key) {
        Some(Fault::ServFail) => return Answer::Error(ResponseCode::ServFail),
        Some(Fault::Refused) => return Answer::Error(ResponseCode::Refused),
        Some(Fault::Silent) => return Answer::Silence,
        Some(Fault::Truncate) if protocol == Protocol::Udp => return Answer::Truncated,
        Some(Fault::Truncate) | None => {}
    }
    let records = match zone.lookup(&key) {
        Lookup::Found(records) => records_of(name, kind, records),
        Lookup::Empty => Vec::new(),
        Lookup::Missing => return Answer::Negative(ResponseCode::NXDomain, Box::new(soa(zone))),
    };
    if records.is_empty() {
        return Answer::Negative(ResponseCode::NoError, Box::new(soa(zone)));
    }
    Answer::Records(records)
}

fn records_of(name: &Name, kind: RecordType, records: &Records) -> Vec<Record> {
    let data: Vec<RData> = match kind {
        RecordType::A => records.a.iter().map(|ip| RData::A(A(*ip))).collect(),
        RecordType::AAAA => records
            .aaaa
            .iter()
            .map(|ip| RData::AAAA(AAAA(*ip)))
            .collect(),
        RecordType::SRV => records
            .srv
            .iter()
            // A target that is no name could not be sent; the zone is the test's own, so its log says what is wrong.
            .filter_map(|srv| match Name::from_str(&format!("{}.", srv.target)) {
                Ok(target) => Some(RData::SRV(SRV::new(
                    srv.priority,
                    srv.weight,
                    srv.port,
                    target,
                ))),
                Err(error) => {
                    eprintln!("SRV target {:?} of {name}: {error}", srv.target);
                    None
                }
            })
            .collect(),
        _ => Vec::new(),
    };
    data.into_iter()
        .map(|data| Record::from_rdata(name.clone(), records.ttl, data))
        .collect()
}

/// The root's SOA: the server is authoritative for everything.
fn soa(zone: &Zone) -> Record {
    let ttl = zone.negative_ttl;
    let soa = SOA::new(Name::root(), Name::root(), 1, 3600, 600, 86400, ttl);
    Record::from_rdata(Name::root(), ttl, RData::SOA(soa))
}

#[async_trait::async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response_handle: R,
    ) -> ResponseInfo {
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.authoritative = true;
        let info = request.request_info().ok();
        let question = info.filter(|_| {
            request.metadata.op_code == OpCode::Query
                && request.metadata.message_type == MessageType::Query
        });
        let answer = match question {
            Some(info) => {
                let name = Name::from(info.query.name());
                let answer = self.answer(&name, info.query.query_type(), request.protocol());
                self.record(request, &name, info.query.query_type(), &answer);
                answer
            }
            None => Answer::Error(ResponseCode::NotImp),
        };
        let (mut records, mut soa) = (Vec::new(), None);
        match answer {
            Answer::Records(found) => records = found,
            Answer::Negative(code, record) => {
                metadata.response_code = code;
                soa = Some(record);
            }
            Answer::Error(code) => metadata.response_code = code,
            Answer::Truncated => metadata.truncation = true,
            Answer::Silence => return unsent(metadata),
        }
        let builder = MessageResponseBuilder::from_message_request(request);
        let response = builder.build(metadata, &records, [], soa.as_deref(), []);
        match response_handle.send_response(response).await {
            Ok(info) => info,
            Err(error) => {
                eprintln!("answer {}: {error}", request.src());
                unsent(metadata)
            }
        }
    }
}

/// What hickory wants to hear about an answer that was not sent.
fn unsent(metadata: Metadata) -> ResponseInfo {
    Header {
        metadata,
        counts: HeaderCounts::default(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(name: &str, kind: RecordType, protocol: Protocol) -> Answer {
        let zone = r#"{"negative_ttl":7,"names":{
            "cluster-1.example":{"ttl":30,"a":["203.0.113.10","203.0.113.11"]},
            "registry.nsm-system.cluster-1.example":
                {"srv":[{"priority":0,"weight":0,"port":5005,"target":"cluster-1.example"}]},
            "quiet.example":{"fault":"silent"},"long.example":{"a":["203.0.113.1"],"fault":"truncate"}}}"#;
        let name = Name::from_str(name).unwrap();
        answer(&Zone::parse(zone).unwrap(), &name, kind, protocol)
    }

    #[test]
    fn records_come_with_name_and_ttl_as_asked() {
        let Answer::Records(records) = ask("Cluster-1.Example.", RecordType::A, Protocol::Udp)
        else {
            panic!("no records");
        };
        assert_eq!((records.len(), records[0].ttl), (2, 30));
        assert_eq!(
            Answer::Records(records).data(),
            ["203.0.113.10", "203.0.113.11"]
        );
        let Answer::Records(records) = ask(
            "registry.nsm-system.cluster-1.example.",
            RecordType::SRV,
            Protocol::Udp,
        ) else {
            panic!("no records");
        };
        assert!(matches!(&records[0].data, RData::SRV(srv) if srv.port == 5005));
    }

    #[test]
    fn negative_answers_differ() {
        let no_such_type = ask("cluster-1.example.", RecordType::AAAA, Protocol::Udp);
        assert!(
            matches!(&no_such_type, Answer::Negative(ResponseCode::NoError, soa) if soa.ttl == 7)
        );
        let no_such_name = ask("cluster-2.example.", RecordType::A, Protocol::Udp);
        assert_eq!(no_such_name.outcome(), "NXDOMAIN");
    }

    #[test]
    fn faults_come_first() {
        assert!(matches!(
            ask("quiet.example.", RecordType::A, Protocol::Udp),
            Answer::Silence
        ));
        assert!(matches!(
            ask("long.example.", RecordType::A, Protocol::Udp),
            Answer::Truncated
        ));
        assert!(matches!(
            ask("long.example.", RecordType::A, Protocol::Tcp),
            Answer::Records(_)
        ));
    }
}
