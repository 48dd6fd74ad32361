//! What is wrong with a link that stands, in words.

use std::fmt;

use super::Operation;

/// Something on a pod's link that keeps packets from passing. As text: a clause about the link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkFault(Operation);

impl LinkFault {
    /// The link is not there.
    #[must_use]
    pub const fn gone() -> Self {
        Self(Operation::Create)
    }
}

/// What is wrong with a link, by the operations that would make it right. What lies on it beside what is wanted, and another MTU, keep no
/// packet of the connection from passing by themselves: they are no faults.
#[must_use]
pub fn faults(plan: &[Operation]) -> Vec<LinkFault> {
    let is_fault = |operation: &&Operation| match operation {
        Operation::Delete
        | Operation::SetMtu(_)
        | Operation::RemoveRoute(_)
        | Operation::RemoveNeighbour(_)
        | Operation::RemoveAddress(_) => false,
        Operation::Create
        | Operation::SetMac(_)
        | Operation::SetUp
        | Operation::AddAddress(_)
        | Operation::SetNeighbour(..)
        | Operation::AddRoute(_) => true,
    };
    let is_created = plan.contains(&Operation::Create);
    plan.iter()
        .filter(is_fault)
        // What a link that is gone lacks goes without saying.
        .filter(|operation| !is_created || **operation == Operation::Create)
        .cloned()
        .map(LinkFault)
        .collect()
}

impl fmt::Display for LinkFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Operation::Create => f.write_str("it is gone, or has another name"),
            Operation::SetMac(mac) => write!(f, "its Ethernet address is not {mac} any more"),
            Operation::SetUp => f.write_str("it is down"),
            Operation::AddAddress(address) => write!(f, "its address {address} is gone"),
            Operation::SetNeighbour(ip, _) => write!(f, "its neighbour {ip} is gone or changed"),
            Operation::AddRoute(route) => write!(f, "its route to {} is gone", route.prefix),
            other => write!(f, "{other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::RouteSpec, *};

    #[test]
    fn what_keeps_packets_from_passing_is_said_once() {
        let route = RouteSpec {
            prefix: "172.16.1.2/32".parse().unwrap(),
            via: None,
        };
        let address = Operation::AddAddress("fd00::1/128".parse().unwrap());
        let texts = |plan: &[Operation]| -> Vec<String> {
            faults(plan).iter().map(ToString::to_string).collect()
        };
        assert_eq!(
            texts(&[
                Operation::SetMtu(1400),
                Operation::SetUp,
                Operation::RemoveRoute(route),
                address,
                Operation::AddRoute(route),
            ]),
            [
                "it is down",
                "its address fd00::1/128 is gone",
                "its route to 172.16.1.2/32 is gone"
            ]
        );
        assert_eq!(
            texts(&[Operation::Delete, Operation::Create, Operation::SetUp]),
            ["it is gone, or has another name"]
        );
        assert_eq!(texts(&[]), [""; 0]);
    }
}
