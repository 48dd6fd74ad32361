//! Why a link is not as wanted.

use std::{fmt, io, net::IpAddr};

use ipnet::IpNet;
use nix::errno::Errno;
use nsm_core::{
    identity::NamespaceId,
    link::{Link, LinkAlias, LinkAliasError, RouteSpec},
};

use crate::{
    netlink::{NetlinkError, Refusal},
    netns::NetnsError,
};

/// Why a link could not be made, changed, removed or read. The kernel's own message is kept.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The namespace cannot be worked in.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    /// The name belongs to a link that is not ours, or is another connection's.
    #[error(
        "interface name `{name}` is taken in network namespace {netns}, by {holder}: ask for another name"
    )]
    NameTaken {
        /// The name that was wanted.
        name: String,
        /// Where.
        netns: NamespaceId,
        /// What has it.
        holder: LinkHolder,
    },
    /// The tunnels' UDP port is somebody else's.
    #[error("UDP port {port} cannot be opened for VXLAN on this node [{kernel}]: {holder}")]
    PortTaken {
        /// The port that was wanted.
        port: u16,
        /// Who has it.
        holder: PortHolder,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// A capability is missing.
    #[error("not permitted to {action} [{kernel}]: run the agent as root, or with {capability}")]
    NotPermitted {
        /// What was tried.
        action: String,
        /// What is missing.
        capability: &'static str,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// The kernel cannot make links of this kind.
    #[error(
        "this kernel has no {kind} links [{kernel}]: load the module with `modprobe {kind}`, or enable it in the kernel"
    )]
    Unsupported {
        /// The kind.
        kind: &'static str,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// The kernel refused an address.
    #[error("address {address} was refused on link `{name}`: {kernel}{hint}", hint = address_hint(.address))]
    AddressRefused {
        /// The address.
        address: IpNet,
        /// The link.
        name: String,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// The kernel refused a route; "File exists": there is another to the same prefix, which is left alone.
    #[error("route to {prefix}{via} was refused on link `{name}`: {kernel}{hint}", prefix = .route.prefix, via = display_via(.route.via), hint = route_hint(.kernel))]
    RouteRefused {
        /// The route.
        route: RouteSpec,
        /// The link.
        name: String,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// The kernel refused a permanent neighbour.
    #[error("neighbour {ip} was refused on link `{name}`: {kernel}")]
    NeighbourRefused {
        /// The neighbour.
        ip: IpAddr,
        /// The link.
        name: String,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// The kernel refused something else.
    #[error("the kernel refused to {action}: {kernel}")]
    Refused {
        /// What was tried, on which link.
        action: String,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// The domain is not possible in the alias that marks a link as ours.
    #[error(transparent)]
    Alias(#[from] LinkAliasError),
    /// It was set as wanted, and then was not.
    #[error(
        "link `{name}` does not stay as it was set, {rest} is still to do: does something else in the pod manage its interfaces?"
    )]
    Unstable {
        /// The link.
        name: String,
        /// The first operation that is left.
        rest: String,
    },
    /// No way leads there.
    #[error(
        "no route to {remote} from this node [{kernel}]: check the node's routes and the peer's address"
    )]
    NoRoute {
        /// Where to.
        remote: IpAddr,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// The node has no route to anywhere else.
    #[error("this node has no default route: set the address of tunnels in the configuration")]
    NoDefaultRoute,
    /// Netlink itself failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// No thread for the work.
    #[error("no thread could be started for the work in a network namespace: {0}")]
    Thread(io::Error),
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        Self::Netlink(error.into())
    }
}

impl LinkError {
    /// What becomes of a refusal to create a link whose name is free.
    pub(super) fn create_refused(
        kind: &'static str,
        name: &str,
        netns: NamespaceId,
        kernel: Refusal,
    ) -> Self {
        match kernel.errno {
            // "Unknown device type".
            Errno::EOPNOTSUPP => Self::Unsupported { kind, kernel },
            _ => Self::refused(
                format!("create {kind} link `{name}` in network namespace {netns}"),
                kernel,
            ),
        }
    }

    /// What becomes of a refusal that has no reason of its own.
    pub(super) fn refused(action: impl Into<String>, kernel: Refusal) -> Self {
        let action = action.into();
        match kernel.errno {
            Errno::EPERM => Self::NotPermitted {
                action,
                capability: "CAP_NET_ADMIN",
                kernel,
            },
            _ => Self::Refused { action, kernel },
        }
    }
}

fn display_via(via: Option<IpAddr>) -> String {
    via.map(|via| format!(" via {via}")).unwrap_or_default()
}

fn address_hint(address: &IpNet) -> &'static str {
    match address {
        IpNet::V4(_) => "",
        IpNet::V6(_) => {
            "; IPv6 takes an MTU of 1280 or more, and must not be switched off in the pod (net.ipv6.conf.*.disable_ipv6)"
        }
    }
}

fn route_hint(kernel: &Refusal) -> &'static str {
    match kernel.errno {
        Errno::EEXIST => "; there is another route to it in the namespace, which is not replaced",
        _ => "",
    }
}

/// The link that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkHolder {
    /// Its kind, by the kernel's name.
    pub kind: String,
    /// The connection that it belongs to, when it is ours.
    pub alias: Option<LinkAlias>,
}

impl From<&Link> for LinkHolder {
    fn from(link: &Link) -> Self {
        Self {
            kind: link.kind.as_str().to_owned(),
            alias: link.alias.clone(),
        }
    }
}

impl From<Option<&Link>> for LinkHolder {
    /// A link that is gone again has no kind.
    fn from(link: Option<&Link>) -> Self {
        link.map_or_else(
            || Self {
                kind: String::new(),
                alias: None,
            },
            Self::from,
        )
    }
}

impl fmt::Display for LinkHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.alias {
            Some(alias) => write!(
                f,
                "the {} link of connection {}",
                self.kind,
                alias.connection_id()
            ),
            None if self.kind.is_empty() => f.write_str("a link that is gone again"),
            None => write!(f, "a {} that is not ours", self.kind),
        }
    }
}

/// Who holds a UDP port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortHolder {
    /// A process.
    Process {
        /// Its id.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// A VXLAN device of the node, of another program.
    Vxlan {
        /// Its name.
        name: String,
    },
    /// A socket whose process is not to be seen from here, or has none because the kernel opened it.
    Socket {
        /// The socket's inode, 0 for the kernel's own.
        inode: u64,
    },
    /// No socket is listed: it went away, or belongs to a VXLAN link of another kind.
    Unknown,
}

impl fmt::Display for PortHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, name } => {
                write!(f, "process {pid} (`{name}`) holds it; stop it, or agree on another port with the peer")
            }
            Self::Vxlan { name } => write!(
                f,
                "the VXLAN device `{name}` of another program holds it, such as that of a network plugin; set `tunnel.port` to another port on \
                 this node"
            ),
            Self::Socket { inode: 0 } => f.write_str(
                "the kernel holds it, for a VXLAN device that a pod has made or that is going; set `tunnel.port` to another port on this node",
            ),
            Self::Socket { inode } => write!(
                f,
                "a process that cannot be seen from here holds it (socket {inode}, see `ss -ulpe`); stop it, or agree on another port"
            ),
            Self::Unknown => f.write_str(
                "who holds it is not to be seen; see `ss -ulpen`, `ip -d link show type vxlan`",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_vxlan_is_told() {
        let netns = NamespaceId {
            device: 4,
            inode: 1,
        };
        let refusal = |errno, text: &str| Refusal {
            errno,
            text: Some(text.to_owned()),
        };
        let create = |kernel| LinkError::create_refused("vxlan", "nsm-1", netns, kernel);

        let error = create(refusal(Errno::EOPNOTSUPP, "Unknown device type"));
        assert!(matches!(
            error,
            LinkError::Unsupported { kind: "vxlan", .. }
        ));
        assert_eq!(
            error.to_string(),
            "this kernel has no vxlan links [Unknown device type (EOPNOTSUPP)]: load the module with `modprobe vxlan`, or enable it in the kernel"
        );
        assert!(matches!(
            create(refusal(Errno::EPERM, "")),
            LinkError::NotPermitted { .. }
        ));
        assert!(matches!(
            create(refusal(Errno::EINVAL, "")),
            LinkError::Refused { .. }
        ));
    }
}
