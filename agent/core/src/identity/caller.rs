//! Who calls, as the listener establishes it once.

use std::fmt;

/// Who calls. Built at the listener from what the transport proves; nothing of the message is in it.
///
/// Here belongs what a transport or a token proves later: the SPIFFE id of a TLS peer, and verified claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Caller {
    /// How the caller reached the agent.
    pub transport: Transport,
}

/// How a caller reached the agent, with what that proves of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A socket of this node: the user of the process that connected (`SO_PEERCRED`).
    Unix(User),
    /// The network.
    Tcp,
}

/// The user of a process on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum User {
    /// Root, or the user that the agent runs as: such a process can do what the agent can.
    Privileged(u32),
    /// Any other user.
    Other(u32),
    /// The kernel did not say.
    Unknown,
}

impl User {
    /// The user `uid`, for an agent that runs as `own_uid`.
    #[must_use]
    pub fn of(uid: Option<u32>, own_uid: Option<u32>) -> Self {
        match uid {
            Some(uid) if uid == 0 || Some(uid) == own_uid => Self::Privileged(uid),
            Some(uid) => Self::Other(uid),
            None => Self::Unknown,
        }
    }

    /// Its number.
    #[must_use]
    pub const fn uid(self) -> Option<u32> {
        match self {
            Self::Privileged(uid) | Self::Other(uid) => Some(uid),
            Self::Unknown => None,
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.uid() {
            Some(uid) => write!(f, "user {uid}"),
            None => f.write_str("user unknown"),
        }
    }
}

impl Caller {
    /// A process of this node that runs as `user`.
    #[must_use]
    pub const fn on_node(user: User) -> Self {
        Self {
            transport: Transport::Unix(user),
        }
    }

    /// Anyone who reaches the agent by the network.
    #[must_use]
    pub const fn over_network() -> Self {
        Self {
            transport: Transport::Tcp,
        }
    }

    /// Its user, where it is a process of this node.
    #[must_use]
    pub const fn user(&self) -> Option<User> {
        match self.transport {
            Transport::Unix(user) => Some(user),
            Transport::Tcp => None,
        }
    }

    /// Whether it is a process of this node that can do what the agent can.
    #[must_use]
    pub const fn is_privileged(&self) -> bool {
        matches!(self.transport, Transport::Unix(User::Privileged(_)))
    }
}
