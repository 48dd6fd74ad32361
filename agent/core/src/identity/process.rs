//! A process of this node: what the kernel proves of it when it connects.
//!
//! Root in a container is not root of the node, although both have user number 0: what differs is the namespaces that they are in.
//! An administrator of the node is root, or the agent's own user, in the pid, mount and user namespaces of process 1 or of the agent
//! itself. Those of the agent count too, because a process that shares them is in the agent's own container, or beside an agent whose
//! mount namespace is not that of process 1: it names a path and means the file that the agent finds there.

use std::fmt;

/// The identity of a namespace while it exists: device and inode of its file, as `stat` shows them. It does not show whether the
/// namespace still exists, and the inode of one that is gone can come back for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId {
    /// The device of the file system of namespaces.
    pub device: u64,
    /// The inode there.
    pub inode: u64,
}

impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.device, self.inode)
    }
}

/// The namespaces that decide what a process's user number and paths mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Surroundings {
    /// Which processes it sees, and by which numbers.
    pub pid: NamespaceId,
    /// Which files it sees.
    pub mount: NamespaceId,
    /// Where its user number and its capabilities hold.
    pub user: NamespaceId,
}

/// What `/proc` shows of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Facts {
    /// Where it lives.
    pub surroundings: Surroundings,
    /// The network namespace that it is in.
    pub net: NamespaceId,
    /// CAP_SYS_ADMIN is effective, in its user namespace.
    pub has_sys_admin: bool,
}

/// The number that the kernel gives to one network namespace and, until the machine starts again, to no other (`SO_NETNS_COOKIE`).
/// Unlike a [`NamespaceId`] it need not be held open to stay unique, which would keep a pod's namespace after the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetnsCookie(pub u64);

/// What the node looks like to the agent; fixed for the agent's life.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// The user that the agent runs as.
    pub own_user: Option<u32>,
    /// Where administrators of the node are: with process 1, and with the agent.
    pub surroundings: Vec<Surroundings>,
    /// The network namespaces of process 1 and of the agent, as far as they are seen.
    pub networks: Vec<NamespaceId>,
    /// Process 1 is seen: what is not in `networks` is not the node's own.
    pub has_all_networks: bool,
}

impl Node {
    /// Whether a network namespace is one of the node's own; none where that is not known.
    #[must_use]
    pub fn owns(&self, netns: NamespaceId) -> Option<bool> {
        if self.networks.contains(&netns) {
            return Some(true);
        }
        self.has_all_networks.then_some(false)
    }
}

/// A process of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Process {
    /// Its user as the agent's user namespace numbers it (`SO_PEERCRED`); none where the kernel did not say.
    pub user: Option<u32>,
    /// The network namespace in which it made its socket.
    pub home: Option<NetnsCookie>,
    /// None where it has ended, or is out of the agent's sight.
    pub facts: Option<Facts>,
    /// It can do what the agent can.
    pub is_administrator: bool,
}

impl Process {
    /// A process as a connection shows it, to an agent on `node`.
    #[must_use]
    pub fn seen(
        user: Option<u32>,
        home: Option<NetnsCookie>,
        facts: Option<Facts>,
        node: &Node,
    ) -> Self {
        let is_of_rank = user.is_some_and(|user| user == 0 || Some(user) == node.own_user);
        let is_at_home = facts.is_some_and(|facts| node.surroundings.contains(&facts.surroundings));
        Self {
            user,
            home,
            facts,
            is_administrator: is_of_rank && is_at_home,
        }
    }

    /// A process of which nothing is known.
    #[must_use]
    pub const fn unknown() -> Self {
        Self {
            user: None,
            home: None,
            facts: None,
            is_administrator: false,
        }
    }

    /// Whether another process is of the same user in the same pod: what one registers, the other may serve.
    #[must_use]
    pub fn is_fellow_of(&self, other: &Self) -> bool {
        let pod = |process: &Self| {
            let facts = process.facts?;
            Some((facts.surroundings.user, facts.net))
        };
        // What is out of sight is nobody's fellow.
        self.user == other.user
            && matches!((pod(self), pod(other)), (Some(one), Some(other)) if one == other)
    }

    /// The number of its user namespace.
    #[must_use]
    pub fn user_namespace(&self) -> Option<NamespaceId> {
        Some(self.facts?.surroundings.user)
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.user {
            Some(user) => write!(f, "user {user}"),
            None => f.write_str("user unknown"),
        }
    }
}

/// A user namespace, as one that owns another namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UserNamespace {
    /// Its identity.
    pub id: NamespaceId,
    /// The user that made it, as the agent's user namespace numbers it.
    pub owner: u32,
}

/// Whether a process has CAP_SYS_ADMIN over what the first of `owners` owns: the user namespace itself, then its parent, and so on up
/// to the one that has none in the agent's sight.
///
/// It is the kernel's own rule (`cap_capable` of security/commoncap.c): a capability holds in the process's user namespace and all
/// below it; and who makes a user namespace has all capabilities in it, seen from the parent. The last of `owners` was made by nobody.
#[must_use]
pub fn may_administer(process: &Process, owners: &[UserNamespace]) -> bool {
    let Some(facts) = process.facts else {
        return false;
    };
    let own = facts.surroundings.user;
    owners.iter().enumerate().any(|(at, namespace)| {
        let is_maker = || {
            let parent = owners.get(at + 1);
            parent.is_some_and(|parent| parent.id == own) && process.user == Some(namespace.owner)
        };
        (namespace.id == own && facts.has_sys_admin) || is_maker()
    })
}
