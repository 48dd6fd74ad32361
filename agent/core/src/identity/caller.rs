//! Who calls, as the listener establishes it once.

use std::net::IpAddr;

use super::{Owner, Process, SpiffeId, Workload};

/// Who calls. Built at the listener from what the transport proves; nothing of the message is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// How the caller reached the agent.
    pub transport: Transport,
    /// The SPIFFE id in the certificate that it has shown; none without TLS.
    pub id: Option<SpiffeId>,
    /// Whose its things are, once its tokens have proved who has begun the path.
    pub workload: Option<Workload>,
}

/// How a caller reached the agent, with what that proves of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A socket for the processes of this node.
    Unix(Process),
    /// The socket of this node's NSMgr: who can reach it is the NSMgr.
    Forwarder(Process),
    /// The network, from this address.
    Tcp(Option<IpAddr>),
}

impl Caller {
    /// A process of this node.
    #[must_use]
    pub const fn on_node(process: Process) -> Self {
        Self {
            transport: Transport::Unix(process),
            id: None,
            workload: None,
        }
    }

    /// The NSMgr that our forwarder works for.
    #[must_use]
    pub const fn nsmgr(process: Process) -> Self {
        Self {
            transport: Transport::Forwarder(process),
            id: None,
            workload: None,
        }
    }

    /// Anyone who reaches the agent by the network, from an address that is not known.
    #[must_use]
    pub const fn over_network() -> Self {
        Self {
            transport: Transport::Tcp(None),
            id: None,
            workload: None,
        }
    }

    /// Anyone who reaches the agent by the network.
    #[must_use]
    pub fn from_address(address: Option<IpAddr>) -> Self {
        Self {
            transport: Transport::Tcp(address.map(|address| address.to_canonical())),
            id: None,
            workload: None,
        }
    }

    /// The same caller, with the id in the certificate that it has shown.
    #[must_use]
    pub fn with_id(self, id: Option<SpiffeId>) -> Self {
        Self { id, ..self }
    }

    /// The same caller, with what its tokens have proved.
    #[must_use]
    pub fn with_workload(self, workload: Workload) -> Self {
        Self {
            workload: Some(workload),
            ..self
        }
    }

    /// Its process, where it is one of this node.
    #[must_use]
    pub const fn process(&self) -> Option<&Process> {
        match &self.transport {
            Transport::Unix(process) | Transport::Forwarder(process) => Some(process),
            Transport::Tcp(_) => None,
        }
    }

    /// Whether it is a process of this node that can do what the agent can.
    #[must_use]
    pub const fn is_administrator(&self) -> bool {
        match self.process() {
            Some(process) => process.is_administrator,
            None => false,
        }
    }

    /// The owner of what it makes.
    #[must_use]
    pub fn owner(&self) -> Owner {
        match &self.transport {
            Transport::Unix(process) => Owner::Process {
                user: process.user,
                namespace: process.user_namespace(),
                home: process.home,
            },
            Transport::Forwarder(_) => Owner::Nsmgr,
            Transport::Tcp(from) => self.workload.map_or(Owner::Network(*from), Owner::Workload),
        }
    }
}
