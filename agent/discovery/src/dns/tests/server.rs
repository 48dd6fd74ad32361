//! A DNS server in this process, on loopback, with the faults that the tests need.

use std::{
    collections::{HashMap, HashSet},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hickory_server::{
    Server,
    net::{runtime::Time, xfer::Protocol},
    proto::{
        op::{Header, HeaderCounts, Metadata, ResponseCode},
        rr::{
            Name, RData, Record, RecordType,
            rdata::{A, AAAA, CNAME, SOA, SRV},
        },
    },
    server::{Request, RequestHandler, ResponseHandler, ResponseInfo},
    zone_handler::MessageResponseBuilder,
};
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::watch,
};

/// What a name does instead of answering.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Fault {
    Code(ResponseCode),
    Silent,
    /// Truncated by UDP, whole by TCP.
    Truncated,
    /// The answer waits until [`DnsServer::release`].
    Held,
}

#[derive(Default)]
pub(super) struct Zone {
    records: HashMap<(String, RecordType), Vec<Record>>,
    names: HashSet<String>,
    additionals: HashMap<String, Vec<Record>>,
    faults: HashMap<(String, RecordType), Fault>,
    negative_ttl: u32,
}

pub(super) struct DnsServer {
    pub(super) address: SocketAddr,
    handler: Handler,
    released: watch::Sender<bool>,
    // Its tasks end with it.
    _server: Server<Handler>,
}

#[derive(Clone)]
struct Handler {
    zone: Arc<Mutex<Arc<Zone>>>,
    asked: Arc<Mutex<Vec<(String, RecordType, Protocol)>>>,
    released: watch::Receiver<bool>,
}

fn name(text: &str) -> Name {
    Name::from_ascii(format!("{text}.")).unwrap()
}

impl Zone {
    pub(super) fn new() -> Self {
        Self {
            negative_ttl: 300,
            ..Self::default()
        }
    }

    fn add(mut self, owner: &str, ttl: u32, data: RData) -> Self {
        let key = (owner.to_owned(), data.record_type());
        let record = Record::from_rdata(name(owner), ttl, data);
        self.records.entry(key).or_default().push(record);
        // Every name above a name exists (RFC 8020).
        let mut rest = owner;
        loop {
            self.names.insert(rest.to_owned());
            match rest.split_once('.') {
                Some((_, parent)) => rest = parent,
                None => return self,
            }
        }
    }

    pub(super) fn a(self, owner: &str, ttl: u32, ip: &str) -> Self {
        let ip: Ipv4Addr = ip.parse().unwrap();
        self.add(owner, ttl, RData::A(A(ip)))
    }

    pub(super) fn aaaa(self, owner: &str, ttl: u32, ip: &str) -> Self {
        let ip: Ipv6Addr = ip.parse().unwrap();
        self.add(owner, ttl, RData::AAAA(AAAA(ip)))
    }

    pub(super) fn cname(self, owner: &str, ttl: u32, target: &str) -> Self {
        self.add(owner, ttl, RData::CNAME(CNAME(name(target))))
    }

    pub(super) fn srv(self, owner: &str, ttl: u32, priority: u16, port: u16, target: &str) -> Self {
        let target = if target == "." {
            Name::root()
        } else {
            name(target)
        };
        self.add(owner, ttl, RData::SRV(SRV::new(priority, 1, port, target)))
    }

    /// An address that comes along with the answers for `with`.
    pub(super) fn additional_a(mut self, with: &str, owner: &str, ttl: u32, ip: &str) -> Self {
        let ip: Ipv4Addr = ip.parse().unwrap();
        let record = Record::from_rdata(name(owner), ttl, RData::A(A(ip)));
        self.additionals
            .entry(with.to_owned())
            .or_default()
            .push(record);
        self
    }

    pub(super) fn fault(mut self, owner: &str, kind: RecordType, fault: Fault) -> Self {
        self.faults.insert((owner.to_owned(), kind), fault);
        self
    }

    pub(super) fn fault_all(self, owner: &str, fault: Fault) -> Self {
        self.fault(owner, RecordType::A, fault)
            .fault(owner, RecordType::AAAA, fault)
            .fault(
                &format!("registry.nsm-system.{owner}"),
                RecordType::SRV,
                fault,
            )
            .fault(
                &format!("nsmgr-proxy.nsm-system.{owner}"),
                RecordType::SRV,
                fault,
            )
    }

    pub(super) fn negative_ttl(mut self, seconds: u32) -> Self {
        self.negative_ttl = seconds;
        self
    }

    pub(super) async fn serve(self) -> DnsServer {
        // A port that is free for both; another process may take the TCP one in between.
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let (released, receiver) = watch::channel(false);
        let handler = Handler {
            zone: Arc::new(Mutex::new(Arc::new(self))),
            asked: Arc::default(),
            released: receiver,
        };
        let mut server = Server::new(handler.clone());
        server.register_socket(udp);
        server.register_listener(tcp, Duration::from_secs(5), 64);
        DnsServer {
            address,
            handler,
            released,
            _server: server,
        }
    }
}

impl DnsServer {
    /// How often a question was asked.
    pub(super) fn asked(&self, owner: &str, kind: RecordType) -> usize {
        self.log()
            .iter()
            .filter(|(name, asked, _)| name == owner && *asked == kind)
            .count()
    }

    pub(super) fn asked_by(&self, transport: Protocol) -> usize {
        self.log()
            .iter()
            .filter(|(_, _, by)| *by == transport)
            .count()
    }

    pub(super) fn questions(&self) -> usize {
        self.log().len()
    }

    /// Answers by another zone from now on.
    pub(super) fn change(&self, zone: Zone) {
        *self.handler.zone.lock().unwrap() = Arc::new(zone);
    }

    /// Lets what is held go.
    pub(super) fn release(&self) {
        self.released.send_replace(true);
    }

    fn log(&self) -> Vec<(String, RecordType, Protocol)> {
        let log = self.handler.asked.lock();
        log.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait::async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response: R,
    ) -> ResponseInfo {
        let zone = Arc::clone(&self.zone.lock().unwrap());
        let mut metadata = Metadata::response_from_request(&request.metadata);
        let info = request.request_info().unwrap();
        let owner = Name::from(info.query.name()).to_ascii().to_lowercase();
        let key = (
            owner.trim_end_matches('.').to_owned(),
            info.query.query_type(),
        );
        let log = (key.0.clone(), key.1, request.protocol());
        self.asked.lock().unwrap().push(log);

        let mut records = zone.records.get(&key).cloned().unwrap_or_default();
        // A real server adds what an alias leads to.
        let alias = (key.0.clone(), RecordType::CNAME);
        if let Some(aliases) = zone.records.get(&alias) {
            records.extend(aliases.iter().cloned());
            for record in aliases {
                let RData::CNAME(target) = &record.data else {
                    continue;
                };
                let target = target.0.to_ascii().trim_end_matches('.').to_owned();
                let found = zone.records.get(&(target, key.1));
                records.extend(found.into_iter().flatten().cloned());
            }
        }
        match zone.faults.get(&key) {
            Some(Fault::Silent) => return unsent(metadata),
            Some(Fault::Code(code)) => {
                metadata.response_code = *code;
                records.clear();
            }
            Some(Fault::Truncated) if request.protocol() == Protocol::Udp => {
                metadata.truncation = true;
                records.clear();
            }
            Some(Fault::Held) => {
                let mut released = self.released.clone();
                released.wait_for(|released| *released).await.unwrap();
            }
            Some(Fault::Truncated) | None => {}
        }
        let mut soa = None;
        if records.is_empty()
            && metadata.response_code == ResponseCode::NoError
            && !metadata.truncation
        {
            if !zone.names.contains(&key.0) {
                metadata.response_code = ResponseCode::NXDomain;
            }
            let ttl = zone.negative_ttl;
            let data = SOA::new(Name::root(), Name::root(), 1, 3600, 600, 86400, ttl);
            soa = Some(Record::from_rdata(Name::root(), ttl, RData::SOA(data)));
        }
        let none = Vec::new();
        let additionals = zone.additionals.get(&key.0).unwrap_or(&none);
        let builder = MessageResponseBuilder::from_message_request(request);
        let message = builder.build(metadata, &records, [], &soa, additionals);
        match response.send_response(message).await {
            Ok(info) => info,
            Err(_) => unsent(metadata),
        }
    }
}

fn unsent(metadata: Metadata) -> ResponseInfo {
    let counts = HeaderCounts::default();
    Header { metadata, counts }.into()
}
