//! A connection as the tools show it, as text and as JSON.

use std::fmt::Write as _;

use nsm_controlplane::api::server::facts;
use nsm_core::{
    liveness::{BadLink, LostHop, Published, Verdict},
    mechanism::{MTU, NAME, VNI, VXLAN},
};
use nsm_proto::connection::{Connection, PathSegment};
use serde::Serialize;
use tonic::metadata::MetadataMap;

/// What an agent reports beside its answer about the hops behind it. Each is absent where another NSMgr than ours answers, or where there
/// is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// The domain that the name belongs to.
    pub(crate) domain: Option<String>,
    /// The question to DNS, and its answer.
    pub(crate) dns: Option<Dns>,
    /// The mechanism behind the agent.
    mechanism: Option<String>,
    /// The VNI of the tunnel behind the agent.
    vni: Option<u32>,
}

/// A question to DNS and its answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Dns {
    pub(crate) question: String,
    pub(crate) answer: String,
}

impl Facts {
    /// Reads what stands in the answer's metadata.
    pub(crate) fn read(metadata: &MetadataMap) -> Self {
        let text = |key| metadata.get(key)?.to_str().ok().map(str::to_owned);
        let question = text(facts::DNS_QUESTION);
        let answer = text(facts::DNS_ANSWER);
        Self {
            domain: text(facts::DOMAIN),
            dns: (question.is_some() || answer.is_some()).then(|| Dns {
                question: question.unwrap_or_default(),
                answer: answer.unwrap_or_default(),
            }),
            mechanism: text(facts::REMOTE_MECHANISM),
            vni: text(facts::VNI).and_then(|vni| vni.parse().ok()),
        }
    }
}

/// A connection, for people and programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct View {
    pub(crate) id: String,
    pub(crate) network_service: String,
    pub(crate) endpoint: String,
    pub(crate) mechanism: String,
    pub(crate) vni: Option<u32>,
    pub(crate) mtu: Option<u32>,
    pub(crate) path: Vec<String>,
    pub(crate) src_addresses: Vec<String>,
    pub(crate) dst_addresses: Vec<String>,
    pub(crate) interface: Option<String>,
    /// Why packets are known not to pass, where they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) path_down: Option<String>,
}

impl View {
    /// What is known of `connection`.
    pub(crate) fn of(connection: &Connection, facts: &Facts) -> Self {
        let mechanism = connection.mechanism.as_ref();
        let parameter = |key: &str| mechanism.and_then(|mechanism| mechanism.parameters.get(key));
        let number = |key: &str| parameter(key).and_then(|text| text.parse::<u32>().ok());
        let context = connection.context.as_ref();
        let ip = context.and_then(|context| context.ip_context.as_ref());
        let own = mechanism.map(|mechanism| mechanism.r#type.clone());
        let is_tunnel = own.as_deref() == Some(VXLAN);
        Self {
            id: connection.id.clone(),
            network_service: connection.network_service.clone(),
            endpoint: connection.network_service_endpoint_name.clone(),
            vni: facts.vni.or_else(|| number(VNI).filter(|_| is_tunnel)),
            mtu: context
                .map(|context| context.mtu)
                .filter(|&mtu| mtu > 0)
                .or_else(|| number(MTU)),
            mechanism: facts.mechanism.clone().or(own).unwrap_or_default(),
            path: connection
                .path
                .iter()
                .flat_map(|path| &path.path_segments)
                .map(|segment| segment.name.clone())
                .collect(),
            src_addresses: ip.map(|ip| ip.src_ip_addrs.clone()).unwrap_or_default(),
            dst_addresses: ip.map(|ip| ip.dst_ip_addrs.clone()).unwrap_or_default(),
            interface: parameter(NAME).cloned(),
            path_down: path_down(connection),
        }
    }

    /// `VXLAN, VNI 7, MTU 1450`.
    pub(crate) fn mechanism_words(&self) -> String {
        let mut words = if self.mechanism.is_empty() {
            "unknown".to_owned()
        } else {
            self.mechanism.clone()
        };
        if let Some(vni) = self.vni {
            write!(words, ", VNI {vni}").expect("a String takes every text");
        }
        if let Some(mtu) = self.mtu {
            write!(words, ", MTU {mtu}").expect("a String takes every text");
        }
        words
    }
}

/// The health that the hops of a connection publish.
pub(crate) fn health(connection: &Connection) -> impl Iterator<Item = Published> {
    let hops = connection.path.iter().flat_map(|path| &path.path_segments);
    hops.map(|hop| Published::read(&hop.metrics))
}

/// Why the path of a connection is down, by the first hop that publishes so.
pub(crate) fn path_down(connection: &Connection) -> Option<String> {
    let down = health(connection).find(Published::is_down)?;
    Some(down.reason.unwrap_or_else(|| "the path is down".to_owned()))
}

/// What is wrong with the link of a pod, by the first hop that publishes so; and whether it is that of the client, on the node of its
/// agent, which is the first hop behind it.
pub(crate) fn bad_link(connection: &Connection) -> Option<(String, bool)> {
    let hops = connection.path.iter().flat_map(|path| &path.path_segments);
    let mut bad = hops
        .enumerate()
        .filter_map(|(at, hop)| Some((at, BadLink::read(&hop.metrics)?)));
    let (at, bad) = bad.next()?;
    Some((bad.reason.to_string(), at <= 1))
}

/// The first hop whose next one is lost, and whether packets are known to pass. What hops behind a lost one published is old: it does not
/// count.
pub(crate) fn lost_hop(connection: &Connection) -> Option<(String, bool)> {
    let hops = || connection.path.iter().flat_map(|path| &path.path_segments);
    let is_lost = |hop: &PathSegment| LostHop::read(&hop.metrics);
    let (at, lost) = hops()
        .enumerate()
        .find_map(|(at, hop)| Some((at, is_lost(hop)?)))?;
    let mut heard = health(connection).take(at + 1);
    let is_up =
        |hop: &Published| hop.inward == Some(Verdict::Up) && hop.outward == Some(Verdict::Up);
    Some((lost.reason.to_string(), heard.any(|hop| is_up(&hop))))
}

/// The addresses, or `none`.
pub(crate) fn addresses(addresses: &[String]) -> String {
    if addresses.is_empty() {
        "none".to_owned()
    } else {
        addresses.join(", ")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use nsm_proto::{
        connection::{Mechanism, Path},
        connectioncontext::{ConnectionContext, IpContext},
    };

    use super::*;

    pub(crate) fn connection() -> Connection {
        let segment = |name: &str| PathSegment {
            name: name.to_owned(),
            id: format!("{name}-id"),
            ..PathSegment::default()
        };
        Connection {
            id: "nsc-id".to_owned(),
            network_service: "icmp-responder@cluster-2.example".to_owned(),
            mechanism: Some(Mechanism {
                cls: "LOCAL".to_owned(),
                r#type: "KERNEL".to_owned(),
                parameters: [("name".to_owned(), "nsm-1".to_owned())].into(),
            }),
            context: Some(ConnectionContext {
                ip_context: Some(IpContext {
                    src_ip_addrs: vec!["172.16.1.1/32".to_owned()],
                    dst_ip_addrs: vec!["172.16.1.0/32".to_owned()],
                    ..IpContext::default()
                }),
                mtu: 1450,
                ..ConnectionContext::default()
            }),
            path: Some(Path {
                index: 0,
                path_segments: ["nsc", "agent-1", "agent-2", "nse"].map(segment).to_vec(),
            }),
            network_service_endpoint_name: "nse@cluster-2.example".to_owned(),
            ..Connection::default()
        }
    }

    pub(crate) fn facts() -> Facts {
        let mut metadata = MetadataMap::new();
        for (key, value) in [
            ("nsm-domain", "cluster-2.example"),
            (
                "nsm-dns-question",
                "SRV registry.nsm-system.cluster-2.example",
            ),
            ("nsm-dns-answer", "203.0.113.2:5005"),
            ("nsm-remote-mechanism", "VXLAN"),
            ("nsm-vni", "4242"),
        ] {
            metadata.insert(key, value.parse().unwrap());
        }
        Facts::read(&metadata)
    }

    #[test]
    fn a_connection_is_shown_with_the_facts_of_the_agent() {
        let view = View::of(&connection(), &facts());
        assert_eq!(view.vni, Some(4242));
        assert_eq!(view.mechanism_words(), "VXLAN, VNI 4242, MTU 1450");
        assert_eq!(view.interface.as_deref(), Some("nsm-1"));
        assert_eq!(view.path, ["nsc", "agent-1", "agent-2", "nse"]);
    }

    #[test]
    fn facts_that_another_nsmgr_lacks_are_left_out() {
        let facts = Facts::read(&MetadataMap::new());
        assert_eq!(facts, Facts::default());
        let view = View::of(&connection(), &facts);
        assert_eq!(view.mechanism_words(), "KERNEL, MTU 1450");
        let view = View::of(&Connection::default(), &facts);
        assert_eq!(view.mechanism_words(), "unknown");
        assert_eq!((view.mtu, view.interface), (None, None));
        assert_eq!(addresses(&view.src_addresses), "none");
    }
}
