//! The decisions.

use thiserror::Error;

use super::rules::{Access, Remote, Role};
use crate::{
    identity::{SpiffeId, TrustDomain, Workload},
    nsm::name::Domain,
};

/// What a caller over the network asks for. The domain is none where the name is of our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask<'a> {
    /// A connection to a network service.
    Request {
        /// The service, without its domain.
        service: &'a str,
        /// Its domain.
        domain: Option<&'a Domain>,
        /// The id of the path's first segment.
        first: &'a SpiffeId,
    },
    /// Entries of a registry. Of our own domain only those are answered that the caller sees: [`Access::sees`].
    Find {
        /// The domain of the names.
        domain: Option<&'a Domain>,
    },
    /// To register an entry, or to take it out.
    Register {
        /// Every name of the entry, those of the services that it says it serves as well, without their domain.
        names: &'a [&'a str],
        /// Their domain.
        domain: Option<&'a Domain>,
        /// The id of the path's first segment: the registrant.
        first: &'a SpiffeId,
    },
    /// The end of a connection, or news of connections. Whose they are is asked for each.
    Follow,
}

/// Whom a server has to be that we call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server<'a> {
    /// A system of our own domain: an upstream NSMgr, our registry, another agent, an endpoint.
    Own,
    /// The proxy or registry of a domain.
    Of(&'a Domain),
    /// A proxy that an entry of a floating registry names: of the domain that registered the entry.
    RegisteredBy(&'a SpiffeId),
}

/// The rule that denied a call. Each text has the rule, the id, and what to change.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Denied {
    /// Nobody has said what a trust domain may do.
    #[error(
        "{id} is of the trust domain {trust_domain}, which the policy gives no domain: name the domain that it speaks for, in `domains`, with \
         `trust_domain: {trust_domain}`",
        trust_domain = .id.trust_domain()
    )]
    UnknownTrustDomain {
        /// Who is meant.
        id: SpiffeId,
    },
    /// The id has another role, or none.
    #[error(
        "{id} is none of {domain} that may do this, which takes the role {}: give the id one in the policy, in `roles` of that domain",
        keys(.wanted)
    )]
    Role {
        /// Who is meant.
        id: SpiffeId,
        /// The domain that speaks for it.
        domain: Domain,
        /// The roles that would do.
        wanted: &'static [Role],
    },
    /// A service that the domain does not see. For the caller it does not exist; this text is for the log.
    #[error(
        "{id} may not see the network service `{service}`: add it to the `services` of that domain in the policy if it may"
    )]
    Service {
        /// Who is meant.
        id: SpiffeId,
        /// The service.
        service: String,
    },
    /// A third domain is asked for through us.
    #[error(
        "{id} may not reach {domain} through this agent: add {domain} to the `relay` of the caller's domain in the policy if it may"
    )]
    Relay {
        /// Who is meant.
        id: SpiffeId,
        /// The domain that it asks for.
        domain: Domain,
    },
    /// A domain sends what another's client has begun.
    #[error(
        "{id} sends a call that {first} has begun, of another trust domain: a domain asks for its own clients; let {first} ask here itself"
    )]
    OfThird {
        /// Who is meant.
        id: SpiffeId,
        /// The id of the path's first segment.
        first: SpiffeId,
    },
    /// A domain that nobody has named.
    #[error(
        "the policy does not name the domain {domain}, so nobody can prove to be of it: add it to `domains`, with its trust domain"
    )]
    UnnamedDomain {
        /// The domain.
        domain: Domain,
    },
    /// Names of ours are registered by our own systems.
    #[error(
        "{id} may not register `{name}`: add the name to the `registers` of that domain in the policy if it may"
    )]
    Registers {
        /// Who is meant.
        id: SpiffeId,
        /// The name.
        name: String,
    },
    /// A name of a third domain is to be registered through us, under our id.
    #[error(
        "{id} may not register names of {domain} through this agent: they would be registered under this agent's id; let it register there \
         itself"
    )]
    RegistersElsewhere {
        /// Who is meant.
        id: SpiffeId,
        /// The domain of the names.
        domain: Domain,
    },
    /// A process of this node has an id of elsewhere.
    #[error(
        "{id} is not of this agent's trust domain {trust_domain}, and sockets of the node are for that: give the pod an identity of {trust_domain}"
    )]
    OnNode {
        /// Who is meant.
        id: SpiffeId,
        /// Our own trust domain.
        trust_domain: TrustDomain,
    },
    /// A server is of another trust domain than the domain that was asked.
    #[error(
        "the server of {domain} shows the id {id}, and {wanted} speaks for {domain}: check the DNS records of {domain}, or the `trust_domain` \
         of {domain} in the policy"
    )]
    Server {
        /// Who is meant.
        id: SpiffeId,
        /// The domain that was asked.
        domain: Domain,
        /// The trust domain that speaks for it.
        wanted: TrustDomain,
    },
    /// A proxy of a floating registry's entry is of another trust domain than the registrant.
    #[error(
        "the proxy of an endpoint that {registrant} has registered shows the id {id}, of another trust domain: it would get another domain's traffic"
    )]
    Registrant {
        /// Who is meant.
        id: SpiffeId,
        /// Who has registered the entry.
        registrant: SpiffeId,
    },
}

fn keys(roles: &[Role]) -> String {
    let keys: Vec<_> = roles.iter().map(|role| role.key()).collect();
    keys.join(" or ")
}

impl Denied {
    /// The rule's name, as metrics and the log have it. One of nine.
    #[must_use]
    pub const fn rule(&self) -> &'static str {
        match self {
            Self::UnknownTrustDomain { .. } => "trust_domain",
            Self::Role { .. } => "role",
            Self::Service { .. } => "services",
            Self::Relay { .. } => "relay",
            Self::OfThird { .. } => "first_segment",
            Self::UnnamedDomain { .. } => "domains",
            Self::Registers { .. } | Self::RegistersElsewhere { .. } => "registers",
            Self::OnNode { .. } => "node",
            Self::Server { .. } | Self::Registrant { .. } => "server",
        }
    }
}

const OF_REQUEST: &[Role] = &[Role::Proxy];
const OF_FIND: &[Role] = &[Role::Registry, Role::Proxy];
const OF_REGISTER: &[Role] = &[Role::Registry, Role::Proxy, Role::Nsmgr];
const ANY: &[Role] = &Role::ALL;

impl Access {
    /// Decides a call over the network, by the id in the caller's certificate.
    ///
    /// # Errors
    /// The rule that denies it.
    pub fn check_caller(&self, id: &SpiffeId, ask: Ask<'_>) -> Result<(), Denied> {
        if *id.trust_domain() == self.trust_domain {
            return self.check_own(id, ask);
        }
        let remotes = self.remotes(id.trust_domain());
        let mut denied = Denied::UnknownTrustDomain { id: id.clone() };
        for remote in remotes {
            match self.check_remote(remote, id, ask) {
                Ok(()) => return Ok(()),
                Err(error) => denied = error,
            }
        }
        Err(denied)
    }

    /// Decides a call over a socket of this node.
    ///
    /// # Errors
    /// The rule that denies it.
    pub fn check_on_node(&self, id: &SpiffeId, domain: Option<&Domain>) -> Result<(), Denied> {
        if *id.trust_domain() != self.trust_domain {
            return Err(Denied::OnNode {
                id: id.clone(),
                trust_domain: self.trust_domain.clone(),
            });
        }
        self.need(id, ANY)?;
        self.check_named(domain)
    }

    /// Decides whether a server is who it should be, by the id in its certificate. `role` is what it is asked as.
    ///
    /// # Errors
    /// The rule that denies it.
    pub fn check_server(
        &self,
        id: &SpiffeId,
        server: Server<'_>,
        role: Role,
    ) -> Result<(), Denied> {
        let roles: &'static [Role] = match role {
            Role::Registry => OF_FIND,
            Role::Proxy => OF_REQUEST,
            _ => ANY,
        };
        match server {
            Server::Own if *id.trust_domain() == self.trust_domain => self.need(id, ANY),
            Server::Own => Err(Denied::Server {
                id: id.clone(),
                domain: self.domain.clone(),
                wanted: self.trust_domain.clone(),
            }),
            Server::Of(domain) => {
                let remote = self.remote(domain).ok_or_else(|| unnamed(domain))?;
                if *id.trust_domain() != remote.trust_domain {
                    return Err(Denied::Server {
                        id: id.clone(),
                        domain: domain.clone(),
                        wanted: remote.trust_domain.clone(),
                    });
                }
                has_one(remote, id, roles)
            }
            Server::RegisteredBy(registrant) => self.check_registrants(id, registrant, roles),
        }
    }

    fn check_registrants(
        &self,
        id: &SpiffeId,
        registrant: &SpiffeId,
        roles: &'static [Role],
    ) -> Result<(), Denied> {
        if id.trust_domain() != registrant.trust_domain() {
            return Err(Denied::Registrant {
                id: id.clone(),
                registrant: registrant.clone(),
            });
        }
        if *id.trust_domain() == self.trust_domain {
            return self.need(id, roles);
        }
        let mut denied = Denied::UnknownTrustDomain { id: id.clone() };
        for remote in self.remotes(id.trust_domain()) {
            match has_one(remote, id, roles) {
                Ok(()) => return Ok(()),
                Err(error) => denied = error,
            }
        }
        Err(denied)
    }

    /// Whether a caller over the network sees a network service of ours: by the domain whose registry or proxy it is, where one trust
    /// domain speaks for several.
    #[must_use]
    pub fn sees(&self, id: &SpiffeId, service: &str) -> bool {
        let mut remotes = self.remotes(id.trust_domain());
        *id.trust_domain() == self.trust_domain
            || remotes.any(|it| has_one(it, id, OF_FIND).is_ok() && sees(it, service))
    }

    /// Whether a peer is still one that we have to do with: of our own trust domain, or of one that is named.
    ///
    /// # Errors
    /// The rule by which it is none.
    pub fn check_known(&self, id: &SpiffeId) -> Result<(), Denied> {
        self.check_caller(id, Ask::Follow)
    }

    /// Whose the things are that `id` makes on a path that `first` has begun.
    #[must_use]
    pub fn workload(&self, id: &SpiffeId, first: &SpiffeId) -> Workload {
        let role = if *id.trust_domain() == self.trust_domain {
            let role = self.roles.first_of(id);
            role.map(|role| (role, &self.domain))
        } else {
            let mut remotes = self.remotes(id.trust_domain());
            remotes.find_map(|remote| Some((remote.roles.first_of(id)?, &remote.domain)))
        };
        match role {
            // A trust domain may speak for several domains, whose systems are strangers to each other.
            Some((role, domain)) if role.is_replaced() => {
                Workload::of_role(id.trust_domain(), domain, role.key(), first)
            }
            _ => Workload::of_id(id, first),
        }
    }

    /// Inside our own trust domain every system may ask for everything; names are registered by those that do so for others.
    fn check_own(&self, id: &SpiffeId, ask: Ask<'_>) -> Result<(), Denied> {
        match ask {
            Ask::Request { domain, .. } | Ask::Find { domain } => {
                self.need(id, ANY)?;
                self.check_named(domain)
            }
            Ask::Register { domain, .. } => {
                self.need(id, OF_REGISTER)?;
                self.check_named(domain)
            }
            Ask::Follow => self.need(id, ANY),
        }
    }

    fn check_remote(&self, remote: &Remote, id: &SpiffeId, ask: Ask<'_>) -> Result<(), Denied> {
        match ask {
            Ask::Request {
                service,
                domain,
                first,
            } => {
                has_one(remote, id, OF_REQUEST)?;
                begun_there(id, first)?;
                self.check_relay(remote, id, domain)?;
                if domain.is_none() && !sees(remote, service) {
                    return Err(Denied::Service {
                        id: id.clone(),
                        service: service.to_owned(),
                    });
                }
                Ok(())
            }
            Ask::Find { domain } => {
                has_one(remote, id, OF_FIND)?;
                self.check_relay(remote, id, domain)
            }
            Ask::Register {
                names,
                domain,
                first,
            } => {
                has_one(remote, id, OF_REGISTER)?;
                begun_there(id, first)?;
                check_names(remote, id, names, domain)
            }
            Ask::Follow => has_one(remote, id, ANY),
        }
    }

    fn check_relay(
        &self,
        remote: &Remote,
        id: &SpiffeId,
        domain: Option<&Domain>,
    ) -> Result<(), Denied> {
        let Some(domain) = domain else {
            return Ok(());
        };
        if !remote.relay.contains(domain) {
            return Err(Denied::Relay {
                id: id.clone(),
                domain: domain.clone(),
            });
        }
        self.check_named(Some(domain))
    }

    /// Another domain has to be named before anybody is sent there.
    fn check_named(&self, domain: Option<&Domain>) -> Result<(), Denied> {
        match domain {
            Some(domain) if self.remote(domain).is_none() => Err(unnamed(domain)),
            _ => Ok(()),
        }
    }

    fn need(&self, id: &SpiffeId, wanted: &'static [Role]) -> Result<(), Denied> {
        if wanted.iter().any(|role| self.roles.has(*role, id)) {
            return Ok(());
        }
        Err(Denied::Role {
            id: id.clone(),
            domain: self.domain.clone(),
            wanted,
        })
    }
}

fn unnamed(domain: &Domain) -> Denied {
    Denied::UnnamedDomain {
        domain: domain.clone(),
    }
}

fn sees(remote: &Remote, service: &str) -> bool {
    remote.services.iter().any(|it| it.matches(service))
}

fn has_one(remote: &Remote, id: &SpiffeId, wanted: &'static [Role]) -> Result<(), Denied> {
    if wanted.iter().any(|role| remote.roles.has(*role, id)) {
        return Ok(());
    }
    Err(Denied::Role {
        id: id.clone(),
        domain: remote.domain.clone(),
        wanted,
    })
}

/// A domain vouches for its own clients, and for nobody else's.
fn begun_there(id: &SpiffeId, first: &SpiffeId) -> Result<(), Denied> {
    if id.trust_domain() == first.trust_domain() {
        return Ok(());
    }
    Err(Denied::OfThird {
        id: id.clone(),
        first: first.clone(),
    })
}

/// What serves a service gets the traffic of its clients, so that its name has to be given as the entry's own.
fn check_names(
    remote: &Remote,
    id: &SpiffeId,
    names: &[&str],
    domain: Option<&Domain>,
) -> Result<(), Denied> {
    if let Some(domain) = domain {
        return Err(Denied::RegistersElsewhere {
            id: id.clone(),
            domain: domain.clone(),
        });
    }
    let is_given = |name: &str| remote.registers.iter().any(|it| it.matches(name));
    match names.iter().find(|name| !is_given(name)) {
        None => Ok(()),
        Some(name) => Err(Denied::Registers {
            id: id.clone(),
            name: (*name).to_owned(),
        }),
    }
}
