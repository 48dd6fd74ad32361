//! What this node does for a connection: which of its two sides is a pod here, which is a tunnel.
//!
//! | previous hop | next hop | here |
//! |---|---|---|
//! | a client's pod | an endpoint's pod | [`Case::LocalPair`]: two links that lead to each other |
//! | a client's pod | another node | [`Case::Initiate`]: the client's end of a tunnel |
//! | another node | an endpoint's pod | [`Case::Terminate`]: the server's end, which chooses the key |
//! | another node | another node | [`Case::Through`]: nothing, mechanisms pass |

use nsm_core::mechanism::{Asked, KERNEL, LOCAL, REMOTE, RemoteMechanism, choose};
use nsm_proto::connection::{Connection, Mechanism};

use crate::{
    call::pod::{NamedNetns, Pod},
    error::RequestError,
    route::{next::Route, router::Arrival},
};

/// What this node does for a connection.
#[derive(Debug, Clone)]
pub(crate) enum Case {
    /// Client and endpoint are pods of this node.
    LocalPair(Client),
    /// The client is a pod of this node, and a tunnel of this mechanism is offered to the next hop.
    Initiate(Client, RemoteMechanism),
    /// The endpoint is a pod of this node.
    Terminate(Terminated),
    /// Neither is.
    Through,
}

/// A client of this node.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub(crate) pod: Pod,
    /// Its mechanism as it came.
    pub(crate) mechanism: Mechanism,
}

/// A tunnel that ends at this node.
#[derive(Debug, Clone)]
pub(crate) struct Terminated {
    pub(crate) remote: RemoteMechanism,
    pub(crate) asked: Asked,
    /// The previous hop's mechanism as it came.
    pub(crate) mechanism: Mechanism,
}

impl Case {
    /// Decides, and parses the previous hop's mechanism where this node acts on it.
    pub(crate) fn of(
        arrival: Arrival,
        has_forwarder: bool,
        connection: &Connection,
        preferences: &[Mechanism],
        named: &NamedNetns,
        route: &Route,
    ) -> Result<Self, RequestError> {
        if !has_forwarder {
            return Ok(Self::Through);
        }
        let remotes = RemoteMechanism::ALL.map(|mechanism| (REMOTE, mechanism.wire_type()));
        let local = (LOCAL, KERNEL);
        let mechanism = match arrival {
            Arrival::Local => agreed(connection, preferences, &[local])?,
            // What its NSMgr asks for shows whether the client is a pod of this node.
            Arrival::Forwarder => {
                let mut supported = vec![local];
                supported.extend(remotes);
                agreed(connection, preferences, &supported)?
            }
            Arrival::Network if route.is_local() => agreed(connection, preferences, &remotes)?,
            Arrival::Network => return Ok(Self::Through),
        };
        if let Some(remote) = RemoteMechanism::of_type(&mechanism.r#type) {
            if !route.is_local() {
                return Ok(Self::Through);
            }
            return Ok(Self::Terminate(Terminated {
                remote,
                asked: remote.asked(&mechanism.parameters)?,
                mechanism,
            }));
        }
        let pod = Pod::of_client(&mechanism, named)?;
        let client = Client { pod, mechanism };
        if route.is_local() {
            return Ok(Self::LocalPair(client));
        }
        let payload = match connection.payload.as_str() {
            "" => &route.payload,
            payload => payload,
        };
        let remote = RemoteMechanism::for_payload(payload).ok_or_else(|| RequestError::Field {
            field: "payload",
            value: payload.to_owned(),
            reason: "no mechanism of this agent carries it to another node".to_owned(),
        })?;
        Ok(Self::Initiate(client, remote))
    }
}

/// The mechanism the previous hop has, or the first it prefers that we support.
fn agreed(
    connection: &Connection,
    preferences: &[Mechanism],
    supported: &[(&str, &str)],
) -> Result<Mechanism, RequestError> {
    let offered: Vec<&Mechanism> = connection
        .mechanism
        .iter()
        .filter(|mechanism| !mechanism.r#type.is_empty())
        .chain(preferences)
        .collect();
    let at = choose(
        offered
            .iter()
            .map(|mechanism| (mechanism.cls.as_str(), mechanism.r#type.as_str())),
        supported,
    )?;
    Ok(offered[at].clone())
}

#[cfg(test)]
mod tests {
    use nsm_core::{
        identity::{Caller, Process},
        mechanism::VXLAN,
    };

    use super::*;
    use crate::convert;

    fn of(
        (arrival, caller): (Arrival, Caller),
        offered: Mechanism,
        url: &str,
    ) -> Result<Case, RequestError> {
        Case::of(
            arrival,
            true,
            &Connection::default(),
            &[offered],
            &NamedNetns::none_of(caller, false),
            &Route::example(url),
        )
    }

    fn kernel(url: &str) -> Mechanism {
        let parameters = [("inodeURL".to_owned(), url.to_owned())].into();
        convert::mechanism(LOCAL, KERNEL, parameters)
    }

    fn vxlan(source: &str) -> Mechanism {
        let parameters = [("src_ip".to_owned(), source.to_owned())].into();
        convert::mechanism(REMOTE, VXLAN, parameters)
    }

    const ADMINISTRATOR: Process = Process {
        is_administrator: true,
        ..Process::unknown()
    };
    const ROOT: (Arrival, Caller) = (Arrival::Local, Caller::on_node(ADMINISTRATOR));
    const NETWORK: (Arrival, Caller) = (Arrival::Network, Caller::over_network());
    const ENDPOINT: &str = "unix:///run/nse.sock";
    const PEER: &str = "tcp://192.0.2.2:5006";

    #[test]
    fn what_stands_on_either_side_decides() {
        let pod = || kernel("inode://4/4026539999");
        assert!(matches!(of(ROOT, pod(), ENDPOINT), Ok(Case::LocalPair(..))));
        assert!(matches!(of(ROOT, pod(), PEER), Ok(Case::Initiate(..))));
        let tunnel = || vxlan("192.0.2.1");
        assert!(matches!(
            of(NETWORK, tunnel(), ENDPOINT),
            Ok(Case::Terminate(..))
        ));
        assert!(matches!(of(NETWORK, tunnel(), PEER), Ok(Case::Through)));
        // Without a forwarder there are no links here.
        let through = Case::of(
            Arrival::Local,
            false,
            &Connection::default(),
            &[],
            &NamedNetns::none_of(Caller::on_node(Process::unknown()), false),
            &Route::example(ENDPOINT),
        );
        assert!(matches!(through, Ok(Case::Through)));
    }

    #[test]
    fn what_the_nsmgr_asks_its_forwarder_for_decides() {
        let nsmgr = || (Arrival::Forwarder, Caller::nsmgr(ADMINISTRATOR));
        let pod = || kernel("inode://4/4026539999");
        let tunnel = || vxlan("192.0.2.1");
        for socket in [ENDPOINT, "inode://65024/7"] {
            assert!(matches!(
                of(nsmgr(), pod(), socket),
                Ok(Case::LocalPair(..))
            ));
            assert!(matches!(
                of(nsmgr(), tunnel(), socket),
                Ok(Case::Terminate(..))
            ));
        }
        assert!(matches!(of(nsmgr(), pod(), PEER), Ok(Case::Initiate(..))));
        assert!(matches!(of(nsmgr(), tunnel(), PEER), Ok(Case::Through)));
        let error = of(nsmgr(), vxlan(""), ENDPOINT).unwrap_err().to_string();
        assert!(error.contains("src_ip"), "{error}");
        // An NSMgr in a container passes descriptors as everybody.
        let nsmgr = (Arrival::Forwarder, Caller::nsmgr(Process::unknown()));
        let error = of(nsmgr, pod(), PEER).unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied);
    }

    #[test]
    fn each_side_takes_its_own_mechanisms_only() {
        for (arrival, offered, url) in [
            (NETWORK, kernel("file:///run/netns/pod"), ENDPOINT),
            (ROOT, vxlan("192.0.2.1"), PEER),
        ] {
            let error = of(arrival, offered, url).unwrap_err().to_string();
            assert!(error.contains("no common mechanism"), "{error}");
        }
    }
}
