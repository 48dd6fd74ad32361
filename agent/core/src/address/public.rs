//! The node's public address: its sources, their order, and what to do when they differ.
//!
//! No source is always right: a metadata service has no information on a NAT of somebody else, a STUN server shows the path of one
//! packet, an operator's file may be outdated. So all are asked periodically, the first in [`Source`]'s order wins, and a different
//! answer of another one is a conflict that is shown with both values: an unnoticed change of address breaks every connection.
//!
//! A failure of a source is not the answer "no address": [`Tracker`] keeps the last answer for [`TRUST`], so that a restart of a
//! metadata service does not change the node's address.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    time::{Duration, SystemTime},
};

mod dmi;
pub mod kubernetes;
pub mod metadata;
mod routable;
pub mod stun;

pub use self::{dmi::Firmware, metadata::Provider, routable::is_globally_routable};

/// How often all sources are asked, beside each change of the node's own addresses. A cloud moves an address within seconds, on
/// request of a person; a minute is as long as a person waits for it.
pub const INTERVAL: Duration = Duration::from_secs(60);

/// How long an address is kept while its source fails to answer: longer than the restart of a metadata service or a STUN server takes,
/// shorter than the life of an address in a file without maintenance.
pub const TRUST: Duration = Duration::from_secs(10 * 60);

/// The sources of the public address, the most trusted first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The operator, in the configuration.
    Configuration,
    /// The operator, in the IP map.
    IpMap,
    /// The cloud's metadata service.
    Metadata(Provider),
    /// The node's ExternalIP in Kubernetes.
    Kubernetes,
    /// A STUN server, by the name it was configured with: it answers with the source of our packets.
    Stun(String),
    /// The address that tunnels leave from (the source of the default route unless it is configured), where it is globally routable.
    Route,
}

/// What one source answered in one round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// This address.
    Address(IpAddr),
    /// It answered that there is none.
    None,
    /// It did not answer, or not understandably: the cause as a sentence.
    Failed(String),
}

/// An address and its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The source.
    pub source: Source,
    /// The address.
    pub address: IpAddr,
}

/// What follows from everything that was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// The address that holds.
    pub chosen: Option<Finding>,
    /// The sources with another address, the most trusted first.
    pub conflicts: Vec<Finding>,
}

impl Decision {
    /// This decision before all sources have answered. While an address changes, some sources have the new one already and others do
    /// not, which is no conflict. So the conflicts are those of the `last` round that still are conflicts.
    #[must_use]
    pub fn before_the_rest(self, last: &Self) -> Self {
        let still = |chosen: &Finding, conflict: &Finding| {
            chosen.address != conflict.address && chosen.source != conflict.source
        };
        let conflicts = self.chosen.iter().flat_map(|chosen| {
            last.conflicts
                .iter()
                .filter(move |conflict| still(chosen, conflict))
        });
        Self {
            conflicts: conflicts.cloned().collect(),
            ..self
        }
    }
}

/// The present answer of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// The address, by its last answer; still there while the source fails for less than [`TRUST`].
    pub address: Option<IpAddr>,
    /// Why its last round brought no answer.
    pub trouble: Option<String>,
    /// When it answered last.
    answered: Option<SystemTime>,
}

/// The answers of all sources so far.
#[derive(Debug, Clone, Default)]
pub struct Tracker {
    known: BTreeMap<Source, Known>,
}

impl Tracker {
    /// Takes one source's answer. An address that no host has is a failure: a service that answers 0.0.0.0 has a fault, or is another.
    pub fn observe(&mut self, source: Source, outcome: Outcome, now: SystemTime) {
        let outcome = match outcome {
            Outcome::Address(address) => source.checked(address.to_canonical()),
            other => other,
        };
        let known = self.known.entry(source).or_insert(Known {
            address: None,
            trouble: None,
            answered: None,
        });
        match outcome {
            Outcome::Address(address) => {
                known.address = Some(address);
                known.trouble = None;
                known.answered = Some(now);
            }
            Outcome::None => {
                known.address = None;
                known.trouble = None;
                known.answered = Some(now);
            }
            Outcome::Failed(trouble) => {
                let is_trusted = known.answered.is_some_and(|answered| {
                    // A clock that was set back makes the answer younger than now: it is still one.
                    now.duration_since(answered).unwrap_or_default() < TRUST
                });
                if !is_trusted {
                    known.address = None;
                }
                known.trouble = Some(trouble);
            }
        }
    }

    /// Each source that was asked, the most trusted first.
    pub fn sources(&self) -> impl Iterator<Item = (&Source, &Known)> {
        self.known.iter()
    }

    /// Which address holds for a node whose tunnels leave from `local`. Only addresses of the same family count: a node's IPv6 address
    /// is no evidence about its IPv4 one.
    #[must_use]
    pub fn decide(&self, local: Option<IpAddr>) -> Decision {
        decide(
            local,
            self.known.iter().filter_map(|(source, known)| {
                Some(Finding {
                    source: source.clone(),
                    address: known.address?,
                })
            }),
        )
    }
}

/// Of findings in the order of trust, the first of `local`'s family holds; the others that differ are conflicts. Without `local` the
/// first finding decides on the family.
pub fn decide(local: Option<IpAddr>, findings: impl IntoIterator<Item = Finding>) -> Decision {
    let mut decision = Decision::default();
    let mut is_v4 = local.map(|local| local.to_canonical().is_ipv4());
    let mut findings: Vec<Finding> = findings.into_iter().collect();
    findings.sort_by(|a, b| a.source.cmp(&b.source));
    for finding in findings {
        if *is_v4.get_or_insert(finding.address.is_ipv4()) != finding.address.is_ipv4() {
            continue;
        }
        match &decision.chosen {
            None => decision.chosen = Some(finding),
            Some(chosen) if chosen.address != finding.address => decision.conflicts.push(finding),
            Some(_) => {}
        }
    }
    decision
}

impl Source {
    fn checked(&self, address: IpAddr) -> Outcome {
        let is_broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
        // An operator may mean a loopback address, for a test on one machine; an answer from elsewhere cannot be right.
        let is_own = match self {
            Self::Configuration | Self::IpMap | Self::Route => false,
            Self::Metadata(_) | Self::Kubernetes | Self::Stun(_) => address.is_loopback(),
        };
        if address.is_unspecified() || address.is_multicast() || is_broadcast || is_own {
            return Outcome::Failed(format!(
                "it says {address}, which is no address of a host that others reach"
            ));
        }
        Outcome::Address(address)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Configuration => f.write_str("configuration"),
            Self::IpMap => f.write_str("IP map"),
            Self::Metadata(provider) => write!(f, "{provider} metadata"),
            Self::Kubernetes => f.write_str("Kubernetes node"),
            Self::Stun(server) => write!(f, "STUN {server}"),
            Self::Route => f.write_str("the tunnels' own address"),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.address, self.source)
    }
}
