//! What a caller may do: one function, and the rules that it may refuse by.
//!
//! | call | who may |
//! |---|---|
//! | Request, Close, Monitor, Find | every caller |
//! | Register, Unregister of an endpoint's name | every caller, but on the node only the user who has the name, and privileged users |
//! | a network namespace, by path or inode number | privileged users |
//! | a network namespace, by its passed descriptor | every caller, but the node's own only privileged users |
//! | status | privileged users |
//!
//! A rule is a variant of [`Refusal`] and an arm of [`decide`]; its table of cases is in `tests/policy.rs`.

use thiserror::Error;

use super::{Caller, Transport, User};
use crate::net::NetnsUrl;

/// A call, with the facts that its rules need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<'a> {
    /// Makes or refreshes a connection. The namespaces that it names are decided one by one: see [`Action::Namespace`].
    Request,
    /// Closes a connection.
    Close,
    /// Follows connections.
    Monitor,
    /// Registers an entry.
    Register(Name<'a>),
    /// Takes an entry out.
    Unregister(Name<'a>),
    /// Finds or watches entries.
    Find,
    /// Asks the agent about itself.
    Status,
    /// Names the network namespace of a pod as the caller's own.
    Namespace(Claim<'a>),
}

/// The name of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a> {
    /// With its domain, as errors show it.
    pub full: &'a str,
    /// The user of this node whose process has registered it, while the registration lasts.
    pub owner: Option<User>,
}

/// A network namespace that a pod names as its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim<'a> {
    /// Which end of the connection the pod is.
    pub end: End,
    /// The namespace.
    pub netns: &'a NetnsUrl,
    /// Its descriptor was passed: only a process that can reach a namespace can open it.
    pub is_passed: bool,
    /// It is the namespace that the agent runs in. Every process of the host can open that one.
    pub is_nodes_own: bool,
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
    /// An endpoint's name is its user's: another user would get the traffic of its clients, or take its service away.
    #[error(
        "endpoint `{endpoint}` is registered by {owner} of this node, and you are {caller}: choose another name, or wait until it is \
         unregistered or its registration has lapsed"
    )]
    NameOfAnotherUser {
        /// The name.
        endpoint: String,
        /// Who has it.
        owner: User,
        /// Who wants it.
        caller: User,
    },
    /// A path or an inode number is only a claim: both can be guessed.
    #[error(
        "only {} as root, or as the agent's own user, may name a network namespace ({netns}) without passing its descriptor: pass it \
         beside the call, or run as root",
        runs(*.end)
    )]
    UnprovenNamespace {
        /// Who names it.
        end: End,
        /// The namespace.
        netns: NetnsUrl,
    },
    /// The node's own namespace takes more than a descriptor.
    #[error(
        "only {} as root, or as the agent's own user, may name the node's own network namespace ({netns}): name a pod's, or run as \
         root",
        runs(*.end)
    )]
    NodesNamespace {
        /// Who names it.
        end: End,
        /// The namespace.
        netns: NetnsUrl,
    },
    /// What the agent holds is for those who administer the node.
    #[error(
        "only root, or the agent's own user, may ask for the agent's status: ask as one of them on the agent's node"
    )]
    Status,
}

fn runs(end: End) -> &'static str {
    match end {
        End::Client => "a client that runs",
        End::Endpoint => "an endpoint that registered",
    }
}

/// Decides a call.
///
/// # Errors
/// The rule that refuses it.
pub fn decide(caller: &Caller, action: Action<'_>) -> Result<(), Refusal> {
    if caller.is_privileged() {
        return Ok(());
    }
    match action {
        Action::Request | Action::Close | Action::Monitor | Action::Find => Ok(()),
        Action::Register(name) | Action::Unregister(name) => own_name(caller, name),
        Action::Namespace(claim) => own_namespace(claim),
        Action::Status => Err(Refusal::Status),
    }
}

fn own_name(caller: &Caller, name: Name<'_>) -> Result<(), Refusal> {
    // A caller from the network is of no user here. Its registry decides whose the name is.
    let (Transport::Unix(user), Some(owner)) = (caller.transport, name.owner) else {
        return Ok(());
    };
    if owner.uid().is_none() || user.uid() == owner.uid() {
        return Ok(());
    }
    Err(Refusal::NameOfAnotherUser {
        endpoint: name.full.to_owned(),
        owner,
        caller: user,
    })
}

fn own_namespace(claim: Claim<'_>) -> Result<(), Refusal> {
    let (end, netns) = (claim.end, claim.netns.clone());
    match (claim.is_passed, claim.is_nodes_own) {
        (false, _) => Err(Refusal::UnprovenNamespace { end, netns }),
        (true, true) => Err(Refusal::NodesNamespace { end, netns }),
        (true, false) => Ok(()),
    }
}
