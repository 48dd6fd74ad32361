//! The rules as an operator writes them, and as they are looked up.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Deserializer, de};
use thiserror::Error;

use super::pattern::{IdPattern, NamePattern};
use crate::{
    identity::{SpiffeId, TrustDomain},
    nsm::name::Domain,
};

/// The most domains that a policy names.
pub const MOST_DOMAINS: usize = 4096;

/// What a workload is in a mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// An interdomain proxy: another agent, or NSM's nsmgr-proxy.
    Proxy,
    /// A registry, or a registry proxy.
    Registry,
    /// A node's forwarder.
    Forwarder,
    /// A node's NSMgr.
    Nsmgr,
    /// Everybody else: clients and endpoints.
    Client,
}

impl Role {
    /// Each role once. An id that fits several counts as the first of them where its things are owned.
    pub const ALL: [Self; 5] = [
        Self::Proxy,
        Self::Registry,
        Self::Forwarder,
        Self::Nsmgr,
        Self::Client,
    ];

    /// Its key in the policy.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Registry => "registry",
            Self::Forwarder => "forwarder",
            Self::Nsmgr => "nsmgr",
            Self::Client => "client",
        }
    }

    /// Whether a pod of this role is replaced by one of another name that does its work, and has to be let at what it left.
    #[must_use]
    pub const fn is_replaced(self) -> bool {
        !matches!(self, Self::Client)
    }
}

/// Which ids of a trust domain have which role. What is not given has the ids that NSM's manifests and ours give: pods of the namespace
/// nsm-system by the names of their workloads; every id is a client.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Roles {
    /// Interdomain proxies.
    pub proxy: Vec<IdPattern>,
    /// Registries and registry proxies.
    pub registry: Vec<IdPattern>,
    /// Forwarders.
    pub forwarder: Vec<IdPattern>,
    /// NSMgrs.
    pub nsmgr: Vec<IdPattern>,
    /// Clients and endpoints.
    pub client: Vec<IdPattern>,
}

impl Default for Roles {
    fn default() -> Self {
        let of = |patterns: &[&str]| -> Vec<IdPattern> {
            let parsed = patterns.iter().map(|pattern| pattern.parse());
            parsed
                .collect::<Result<_, _>>()
                .expect("each default is a pattern")
        };
        Self {
            proxy: of(&[
                "/ns/nsm-system/pod/proxy-nsmgr-*",
                "/ns/nsm-system/pod/nsmgr-proxy-*",
            ]),
            registry: of(&["/ns/nsm-system/pod/registry-*"]),
            forwarder: of(&["/ns/nsm-system/pod/forwarder-*"]),
            nsmgr: of(&["/ns/nsm-system/pod/nsmgr-*"]),
            client: of(&["/**"]),
        }
    }
}

impl Roles {
    fn patterns(&self, role: Role) -> &[IdPattern] {
        match role {
            Role::Proxy => &self.proxy,
            Role::Registry => &self.registry,
            Role::Forwarder => &self.forwarder,
            Role::Nsmgr => &self.nsmgr,
            Role::Client => &self.client,
        }
    }

    /// Whether an id, of the trust domain that these are of, has a role.
    #[must_use]
    pub fn has(&self, role: Role, id: &SpiffeId) -> bool {
        self.patterns(role)
            .iter()
            .any(|pattern| pattern.matches(id))
    }

    /// Its first role; none where no pattern is of it. An agent is proxy and registry of its domain, with one id.
    #[must_use]
    pub fn first_of(&self, id: &SpiffeId) -> Option<Role> {
        Role::ALL.into_iter().find(|role| self.has(*role, id))
    }
}

/// A domain that is not ours.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remote {
    /// Its DNS domain.
    #[serde(deserialize_with = "domain")]
    pub domain: Domain,
    /// The trust domain that speaks for it.
    pub trust_domain: TrustDomain,
    /// Which of its ids have which role.
    #[serde(default)]
    pub roles: Roles,
    /// Which of our network services it may find and ask for; none where this is not given.
    #[serde(default)]
    pub services: Vec<NamePattern>,
    /// Which names it may register here, of endpoints and of the services that they serve; none where this is not given. For registries that
    /// several domains use.
    #[serde(default)]
    pub registers: Vec<NamePattern>,
    /// In which other domains it may find and ask for services through us; none where this is not given.
    #[serde(default, deserialize_with = "domains")]
    pub relay: Vec<Domain>,
}

/// The file of a policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    /// The roles in our own trust domain.
    pub roles: Roles,
    /// Every other domain that we have to do with.
    pub domains: Vec<Remote>,
}

fn domain<'de, D: Deserializer<'de>>(from: D) -> Result<Domain, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(de::Error::custom)
}

fn domains<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Domain>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let parsed = texts.iter().map(|text| text.parse());
    parsed.collect::<Result<_, _>>().map_err(de::Error::custom)
}

/// Why rules cannot hold together.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadRules {
    /// Two sets of rules for one domain.
    #[error("the policy names the domain {0} twice: put its rules together")]
    Twice(Domain),
    /// Our own domain has no remote side.
    #[error(
        "the policy names our own domain {0} among the others: its rules are at the top, in `roles`"
    )]
    Own(Domain),
    /// More than are read.
    #[error("the policy names {0} domains, at most {MOST_DOMAINS} are read")]
    TooMany(usize),
}

impl Rules {
    /// Checks that the rules hold together for an agent of `domain`.
    ///
    /// # Errors
    /// They contradict each other.
    pub fn check(&self, domain: &Domain) -> Result<(), BadRules> {
        if self.domains.len() > MOST_DOMAINS {
            return Err(BadRules::TooMany(self.domains.len()));
        }
        let mut named = HashSet::new();
        for remote in &self.domains {
            if remote.domain == *domain {
                return Err(BadRules::Own(domain.clone()));
            }
            if !named.insert(&remote.domain) {
                return Err(BadRules::Twice(remote.domain.clone()));
            }
        }
        Ok(())
    }
}

/// The rules of one agent, ready to be asked.
#[derive(Debug, Clone)]
pub struct Access {
    pub(super) domain: Domain,
    pub(super) trust_domain: TrustDomain,
    pub(super) roles: Roles,
    remotes: Vec<Remote>,
    by_domain: HashMap<Domain, usize>,
    by_trust_domain: HashMap<TrustDomain, Vec<usize>>,
}

impl Access {
    /// The rules of an agent of `domain`, whose own certificate is of `trust_domain`.
    ///
    /// # Errors
    /// They contradict each other.
    pub fn new(domain: Domain, trust_domain: TrustDomain, rules: Rules) -> Result<Self, BadRules> {
        rules.check(&domain)?;
        let Rules { roles, domains } = rules;
        let mut by_domain = HashMap::new();
        let mut by_trust_domain: HashMap<_, Vec<_>> = HashMap::new();
        for (at, remote) in domains.iter().enumerate() {
            by_domain.insert(remote.domain.clone(), at);
            let of_trust_domain = by_trust_domain.entry(remote.trust_domain.clone());
            of_trust_domain.or_default().push(at);
        }
        Ok(Self {
            domain,
            trust_domain,
            roles,
            remotes: domains,
            by_domain,
            by_trust_domain,
        })
    }

    /// The rules of a domain.
    #[must_use]
    pub fn remote(&self, domain: &Domain) -> Option<&Remote> {
        self.by_domain.get(domain).map(|at| &self.remotes[*at])
    }

    /// The domains that a trust domain speaks for.
    pub fn remotes(&self, trust_domain: &TrustDomain) -> impl Iterator<Item = &Remote> + Clone {
        let places = self.by_trust_domain.get(trust_domain);
        places.into_iter().flatten().map(|at| &self.remotes[*at])
    }

    /// The trust domain of this agent.
    #[must_use]
    pub const fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }
}
