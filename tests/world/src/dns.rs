//! The world's DNS server, from the outside: its zone, its faults and the queries it got.
//!
//! The server (package `nsm-world-dns`) reads its zone anew whenever the file has changed, so a change holds from the very
//! next query on. The file's format is told there.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{Process, World, WorldError, netns, plan::DNS_ADDRESS};

/// TTL of records that do not say otherwise: longer than any test, so that "asked once" means that it was cached.
const DEFAULT_TTL: u32 = 300;

/// TTL of negative answers (RFC 2308: the SOA's minimum).
const NEGATIVE_TTL: u32 = 5;

const START_DEADLINE: Duration = Duration::from_secs(10);

/// How a name goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameFault {
    /// The server answers SERVFAIL.
    ServFail,
    /// The server answers REFUSED.
    Refused,
    /// The server does not answer.
    Silent,
    /// The server answers over UDP with nothing but the truncation bit, and properly over TCP.
    Truncate,
}

/// A query that the server got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// The name, lower-case, without the final dot.
    pub name: String,
    /// The record type, as "A" or "SRV".
    pub kind: String,
    /// "udp" or "tcp".
    pub transport: String,
    /// "NOERROR", "NXDOMAIN", "SERVFAIL", "REFUSED", "TRUNCATED", or "SILENT".
    pub outcome: String,
    /// The data of the records in the answer, as text.
    pub answer: Vec<String>,
    /// Who asked.
    pub from: Option<IpAddr>,
}

/// The DNS server of a world.
#[derive(Debug)]
pub struct Dns {
    zone_file: PathBuf,
    log_file: PathBuf,
    names: Mutex<BTreeMap<String, Value>>,
    process: Process,
}

impl Dns {
    pub(crate) fn start(world: &World, program: &Path) -> Result<Self, WorldError> {
        let dir = world.run_dir().join("dns");
        fs::create_dir_all(&dir).map_err(WorldError::io(format!("create {}", dir.display())))?;
        let zone_file = dir.join("zone.json");
        let log_file = dir.join("queries.jsonl");
        let names = zone_of(world);
        write_zone(&zone_file, &names)?;
        let internet = netns::path(&world.plan().internet());
        let mut command = netns::command_in(&internet, program)?;
        command
            .arg("--listen")
            .arg(SocketAddr::from((DNS_ADDRESS, 53)).to_string());
        command
            .arg("--zone")
            .arg(&zone_file)
            .arg("--log")
            .arg(&log_file);
        let process = world.spawn("dns", command)?;
        process.wait_for_line("ready", START_DEADLINE)?;
        Ok(Self {
            zone_file,
            log_file,
            names: Mutex::new(names),
            process,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The server's address; port 53, UDP and TCP.
    pub fn address(&self) -> Ipv4Addr {
        DNS_ADDRESS
    }

    /// Sets the A and AAAA records of a name, replacing those it had.
    ///
    /// # Errors
    /// When the zone file cannot be written, as for all changes.
    pub fn set_addresses(&self, name: &str, addresses: &[IpAddr]) -> Result<(), WorldError> {
        let of = |v4: bool| -> Vec<String> {
            addresses
                .iter()
                .filter(|ip| ip.is_ipv4() == v4)
                .map(ToString::to_string)
                .collect()
        };
        self.change(name, |records| {
            records["a"] = json!(of(true));
            records["aaaa"] = json!(of(false));
        })
    }

    /// Sets the SRV record of a name, replacing those it had.
    ///
    /// # Errors
    /// As [`Dns::set_addresses`].
    pub fn set_srv(&self, name: &str, port: u16, target: &str) -> Result<(), WorldError> {
        self.change(name, |records| records["srv"] = json!([srv(port, target)]))
    }

    /// Sets the TTL of a name's records, in seconds.
    ///
    /// # Errors
    /// As [`Dns::set_addresses`].
    pub fn set_ttl(&self, name: &str, seconds: u32) -> Result<(), WorldError> {
        self.change(name, |records| records["ttl"] = json!(seconds))
    }

    /// Makes queries for a name go wrong; the name `*` stands for every name.
    ///
    /// # Errors
    /// As [`Dns::set_addresses`].
    pub fn fail(&self, name: &str, fault: NameFault) -> Result<(), WorldError> {
        let word = match fault {
            NameFault::ServFail => "servfail",
            NameFault::Refused => "refused",
            NameFault::Silent => "silent",
            NameFault::Truncate => "truncate",
        };
        self.change(name, |records| records["fault"] = json!(word))
    }

    /// Ends a name's fault.
    ///
    /// # Errors
    /// As [`Dns::set_addresses`].
    pub fn heal(&self, name: &str) -> Result<(), WorldError> {
        self.change(name, |records| records["fault"] = Value::Null)
    }

    /// Removes a name with its records and faults: it is NXDOMAIN from then on.
    ///
    /// # Errors
    /// As [`Dns::set_addresses`].
    pub fn remove(&self, name: &str) -> Result<(), WorldError> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.remove(&key(name));
        write_zone(&self.zone_file, &names)
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Value)) -> Result<(), WorldError> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        change(
            names
                .entry(key(name))
                .or_insert_with(|| json!({ "ttl": DEFAULT_TTL })),
        );
        write_zone(&self.zone_file, &names)
    }

    /// Every query so far, in order. A query is in the log before its answer leaves.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn queries(&self) -> Result<Vec<Query>, WorldError> {
        let unreadable = |message: String| WorldError::Unreadable {
            path: self.log_file.clone(),
            message,
        };
        let log =
            fs::read_to_string(&self.log_file).map_err(|error| unreadable(error.to_string()))?;
        // The last line may be in the making.
        let complete = &log[..log.rfind('\n').map_or(0, |end| end + 1)];
        complete
            .lines()
            .map(|line| parse_query(line).ok_or_else(|| unreadable(format!("strange line {line}"))))
            .collect()
    }

    /// How often a name was asked for, by record type.
    ///
    /// # Errors
    /// As [`Dns::queries`].
    pub fn asked(&self, name: &str, kind: &str) -> Result<usize, WorldError> {
        let name = key(name);
        let queries = self.queries()?;
        Ok(queries
            .iter()
            .filter(|query| query.name == name && query.kind == kind)
            .count())
    }
}

/// The name of a domain's registry in DNS (an SRV record).
pub fn registry_name(domain: &str) -> String {
    format!("registry.nsm-system.{domain}")
}

/// The name of a domain's proxy NSMgr in DNS (an SRV record).
pub fn proxy_name(domain: &str) -> String {
    format!("nsmgr-proxy.nsm-system.{domain}")
}

fn key(name: &str) -> String {
    name.trim_end_matches('.').to_lowercase()
}

fn srv(port: u16, target: &str) -> Value {
    json!({ "priority": 0, "weight": 0, "port": port, "target": key(target) })
}

/// Every domain with the public address of its first node, and SRV records where they are wanted.
fn zone_of(world: &World) -> BTreeMap<String, Value> {
    let mut names = BTreeMap::new();
    for domain in &world.plan().domains {
        let first = world
            .nodes()
            .into_iter()
            .find(|node| node.domain() == domain.name);
        let Some(first) = first else {
            continue;
        };
        // No AAAA: a domain has one when its proxy listens there.
        let records = json!({ "ttl": DEFAULT_TTL, "a": [first.public_ip()] });
        names.insert(key(&domain.name), records);
        if let Some((registry, proxy)) = domain.srv {
            let record = |port| json!({ "ttl": DEFAULT_TTL, "srv": [srv(port, &domain.name)] });
            names.insert(key(&registry_name(&domain.name)), record(registry));
            names.insert(key(&proxy_name(&domain.name)), record(proxy));
        }
    }
    names
}

/// Replaces the zone file in one step: the server never reads half of it.
fn write_zone(path: &Path, names: &BTreeMap<String, Value>) -> Result<(), WorldError> {
    let zone = json!({ "negative_ttl": NEGATIVE_TTL, "names": names });
    let fresh = path.with_extension("new");
    let written = fs::write(&fresh, zone.to_string()).and_then(|()| fs::rename(&fresh, path));
    written.map_err(WorldError::io(format!("write {}", path.display())))
}

fn parse_query(line: &str) -> Option<Query> {
    let value: Value = serde_json::from_str(line).ok()?;
    let text = |field: &str| value[field].as_str().map(str::to_owned);
    Some(Query {
        name: text("name")?,
        kind: text("type")?,
        transport: text("transport")?,
        outcome: text("outcome")?,
        answer: value["answer"]
            .as_array()?
            .iter()
            .filter_map(|data| data.as_str().map(str::to_owned))
            .collect(),
        from: text("from")?.parse().ok(),
    })
}
