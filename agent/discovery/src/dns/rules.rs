//! From a domain to addresses: which questions are asked and what their answers mean.
//!
//! Service records of both services and the address of the domain are asked for at the same time,
//! so that the usual case costs one round trip whichever way a domain is published; what turns out
//! not to be needed is dropped. Only the answer "there is no such record" leads on to the next
//! rule: when a server fails or stays silent the cause is reported, because falling back to default
//! ports then would connect to something that the domain did not name.

use std::{
    net::{IpAddr, SocketAddr},
    pin::pin,
    time::Duration,
};

use futures_util::future::{Either, FutureExt as _, join_all, select, try_join};
use hickory_resolver::proto::rr::{Name, RecordType, rdata::SRV};
use nsm_core::nsm::name::{Domain, DomainTarget};
use tokio::time::{Instant, timeout};

use super::{
    HostTarget, ResolverConfig,
    answer::{Question, ips, min_ttl, targets},
    error::ResolveError,
    hosts::Place,
    upstream::{Nothing, Records, Reply, Upstream},
};

/// Answers are kept at least this long: a TTL of 0 must not mean a question for every Request.
const TTL_FLOOR: Duration = Duration::from_secs(1);

/// Answers are kept at most this long: a peer that moves is found again within the hour.
const TTL_CEILING: Duration = Duration::from_secs(3600);

/// "There is no such record" is kept at most this long: a record that is published meanwhile is found after that time.
const NEGATIVE_CEILING: Duration = Duration::from_secs(5);

/// Failures of servers are kept this long, so that a burst of Requests is one question.
const FAILURE_TTL: Duration = Duration::from_secs(1);

/// How long a known IPv4 address waits for the IPv6 one (RFC 8305 section 3: 50 ms).
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);

/// The answering server of a place that the configuration has.
const HOSTS: &str = "the resolver's hosts";

/// The answering server of a domain that is an address.
const LITERAL: &str = "the name itself";

/// What a domain resolved to.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) registry: Vec<SocketAddr>,
    /// Empty when the domain publishes a registry only.
    pub(super) proxy: Vec<SocketAddr>,
    pub(super) question: String,
    pub(super) server: String,
    pub(super) ttl: Duration,
}

impl Found {
    /// The answer, for people.
    pub(super) fn answer(&self) -> String {
        let list = |addresses: &[SocketAddr]| {
            let texts: Vec<_> = addresses.iter().map(SocketAddr::to_string).collect();
            texts.join(", ")
        };
        let registry = list(&self.registry);
        if self.proxy.is_empty() {
            return format!("registry {registry}, no proxy");
        }
        format!("registry {registry}, proxy {}", list(&self.proxy))
    }
}

/// A failure and how long it is kept.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) error: ResolveError,
    pub(super) ttl: Duration,
}

/// What is known without a question: literal addresses, and hosts given as such.
pub(super) fn known(config: &ResolverConfig, domain: &Domain) -> Option<Found> {
    let (registry, proxy, server) = match (config.hosts.get(domain), domain.target()) {
        (Some(entry), _) => {
            let registry = entry.registry.place(config.registry_port);
            let proxy = entry.proxy.place(config.proxy_port);
            let (Place::Known(registry), Place::Known(proxy)) = (registry, proxy) else {
                return None;
            };
            (registry, proxy, HOSTS)
        }
        (None, DomainTarget::Socket(address)) => (address, address, LITERAL),
        (None, DomainTarget::Ip(ip)) => (
            SocketAddr::new(ip, config.registry_port),
            SocketAddr::new(ip, config.proxy_port),
            LITERAL,
        ),
        (None, DomainTarget::Name(_)) => return None,
    };
    Some(Found {
        registry: vec![registry],
        proxy: vec![proxy],
        question: domain.to_string(),
        server: server.to_owned(),
        ttl: TTL_CEILING,
    })
}

/// Asks for a domain, within the configured time.
pub(super) async fn ask(
    config: &ResolverConfig,
    upstream: &Upstream,
    domain: &Domain,
) -> Result<Found, Refusal> {
    let asker = Asker {
        config,
        upstream,
        domain: domain.as_str(),
        deadline: Instant::now() + config.timeout,
    };
    let (registry, proxy) = match config.hosts.get(domain) {
        Some(entry) => {
            let (registry, proxy) = try_join(
                asker.host(&entry.registry, config.registry_port),
                asker.host(&entry.proxy, config.proxy_port),
            )
            .await?;
            (registry, Some(proxy))
        }
        None => asker.published().await?,
    };
    let proxy_ttl = proxy.as_ref().map_or(TTL_CEILING, |proxy| proxy.ttl);
    Ok(Found {
        proxy: proxy.map(|proxy| proxy.addresses).unwrap_or_default(),
        question: registry.question,
        server: registry.server,
        ttl: registry.ttl.min(proxy_ttl).clamp(TTL_FLOOR, TTL_CEILING),
        registry: registry.addresses,
    })
}

struct Asker<'a> {
    config: &'a ResolverConfig,
    upstream: &'a Upstream,
    domain: &'a str,
    deadline: Instant,
}

/// The meaning of a service record.
enum Service {
    At(Located),
    /// There is a record, by which the service is not offered.
    NotOffered {
        question: String,
        server: String,
    },
    /// There is no record, and that holds for so long.
    NotPublished {
        ttl: Duration,
    },
}

/// Where a service is.
struct Located {
    addresses: Vec<SocketAddr>,
    question: String,
    server: String,
    ttl: Duration,
}

/// The addresses of a host, IPv4 first.
#[derive(Clone)]
struct Addresses {
    ips: Vec<IpAddr>,
    question: String,
    server: String,
    ttl: Duration,
}

impl Asker<'_> {
    /// Where an entry of the static hosts leads.
    async fn host(&self, target: &HostTarget, default_port: u16) -> Result<Located, Refusal> {
        let (name, port) = match target.place(default_port) {
            Place::Host(name, port) => (name, port),
            Place::Known(address) => {
                return Ok(Located {
                    addresses: vec![address],
                    question: address.to_string(),
                    server: HOSTS.to_owned(),
                    ttl: TTL_CEILING,
                });
            }
        };
        let found = self.addresses(&self.name(name)?).await?;
        Ok(found.at(port))
    }

    /// Registry and proxy as the domain publishes them: service records, else its address with the
    /// default ports. A domain may have a registry and no proxy (NSM's floating domain).
    async fn published(&self) -> Result<(Located, Option<Located>), Refusal> {
        let name = self.name(self.domain)?;
        let address = self.addresses(&name).shared();
        let services = pin!(try_join(
            self.service(&self.config.registry_name),
            self.service(&self.config.proxy_name),
        ));
        let (registry, proxy) = match select(services, address.clone()).await {
            Either::Left((services, _)) => services?,
            Either::Right((_, services)) => services.await?,
        };

        let mut negative_ttl = TTL_CEILING;
        let mut registry = match registry {
            Service::At(located) => located,
            Service::NotOffered { question, server } => {
                return Err(Refusal {
                    error: ResolveError::NotOffered {
                        domain: self.domain.to_owned(),
                        question,
                        server,
                    },
                    ttl: NEGATIVE_CEILING,
                });
            }
            Service::NotPublished { ttl } => {
                negative_ttl = negative_ttl.min(ttl);
                address.clone().await?.at(self.config.registry_port)
            }
        };
        let proxy = match proxy {
            Service::At(located) => Some(located),
            Service::NotOffered { .. } => None,
            Service::NotPublished { ttl } => {
                negative_ttl = negative_ttl.min(ttl);
                match address.await {
                    Ok(found) => Some(found.at(self.config.proxy_port)),
                    Err(refusal) if refusal.is_absence() => None,
                    Err(refusal) => return Err(refusal),
                }
            }
        };
        registry.ttl = registry.ttl.min(negative_ttl);
        Ok((registry, proxy))
    }

    /// The service record `service.domain` and the addresses of its targets.
    async fn service(&self, service: &str) -> Result<Service, Refusal> {
        // A domain so long that the name of the service does not fit cannot have the record.
        let Ok(name) = Name::from_ascii(format!("{service}.{}.", self.domain)) else {
            return Ok(Service::NotPublished { ttl: TTL_CEILING });
        };
        let question = Question {
            name,
            kind: RecordType::SRV,
        };
        let records = match self.ask(&question).await? {
            Reply::Records(records) => records,
            Reply::Nothing(nothing) => {
                return Ok(Service::NotPublished {
                    ttl: nothing.ttl.unwrap_or(TTL_CEILING),
                });
            }
        };
        let targets = targets(&records.answers, |highest| rand::random_range(0..=highest));
        if targets.is_empty() {
            return Ok(Service::NotOffered {
                question: question.to_string(),
                server: records.server.to_string(),
            });
        }
        let hosts = join_all(targets.iter().map(|srv| self.target(srv, &records))).await;

        let mut located = Located {
            addresses: Vec::new(),
            question: question.to_string(),
            server: records.server.to_string(),
            ttl: records.ttl,
        };
        let mut refusal = None;
        for (srv, host) in targets.iter().zip(hosts) {
            match host {
                Ok(found) => {
                    located.ttl = located.ttl.min(found.ttl);
                    located.addresses.extend(found.with_port(srv.port));
                }
                Err(error) => refusal = Some(error),
            }
        }
        // One target with an address is enough; without any, the last refusal is the answer.
        match refusal {
            Some(refusal) if located.addresses.is_empty() => Err(refusal),
            _ => Ok(Service::At(located)),
        }
    }

    /// The addresses of a service record's target: those that came with it, else asked for.
    async fn target(&self, srv: &SRV, records: &Records) -> Result<Addresses, Refusal> {
        let own: Vec<_> = records
            .additionals
            .iter()
            .filter(|record| record.name == srv.target)
            .cloned()
            .collect();
        let ips = ips(&own);
        if ips.is_empty() {
            return self.addresses(&srv.target).await;
        }
        Ok(Addresses {
            ips,
            question: String::new(),
            server: records.server.to_string(),
            ttl: min_ttl(&own),
        })
    }

    /// The addresses of a host.
    async fn addresses(&self, host: &Name) -> Result<Addresses, Refusal> {
        let question = |kind| Question {
            name: host.clone(),
            kind,
        };
        let (v4, v6) = (question(RecordType::A), question(RecordType::AAAA));
        let ask_v4 = pin!(self.ask(&v4));
        let ask_v6 = pin!(self.ask(&v6));
        let (of_v4, of_v6) = match select(ask_v4, ask_v6).await {
            Either::Left((of_v4 @ Ok(Reply::Records(_)), ask_v6)) => {
                (of_v4, timeout(RESOLUTION_DELAY, ask_v6).await.ok())
            }
            // NXDOMAIN holds for the name, whatever the type.
            Either::Left((of_v4 @ Ok(Reply::Nothing(Nothing { exists: false, .. })), _)) => {
                (of_v4, None)
            }
            Either::Left((of_v4, ask_v6)) => (of_v4, Some(ask_v6.await)),
            Either::Right((of_v6, ask_v4)) => (ask_v4.await, Some(of_v6)),
        };

        let mut found: Option<Addresses> = None;
        let mut nothing = None;
        let mut refusal = None;
        for (question, answer) in [(&v4, Some(of_v4)), (&v6, of_v6)] {
            match answer {
                Some(Ok(Reply::Records(records))) => match &mut found {
                    Some(found) => found.merge(&records),
                    none => *none = Addresses::of(question, &records),
                },
                Some(Ok(Reply::Nothing(answer))) => nothing = Some(answer),
                Some(Err(error)) => refusal = refusal.or(Some(error)),
                None => {}
            }
        }
        match (found, refusal) {
            (Some(found), _) => Ok(found),
            (None, Some(refusal)) => Err(refusal),
            (None, None) => Err(self.no_address(&v4, &v6, nothing)),
        }
    }

    /// Neither question has an address for an answer; `nothing` is the last of the answers.
    fn no_address(&self, v4: &Question, v6: &Question, nothing: Option<Nothing>) -> Refusal {
        let domain = self.domain.to_owned();
        let server = nothing.map_or_else(String::new, |nothing| nothing.server.to_string());
        let error = if nothing.is_some_and(|nothing| !nothing.exists) {
            ResolveError::NoDomain {
                domain,
                question: v4.to_string(),
                server,
            }
        } else {
            ResolveError::NoAddress {
                domain,
                question: format!("{v4} and {v6}"),
                server,
            }
        };
        let ttl = nothing.and_then(|nothing| nothing.ttl);
        Refusal {
            error,
            ttl: ttl
                .unwrap_or(NEGATIVE_CEILING)
                .clamp(TTL_FLOOR, NEGATIVE_CEILING),
        }
    }

    async fn ask(&self, question: &Question) -> Result<Reply, Refusal> {
        self.upstream
            .ask(question, self.deadline)
            .await
            .map_err(|unanswered| Refusal {
                error: self.upstream.explain(self.domain, question, &unanswered),
                ttl: FAILURE_TTL,
            })
    }

    fn name(&self, host: &str) -> Result<Name, Refusal> {
        Name::from_ascii(format!("{host}.")).map_err(|_| self.unspeakable(host))
    }

    /// A name that DNS cannot carry has no address.
    fn unspeakable(&self, host: &str) -> Refusal {
        Refusal {
            error: ResolveError::NoAddress {
                domain: self.domain.to_owned(),
                question: format!("A {host}"),
                server: "the resolver".to_owned(),
            },
            ttl: NEGATIVE_CEILING,
        }
    }
}

impl Refusal {
    /// Whether the answer is that there is nothing, rather than no answer at all.
    fn is_absence(&self) -> bool {
        matches!(
            self.error,
            ResolveError::NoDomain { .. } | ResolveError::NoAddress { .. }
        )
    }
}

impl Addresses {
    /// The addresses in an answer, if it has any.
    fn of(question: &Question, records: &Records) -> Option<Self> {
        let ips = ips(&records.answers);
        (!ips.is_empty()).then(|| Self {
            ips,
            question: question.to_string(),
            server: records.server.to_string(),
            ttl: records.ttl,
        })
    }

    /// Takes those of another answer in.
    fn merge(&mut self, records: &Records) {
        self.ips.extend(ips(&records.answers));
        self.ttl = self.ttl.min(records.ttl);
    }

    fn with_port(&self, port: u16) -> impl Iterator<Item = SocketAddr> {
        self.ips.iter().map(move |ip| SocketAddr::new(*ip, port))
    }

    fn at(self, port: u16) -> Located {
        Located {
            addresses: self.with_port(port).collect(),
            question: self.question,
            server: self.server,
            ttl: self.ttl,
        }
    }
}
