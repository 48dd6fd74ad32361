//! Faults in the middle of the way: an nftables table of its own for each, in the forward hook of the namespace that
//! lies between the two nodes. (This kernel has no netem.)

use std::net::Ipv4Addr;

use crate::{
    WorldError, netns,
    plan::{Cloud, Place, Plan},
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
    /// IP packets longer than this are lost without an ICMP error. Switch TSO and GSO off on the sender: their
    /// super-packets are longer than what would leave a card.
    MtuBlackHole {
        /// The longest packet that passes, in bytes, IP header included.
        max: u16,
    },
}

/// A fault that lasts until this is dropped.
#[derive(Debug)]
#[must_use = "the fault ends when this is dropped"]
pub struct FaultGuard {
    netns: String,
    table: String,
}

impl FaultGuard {
    /// Ends the fault.
    pub fn heal(self) {}
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        // Fails only where the namespace is gone, and the fault with it.
        let _ = netns::nft(&self.netns, &format!("delete table ip {}\n", self.table));
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
    let table = format!("fault_{number}");
    let rule = rule(source, destination, what);
    netns::nft(
        &netns,
        &format!(
            "table ip {table} {{ chain middle {{ type filter hook forward priority 0; {rule}; }}; }}\n"
        ),
    )?;
    Ok(FaultGuard { netns, table })
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
    let condition = match what {
        Fault::DropAll => String::new(),
        Fault::BlockUdp { port } => format!("udp dport {port}"),
        Fault::BlockTcp { port } => format!("tcp dport {port}"),
        // nft refuses a comparison that is always true.
        Fault::Loss { per_mille } if per_mille >= 1000 => String::new(),
        Fault::Loss { per_mille } => format!("numgen random mod 1000 < {per_mille}"),
        Fault::MtuBlackHole { max } => format!("meta length > {max}"),
    };
    format!("ip saddr {source} ip daddr {destination} {condition} counter drop")
}
