//! What a caller may do: one function, and the rules that it may refuse by.
//!
//! | call | who may |
//! |---|---|
//! | Request of a new connection, Find | every caller |
//! | Request, Close, Monitor of a connection that stands | its owner ([`Owner`]) |
//! | Register, Unregister of an endpoint's name | its owner, and everybody where it has none; administrators of the node, where a process of the node has it |
//! | the socket of an endpoint, by path | administrators of the node |
//! | a network namespace, by path or inode number | administrators of the node |
//! | a network namespace, by its passed descriptor | who is in it or could enter it; the NSMgr on the forwarder's socket |
//! | the network namespaces of the node itself, and all where the agent cannot find out which those are | nobody, unless the configuration allows administrators to |
//! | status | administrators of the node |
//!
//! A rule is a variant of [`Refusal`] and an arm of [`decide`]; its table of cases is in `tests/policy.rs`.

use thiserror::Error;

use super::{
    Caller, Owner, Transport,
    process::{NamespaceId, UserNamespace, may_administer},
};
use crate::net::NetnsUrl;

/// A call, with the facts that its rules need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<'a> {
    /// Makes a connection. The namespaces that it names are decided one by one: see [`Action::Namespace`].
    Request,
    /// Closes a connection.
    Close,
    /// Follows connections. Which it gets events of is decided for each: see [`Owner`].
    Monitor,
    /// Refreshes, changes or closes a connection that stands.
    Change(Connection<'a>),
    /// Registers an entry.
    Register(Name<'a>),
    /// Takes an entry out.
    Unregister(Name<'a>),
    /// Registers an endpoint by the path of its socket.
    SocketPath(&'a str),
    /// Finds or watches entries.
    Find,
    /// Asks the agent about itself.
    Status,
    /// Has the agent close everything and end.
    Drain,
    /// Names the network namespace of a pod as the caller's own.
    Namespace(Claim<'a>),
}

/// A connection that stands, and the path that a caller shows for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection<'a> {
    /// Who made it.
    pub owner: Owner,
    /// Name and id of the first segment of its path: that of the client, which stays whatever hops come and go behind it.
    pub first: Option<(&'a str, &'a str)>,
    /// The same of the path in the call.
    pub shown: Option<(&'a str, &'a str)>,
}

/// The name of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a> {
    /// With its domain, as errors show it.
    pub full: &'a str,
    /// Who has registered it, while the registration lasts.
    pub owner: Option<Owner>,
}

/// A network namespace that a pod names as its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim<'a> {
    /// Which end of the connection the pod is.
    pub end: End,
    /// The namespace as it is named.
    pub netns: &'a NetnsUrl,
    /// Which one that is; none where nothing is there.
    pub id: Option<NamespaceId>,
    /// Its descriptor was passed. That alone proves nothing: a mounted namespace can be opened by every user.
    pub is_passed: bool,
    /// It is one of the node's own: that of the agent, or of process 1; none where that is not known.
    pub is_nodes_own: Option<bool>,
    /// The configuration lets administrators name the node's own.
    pub nodes_own_allowed: bool,
    /// The user namespaces that it belongs to, innermost first; may be empty where the process is in it.
    pub owners: &'a [UserNamespace],
}

/// An end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client, in its Request.
    Client,
    /// The endpoint, in its answer. The caller of the rule is then the process that registered it.
    Endpoint,
}

/// The rule that refused a call.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// A connection is its owner's. The text is the same whoever the owner is.
    #[error(
        "this connection was made by another: only who made it may refresh, change or close it; ask for one of your own, with a fresh id"
    )]
    ConnectionOfAnother,
    /// An endpoint's name is its owner's: another would get the traffic of its clients, or take its service away.
    #[error(
        "`{name}` is registered by another: choose another name, or wait until it is unregistered or its registration has lapsed"
    )]
    NameOfAnother {
        /// The name.
        name: String,
    },
    /// A socket that is known is registered by who passed its descriptor.
    #[error(
        "the socket {url} is registered by another: serve on a socket of your own, and pass its descriptor"
    )]
    SocketOfAnother {
        /// What was named.
        url: String,
    },
    /// The agent connects as root: a path would lead it where the caller cannot go.
    #[error(
        "only root of the node may register an endpoint by the path of its socket ({url}): pass the socket's descriptor beside the call, \
         and name the socket inode://<device>/<inode>"
    )]
    SocketPath {
        /// What was named.
        url: String,
    },
    /// A path or an inode number is only a claim: both can be guessed.
    #[error(
        "only {} as root of the node, outside of any container, may name a network namespace ({netns}) without passing its descriptor: \
         pass it beside the call",
        runs(*.end)
    )]
    UnprovenNamespace {
        /// Who names it.
        end: End,
        /// The namespace.
        netns: NetnsUrl,
    },
    /// A descriptor proves that its file could be opened, which of a mounted namespace every user can.
    #[error(
        "{} is not in the network namespace {netns} that it names, and has no CAP_SYS_ADMIN over it: name its own, \
         /proc/self/ns/net",
        who(*.end)
    )]
    ForeignNamespace {
        /// Who names it.
        end: End,
        /// The namespace.
        netns: NetnsUrl,
    },
    /// Nothing can be compared.
    #[error(
        "the agent cannot see the process of {} that names the network namespace {netns}: it has ended, or the agent runs without the \
         host's processes (hostPID) or without CAP_SYS_PTRACE",
        who(*.end)
    )]
    UnseenProcess {
        /// Who names it.
        end: End,
        /// The namespace.
        netns: NetnsUrl,
    },
    /// A link there is a way into the node.
    #[error(
        "{netns} is the node's own network namespace: name a pod's; where the node itself is to be {}, set \
         `node_namespace: true` in the agent's configuration and ask as root of the node",
        role(*.end)
    )]
    NodesNamespace {
        /// Who names it.
        end: End,
        /// The namespace.
        netns: NetnsUrl,
    },
    /// It may be a way into the node.
    #[error(
        "the agent cannot find out the node's own network namespace, so that {netns} may be it, and {} gets no link in it: run the \
         agent as root with CAP_SYS_PTRACE, and in a container with the host's processes (hostPID)",
        who(*.end)
    )]
    UnknownNode {
        /// Who names it.
        end: End,
        /// The namespace.
        netns: NetnsUrl,
    },
    /// What the agent holds is for those who administer the node.
    #[error(
        "only root of the node, outside of any other container than the agent's, may ask for the agent's status: ask there"
    )]
    Status,
    /// To have the agent close everything.
    #[error(
        "only root of the node, outside of any other container than the agent's, may have the agent close everything: ask there"
    )]
    Drain,
}

fn runs(end: End) -> &'static str {
    match end {
        End::Client => "a client that runs",
        End::Endpoint => "an endpoint that registered",
    }
}

fn who(end: End) -> &'static str {
    match end {
        End::Client => "the client",
        End::Endpoint => "the endpoint that registered",
    }
}

fn role(end: End) -> &'static str {
    match end {
        End::Client => "a client",
        End::Endpoint => "an endpoint",
    }
}

/// Decides a call.
///
/// # Errors
/// The rule that refuses it.
pub fn decide(caller: &Caller, action: Action<'_>) -> Result<(), Refusal> {
    match action {
        Action::Request | Action::Close | Action::Monitor | Action::Find => Ok(()),
        Action::Change(connection) => own_connection(caller, connection),
        Action::Register(name) | Action::Unregister(name) => own_name(caller, name),
        Action::SocketPath(url) => admin(caller, || Refusal::SocketPath {
            url: url.to_owned(),
        }),
        Action::Namespace(claim) => own_namespace(caller, claim),
        Action::Status => admin(caller, || Refusal::Status),
        Action::Drain => admin(caller, || Refusal::Drain),
    }
}

fn admin(caller: &Caller, refusal: impl FnOnce() -> Refusal) -> Result<(), Refusal> {
    if caller.is_administrator() {
        Ok(())
    } else {
        Err(refusal())
    }
}

/// Administrators are no exception: what they need of others' connections is in the agent's status.
fn own_connection(caller: &Caller, connection: Connection<'_>) -> Result<(), Refusal> {
    let is_own = match connection.owner {
        owner @ Owner::Network(_) => {
            caller.owner().is_alike(&owner) && connection.shown == connection.first
        }
        owner => caller.owner() == owner,
    };
    if is_own {
        Ok(())
    } else {
        Err(Refusal::ConnectionOfAnother)
    }
}

fn own_name(caller: &Caller, name: Name<'_>) -> Result<(), Refusal> {
    let Some(owner) = name.owner else {
        return Ok(());
    };
    let is_of_node = matches!(owner, Owner::Process { .. });
    if caller.owner().is_alike(&owner) || (is_of_node && caller.is_administrator()) {
        return Ok(());
    }
    Err(Refusal::NameOfAnother {
        name: name.full.to_owned(),
    })
}

fn own_namespace(caller: &Caller, claim: Claim<'_>) -> Result<(), Refusal> {
    let (end, netns) = (claim.end, || claim.netns.clone());
    let may_be_nodes = claim.nodes_own_allowed && caller.is_administrator();
    match claim.is_nodes_own {
        Some(true) if !may_be_nodes => {
            let netns = netns();
            return Err(Refusal::NodesNamespace { end, netns });
        }
        None if !may_be_nodes => {
            let netns = netns();
            return Err(Refusal::UnknownNode { end, netns });
        }
        _ => {}
    }
    if caller.is_administrator() {
        return Ok(());
    }
    if !claim.is_passed {
        let netns = netns();
        return Err(Refusal::UnprovenNamespace { end, netns });
    }
    let process = match &caller.transport {
        // Its clients' processes are not ours to see. Who may enter the folder of the socket is the NSMgr.
        Transport::Forwarder(_) => return Ok(()),
        Transport::Unix(process) => process,
        Transport::Tcp(_) => {
            let netns = netns();
            return Err(Refusal::UnprovenNamespace { end, netns });
        }
    };
    let Some(facts) = process.facts else {
        let netns = netns();
        return Err(Refusal::UnseenProcess { end, netns });
    };
    if claim.id == Some(facts.net) || may_administer(process, claim.owners) {
        return Ok(());
    }
    let netns = netns();
    Err(Refusal::ForeignNamespace { end, netns })
}
