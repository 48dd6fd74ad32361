//! Faults: an nftables table of its own for each, in the forward hook of the namespace that lies between the two nodes, or
//! in the input hook of a node that is its own obstacle. (This kernel has no netem.)

use std::net::Ipv4Addr;

use crate::{
    WorldError, netns,
    plan::{Cloud, NODE_INTERFACE, Place, Plan},
};

/// What happens to packets from one node to another; the other direction is not affected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// All packets are lost.
    DropAll,
    /// UDP packets to this port are lost.
    BlockUdp {
        /// The destination port.
        port: u16,
    },
    /// TCP packets to this port are lost.
    BlockTcp {
        /// The destination port.
        port: u16,
    },
    /// Packets are lost at random.
    Loss {
        /// How many of a thousand.
        per_mille: u16,
    },
    /// IP packets longer than this are lost without an ICMP error. The sender's card, virtual as it is, hands on what is to be
    /// cut into packets uncut; with the first such fault it begins to cut as a real one does, and goes on after the fault.
    MtuBlackHole {
        /// The longest packet that passes, in bytes, IP header included.
        max: u16,
    },
    /// UDP packets to this port are lost unless they answer what the receiver sent, as behind a NAT or a firewall that nobody
    /// opened. Only what passes after the injection counts as sent.
    RepliesOnly {
        /// The destination port.
        port: u16,
    },
    /// VXLAN packets come with another VNI than they left with, as if the two sides disagreed on it.
    RewriteVni {
        /// The port of VXLAN.
        port: u16,
        /// The VNI that is changed.
        from: u32,
        /// What it is changed to.
        to: u32,
    },
}

/// A fault that lasts until this is dropped.
#[derive(Debug)]
#[must_use = "the fault ends when this is dropped"]
pub struct FaultGuard {
    netns: String,
    /// With its family, as nft names it.
    table: String,
}

impl FaultGuard {
    /// Ends the fault.
    pub fn heal(self) {}
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        // Fails only where the namespace is gone, and the fault with it.
        let _ = netns::nft(&self.netns, &format!("delete table {}\n", self.table));
    }
}

pub(crate) fn inject(
    plan: &Plan,
    from: Place,
    to: Place,
    what: Fault,
    number: usize,
) -> Result<FaultGuard, WorldError> {
    let (netns, source, destination) = middle(plan, from, to);
    let table = format!("ip fault_{number}");
    let rule = rule(source, destination, what);
    if matches!(what, Fault::MtuBlackHole { .. }) {
        let sender = &plan.domains[from.domain].nodes[from.node].name;
        // Both: of what BPF has encapsulated the kernel has not counted the segments yet.
        netns::ip(
            Some(&plan.netns(sender)),
            &format!("link set dev {NODE_INTERFACE} gso_max_segs 1 gso_max_size 1000\n"),
        )?;
    }
    netns::nft(
        &netns,
        &format!(
            "table {table} {{ chain middle {{ type filter hook forward priority 0; {rule}; }}; }}\n"
        ),
    )?;
    Ok(FaultGuard { netns, table })
}

/// The node's own firewall drops UDP packets to a port, behind the card and before any socket.
pub(crate) fn close_port(netns: &str, port: u16, number: usize) -> Result<FaultGuard, WorldError> {
    let table = format!("inet fault_{number}");
    netns::nft(
        netns,
        &format!(
            "table {table} {{ chain own {{ type filter hook input priority 0; udp dport {port} counter drop; }}; }}\n"
        ),
    )?;
    Ok(FaultGuard {
        netns: netns.to_owned(),
        table,
    })
}

/// The namespace between two nodes, and their addresses as packets there show them.
fn middle(plan: &Plan, from: Place, to: Place) -> (String, Ipv4Addr, Ipv4Addr) {
    if plan.cloud == Cloud::Aws && from.domain == to.domain {
        // The forward hook sees the destination translated already, and the source not yet.
        return (
            plan.gateway(from.domain),
            from.private_ip(),
            to.private_ip(),
        );
    }
    (plan.internet(), from.public_ip(), to.public_ip())
}

fn rule(source: Ipv4Addr, destination: Ipv4Addr, what: Fault) -> String {
    const DROP: &str = "counter drop";
    let fate = match what {
        Fault::DropAll => DROP.to_owned(),
        Fault::BlockUdp { port } => format!("udp dport {port} {DROP}"),
        Fault::BlockTcp { port } => format!("tcp dport {port} {DROP}"),
        // nft refuses a comparison that is always true.
        Fault::Loss { per_mille } if per_mille >= 1000 => DROP.to_owned(),
        Fault::Loss { per_mille } => format!("numgen random mod 1000 < {per_mille} {DROP}"),
        Fault::MtuBlackHole { max } => format!("meta length > {max} {DROP}"),
        Fault::RepliesOnly { port } => format!("ct direction original udp dport {port} {DROP}"),
        // Behind the UDP header's eight bytes: flags, three reserved bytes, then the VNI's three (RFC 7348 section 5).
        Fault::RewriteVni { port, from, to } => {
            format!("udp dport {port} @th,96,24 {from} counter @th,96,24 set {to}")
        }
    };
    format!("ip saddr {source} ip daddr {destination} {fate}")
}
