//! The pods of this node: which network namespace a client or endpoint may name as its own.
//!
//! A path or an inode number is only a claim: anybody can guess the host's own. It is believed of
//! processes that run as root, or as the agent's own user. Anybody else passes the namespace's
//! descriptor with its call: only a process that can reach a namespace can open it. That the node's
//! own namespace can be opened by every process of the host proves nothing: it takes more.

use std::{collections::HashMap, os::unix::fs::MetadataExt as _, sync::OnceLock, time::Duration};

use nsm_core::{
    mechanism::{KERNEL, Kernel, Parameters},
    net::NetnsUrl,
};
use nsm_proto::connection::Mechanism;

use crate::{
    call::{Calls, request::bad_answer},
    error::RequestError,
    peer::peers::Peer,
    ports::PodNetns,
    route::router::Route,
    transport::unix::{Descriptors, FileId, Kind, MissingDescriptor, PATIENCE, Passed},
};

/// A pod of this node.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    /// What its KERNEL mechanism says.
    pub(crate) kernel: Kernel,
    pub(crate) netns: PodNetns,
}

/// The namespaces that a caller's mechanisms name by inode, with what came with them.
#[derive(Debug, Default)]
pub(crate) struct PassedNetns(HashMap<NetnsUrl, Result<Passed, MissingDescriptor>>);

impl PassedNetns {
    /// Looks for the descriptors that `mechanisms` name. Of a trusted caller none is needed: there
    /// is no waiting for one that is late.
    pub(crate) async fn collect<'a>(
        descriptors: &Descriptors,
        mechanisms: impl Iterator<Item = &'a Mechanism>,
        trusted: bool,
    ) -> Self {
        let patience = if trusted { Duration::ZERO } else { PATIENCE };
        let mut found = HashMap::new();
        for mechanism in mechanisms.filter(|mechanism| mechanism.r#type == KERNEL) {
            // What cannot be parsed is told where it is used.
            let Ok(Kernel {
                netns: Some(url), ..
            }) = Kernel::parse(&mechanism.parameters)
            else {
                continue;
            };
            if let Some(id) = file_id(&url)
                && !found.contains_key(&url)
            {
                let passed = descriptors.take(id, Kind::Namespace, patience).await;
                found.insert(url, passed);
            }
        }
        Self(found)
    }
}

impl Pod {
    /// The client's pod.
    pub(crate) fn of_client(
        mechanism: &Mechanism,
        trusted: bool,
        passed: &PassedNetns,
    ) -> Result<Self, RequestError> {
        let kernel = Kernel::parse(&mechanism.parameters)?;
        let url = kernel
            .netns
            .clone()
            .ok_or(RequestError::Missing("inodeURL in its KERNEL mechanism"))?;
        let passed = passed.0.get(&url).cloned();
        let netns = believe(url, trusted, passed).map_err(|doubt| match doubt {
            Doubt::Claim(url) => RequestError::Forbidden(format!(
                "only a client that runs as root may name a network namespace ({url}) without passing its descriptor"
            )),
            Doubt::Node(url) => RequestError::Forbidden(format!(
                "only a client that runs as root may name the node's own network namespace ({url})"
            )),
            Doubt::Kind(url, reason) => RequestError::Field {
                field: "inodeURL",
                value: url.to_string(),
                reason: reason.to_string(),
            },
        })?;
        Ok(Self { kernel, netns })
    }
}

impl Calls {
    /// What an endpoint of this node answered of its pod.
    pub(crate) async fn endpoint_pod(
        &self,
        route: &Route,
        parameters: &Parameters,
    ) -> Result<Pod, RequestError> {
        let wrong = |fault: String| bad_answer(route, fault);
        let kernel = Kernel::parse(parameters).map_err(|error| wrong(error.to_string()))?;
        let Some(url) = kernel.netns.clone() else {
            return Err(wrong(
                "the endpoint's KERNEL mechanism has no inodeURL: it must name a network namespace"
                    .to_owned(),
            ));
        };
        let passed = match file_id(&url) {
            Some(id) => {
                let patience = if route.trusted {
                    Duration::ZERO
                } else {
                    PATIENCE
                };
                let peer = self.lookup.peers.get(&route.url);
                let passed = peer.descriptors.take(id, Kind::Namespace, patience);
                Some(passed.await)
            }
            None => None,
        };
        let netns = believe(url, route.trusted, passed).map_err(|doubt| match doubt {
            Doubt::Claim(url) => wrong(format!(
                "only an endpoint that registered as root may name a network namespace ({url}) without passing its descriptor"
            )),
            Doubt::Node(url) => wrong(format!(
                "only an endpoint that registered as root may name the node's own network namespace ({url})"
            )),
            Doubt::Kind(url, reason) => wrong(format!("it names {url}, and {reason}")),
        })?;
        Ok(Pod { kernel, netns })
    }
}

impl Calls {
    /// The descriptor of the namespace that an endpoint of this node named as its own, to go back to
    /// it with a Close: NSM's endpoints take the mechanism that they answered for what they are told,
    /// and wait for the descriptor of each inode in it.
    pub(crate) async fn returned_netns(
        &self,
        peer: &Peer,
        mechanism: Option<&Mechanism>,
    ) -> Option<Passed> {
        let kernel = Kernel::parse(&mechanism?.parameters).ok()?;
        let url = kernel.netns.filter(|_| peer.is_local())?;
        let id = file_id(&url)?;
        let held = peer.descriptors.take(id, Kind::Namespace, Duration::ZERO);
        match held.await {
            Ok(held) => Some(held),
            Err(_) => self.forwarder().ok()?.netns(&url).await,
        }
    }
}

/// Why a namespace is not believed.
#[derive(Debug)]
enum Doubt {
    Claim(NetnsUrl),
    Node(NetnsUrl),
    Kind(NetnsUrl, MissingDescriptor),
}

/// The rule of this module.
fn believe(
    url: NetnsUrl,
    trusted: bool,
    passed: Option<Result<Passed, MissingDescriptor>>,
) -> Result<PodNetns, Doubt> {
    match passed {
        Some(Err(reason @ MissingDescriptor::Kind { .. })) => Err(Doubt::Kind(url, reason)),
        Some(Ok(_)) if !trusted && Some(&url) == nodes_own() => Err(Doubt::Node(url)),
        Some(Ok(descriptor)) => Ok(PodNetns {
            url,
            descriptor: Some(descriptor),
        }),
        None | Some(Err(MissingDescriptor::NotPassed)) if trusted => Ok(url.into()),
        None | Some(Err(MissingDescriptor::NotPassed)) => Err(Doubt::Claim(url)),
    }
}

fn file_id(url: &NetnsUrl) -> Option<FileId> {
    match url {
        &NetnsUrl::Inode { dev: device, inode } => Some(FileId { device, inode }),
        NetnsUrl::File(_) => None,
    }
}

/// The namespace that the agent runs in, as a descriptor of it would be named.
fn nodes_own() -> Option<&'static NetnsUrl> {
    static OWN: OnceLock<Option<NetnsUrl>> = OnceLock::new();
    let own = OWN.get_or_init(|| {
        let metadata = std::fs::metadata("/proc/self/ns/net").ok()?;
        Some(NetnsUrl::Inode {
            dev: metadata.dev(),
            inode: metadata.ino(),
        })
    });
    own.as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(netns: &str, trusted: bool, passed: &PassedNetns) -> Result<Pod, RequestError> {
        let mechanism = Mechanism {
            r#type: KERNEL.to_owned(),
            parameters: [("inodeURL".to_owned(), netns.to_owned())].into(),
            ..Mechanism::default()
        };
        Pod::of_client(&mechanism, trusted, passed)
    }

    fn with(netns: &str, outcome: Result<Passed, MissingDescriptor>) -> PassedNetns {
        PassedNetns([(netns.parse().unwrap(), outcome)].into())
    }

    fn descriptor() -> Passed {
        Passed::new(std::fs::File::open("/proc/self/ns/net").unwrap().into())
    }

    const SOME: &str = "inode://4/4026539999";

    #[test]
    fn a_claim_is_believed_of_root_only() {
        for netns in ["file:///run/netns/pod", SOME] {
            for passed in [
                PassedNetns::default(),
                with(netns, Err(MissingDescriptor::NotPassed)),
            ] {
                assert!(
                    pod(netns, true, &passed)
                        .unwrap()
                        .netns
                        .descriptor
                        .is_none()
                );
                let error = pod(netns, false, &passed).unwrap_err();
                assert_eq!(error.code(), tonic::Code::PermissionDenied);
                let text = error.to_string();
                assert!(text.contains("as root") && text.contains(netns), "{text}");
            }
        }
    }

    #[test]
    fn a_descriptor_is_believed_of_everybody() {
        for trusted in [true, false] {
            let passed = with(SOME, Ok(descriptor()));
            let pod = pod(SOME, trusted, &passed).unwrap();
            assert_eq!(pod.netns.to_string(), SOME);
            assert!(pod.netns.descriptor.is_some());
        }
    }

    #[test]
    fn the_nodes_own_namespace_takes_more_than_a_descriptor() {
        let own = nodes_own().unwrap().to_string();
        let passed = with(&own, Ok(descriptor()));
        assert!(pod(&own, true, &passed).is_ok());
        let error = pod(&own, false, &passed).unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied);
        assert!(error.to_string().contains("the node's own"), "{error}");
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let wrong = MissingDescriptor::Kind {
            found: Kind::Socket,
            wanted: Kind::Namespace,
        };
        for trusted in [true, false] {
            let error = pod(SOME, trusted, &with(SOME, Err(wrong))).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            let text = error.to_string();
            assert!(text.contains("a socket") && text.contains(SOME), "{text}");
        }
    }
}
