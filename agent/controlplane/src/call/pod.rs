//! The pods of this node: which network namespace a client or endpoint may name as its own.
//!
//! A path or an inode number is only a claim: both can be guessed, also those of the host. A caller that is not privileged
//! therefore passes the namespace's descriptor with its call. The rules are those of [`nsm_core::identity::policy`]; here is what
//! they are decided from.

use std::{collections::HashMap, os::unix::fs::MetadataExt as _, sync::OnceLock, time::Duration};

use nsm_core::{
    identity::{
        Caller,
        policy::{Action, Claim, End, Refusal, decide},
    },
    mechanism::{KERNEL, Kernel, Parameters},
    net::NetnsUrl,
};
use nsm_proto::connection::Mechanism;

use crate::{
    call::Calls,
    error::RequestError,
    peer::peers::Peer,
    ports::PodNetns,
    route::router::Route,
    transport::unix::{Descriptors, FileId, Kind, MissingDescriptor, PATIENCE, Passed},
};

/// A pod of this node.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    /// Its KERNEL mechanism.
    pub(crate) kernel: Kernel,
    pub(crate) netns: PodNetns,
}

/// A caller, and the namespaces that its mechanisms name by inode, with what came with them.
#[derive(Debug)]
pub(crate) struct PassedNetns {
    caller: Caller,
    found: HashMap<NetnsUrl, Result<Passed, MissingDescriptor>>,
}

impl PassedNetns {
    /// The caller has passed nothing.
    pub(crate) fn none_of(caller: Caller) -> Self {
        Self {
            caller,
            found: HashMap::new(),
        }
    }

    /// Takes the descriptors that `mechanisms` name.
    pub(crate) async fn collect<'a>(
        descriptors: &Descriptors,
        mechanisms: impl Iterator<Item = &'a Mechanism>,
        caller: Caller,
    ) -> Self {
        let patience = patience(&caller);
        let mut found = HashMap::new();
        for mechanism in mechanisms.filter(|mechanism| mechanism.r#type == KERNEL) {
            // What cannot be parsed is an error where it is used.
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
        Self { caller, found }
    }
}

impl Pod {
    /// The client's pod.
    pub(crate) fn of_client(
        mechanism: &Mechanism,
        passed: &PassedNetns,
    ) -> Result<Self, RequestError> {
        let kernel = Kernel::parse(&mechanism.parameters)?;
        let url = kernel
            .netns
            .clone()
            .ok_or(RequestError::Missing("inodeURL in its KERNEL mechanism"))?;
        let descriptor = passed.found.get(&url).cloned();
        let netns = prove(End::Client, &passed.caller, url, descriptor);
        let netns = netns.map_err(|doubt| match doubt {
            Doubt::Refused(refusal) => RequestError::Forbidden(refusal),
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
        let wrong = |fault: String| RequestError::bad_answer(&route.url, fault);
        let kernel = Kernel::parse(parameters).map_err(|error| wrong(error.to_string()))?;
        let Some(url) = kernel.netns.clone() else {
            return Err(wrong(
                "the endpoint's KERNEL mechanism has no inodeURL: it must name a network namespace"
                    .to_owned(),
            ));
        };
        let passed = match file_id(&url) {
            Some(id) => {
                let peer = self.lookup.peers.get(&route.url);
                let patience = patience(&route.registrant);
                let passed = peer.descriptors.take(id, Kind::Namespace, patience);
                Some(passed.await)
            }
            None => None,
        };
        let netns = prove(End::Endpoint, &route.registrant, url, passed);
        let netns = netns.map_err(|doubt| match doubt {
            Doubt::Refused(refusal) => wrong(refusal.to_string()),
            Doubt::Kind(url, reason) => wrong(format!("it names {url}, and {reason}")),
        })?;
        Ok(Pod { kernel, netns })
    }
}

impl Calls {
    /// The descriptor of the namespace that an endpoint of this node named as its own, to go back to
    /// it with a Close: NSM's endpoints take the mechanism that they answered for their own,
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

/// Why a namespace is not taken.
#[derive(Debug)]
enum Doubt {
    /// The policy refuses it.
    Refused(Refusal),
    /// What was passed is something else.
    Kind(NetnsUrl, MissingDescriptor),
}

/// The namespace of a pod, as the policy admits it.
fn prove(
    end: End,
    caller: &Caller,
    netns: NetnsUrl,
    passed: Option<Result<Passed, MissingDescriptor>>,
) -> Result<PodNetns, Doubt> {
    let descriptor = match passed {
        Some(Err(reason @ MissingDescriptor::Kind { .. })) => {
            return Err(Doubt::Kind(netns, reason));
        }
        Some(Ok(descriptor)) => Some(descriptor),
        None | Some(Err(MissingDescriptor::NotPassed)) => None,
    };
    let claim = Claim {
        end,
        netns: &netns,
        is_passed: descriptor.is_some(),
        is_nodes_own: Some(&netns) == nodes_own(),
    };
    decide(caller, Action::Namespace(claim)).map_err(Doubt::Refused)?;
    Ok(PodNetns {
        url: netns,
        descriptor,
    })
}

/// How long a descriptor may be late. Of a privileged caller none is needed.
fn patience(caller: &Caller) -> Duration {
    if caller.is_privileged() {
        Duration::ZERO
    } else {
        PATIENCE
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
    use nsm_core::identity::User;

    use super::*;

    const ROOT: Caller = Caller::on_node(User::Privileged(0));
    const OTHER: Caller = Caller::on_node(User::Other(1000));

    fn pod(netns: &str, passed: &PassedNetns) -> Result<Pod, RequestError> {
        let mechanism = Mechanism {
            r#type: KERNEL.to_owned(),
            parameters: [("inodeURL".to_owned(), netns.to_owned())].into(),
            ..Mechanism::default()
        };
        Pod::of_client(&mechanism, passed)
    }

    fn with(
        caller: Caller,
        netns: &str,
        outcome: Result<Passed, MissingDescriptor>,
    ) -> PassedNetns {
        PassedNetns {
            caller,
            found: [(netns.parse().unwrap(), outcome)].into(),
        }
    }

    fn descriptor() -> Passed {
        Passed::new(std::fs::File::open("/proc/self/ns/net").unwrap().into())
    }

    const SOME: &str = "inode://4/4026539999";

    #[test]
    fn a_claim_is_believed_of_root_only() {
        for netns in ["file:///run/netns/pod", SOME] {
            let given = |caller| {
                [
                    PassedNetns::none_of(caller),
                    with(caller, netns, Err(MissingDescriptor::NotPassed)),
                ]
            };
            for passed in given(ROOT) {
                assert!(pod(netns, &passed).unwrap().netns.descriptor.is_none());
            }
            for passed in given(OTHER) {
                let error = pod(netns, &passed).unwrap_err();
                assert_eq!(error.code(), tonic::Code::PermissionDenied);
                let text = error.to_string();
                assert!(text.contains("as root") && text.contains(netns), "{text}");
            }
        }
    }

    #[test]
    fn a_descriptor_is_believed_of_everybody() {
        for caller in [ROOT, OTHER] {
            let passed = with(caller, SOME, Ok(descriptor()));
            let pod = pod(SOME, &passed).unwrap();
            assert_eq!(pod.netns.to_string(), SOME);
            assert!(pod.netns.descriptor.is_some());
        }
    }

    #[test]
    fn the_nodes_own_namespace_takes_more_than_a_descriptor() {
        let own = nodes_own().unwrap().to_string();
        let passed = |caller| with(caller, &own, Ok(descriptor()));
        assert!(pod(&own, &passed(ROOT)).is_ok());
        let error = pod(&own, &passed(OTHER)).unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied);
        assert!(error.to_string().contains("the node's own"), "{error}");
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let wrong = MissingDescriptor::Kind {
            found: Kind::Socket,
            wanted: Kind::Namespace,
        };
        for caller in [ROOT, OTHER] {
            let error = pod(SOME, &with(caller, SOME, Err(wrong))).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            let text = error.to_string();
            assert!(text.contains("a socket") && text.contains(SOME), "{text}");
        }
    }
}
