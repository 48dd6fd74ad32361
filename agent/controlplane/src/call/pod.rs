//! The pods of this node: which network namespace a client or endpoint may name as its own.
//!
//! A path or an inode number is only a claim: both can be guessed, also those of the host. A descriptor is little more, since every user
//! can open a namespace that is mounted. What counts is where the process is that names it, and what that process may do there. The
//! rules are those of [`nsm_core::identity::policy`]; here is what they are decided from.

use std::{collections::HashMap, time::Duration};

use nsm_core::{
    identity::{
        Caller, NamespaceId, UserNamespace,
        policy::{Action, Claim, End, Refusal, decide},
    },
    mechanism::{KERNEL, Kernel, Parameters},
    net::NetnsUrl,
};
use nsm_proto::connection::Mechanism;
use tokio::time::Instant;

use crate::{
    call::Calls,
    connection::model::Established,
    error::RequestError,
    peer::peers::Peer,
    ports::{Forwarder, Plan, PodNetns},
    route::next::Route,
    transport::unix::{
        Descriptors, FileId, Kind, MissingDescriptor, PATIENCE, Passed, namespace_at, node,
    },
};

/// A pod of this node.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    /// Its KERNEL mechanism.
    pub(crate) kernel: Kernel,
    pub(crate) netns: PodNetns,
}

/// What is known of a namespace that a caller names.
#[derive(Debug, Clone)]
struct Evidence {
    id: Option<NamespaceId>,
    /// It is one of the node's own; none where that is not known.
    is_nodes_own: Option<bool>,
    passed: Option<Result<Passed, MissingDescriptor>>,
    /// Asked for only where the caller is not in the namespace.
    owners: Vec<UserNamespace>,
}

impl Evidence {
    /// Where nothing is there, nothing is the node's.
    const NOTHING: Self = Self {
        id: None,
        is_nodes_own: Some(false),
        passed: None,
        owners: Vec::new(),
    };
}

/// Who may name which namespaces: a caller, and what is known of those that its mechanisms name.
#[derive(Debug)]
pub(crate) struct NamedNetns {
    caller: Caller,
    nodes_own_allowed: bool,
    found: HashMap<NetnsUrl, Evidence>,
}

impl NamedNetns {
    /// Of a caller that names none.
    pub(crate) fn none_of(caller: Caller, nodes_own_allowed: bool) -> Self {
        Self {
            caller,
            nodes_own_allowed,
            found: HashMap::new(),
        }
    }

    /// Adds namespaces that the caller names, with the descriptors that come over `descriptors`. However many are late, they are waited for
    /// together.
    async fn add_all(
        &mut self,
        urls: Vec<NetnsUrl>,
        descriptors: Option<&Descriptors>,
        forwarder: Option<&dyn Forwarder>,
    ) {
        let until = Instant::now() + patience(&self.caller);
        for url in urls {
            self.add(url, descriptors, until, forwarder).await;
        }
    }

    async fn add(
        &mut self,
        url: NetnsUrl,
        descriptors: Option<&Descriptors>,
        until: Instant,
        forwarder: Option<&dyn Forwarder>,
    ) {
        if self.found.contains_key(&url) {
            return;
        }
        let mut evidence = Evidence::NOTHING;
        match &url {
            &NetnsUrl::Inode { dev: device, inode } => {
                evidence.id = Some(NamespaceId { device, inode });
                if let Some(descriptors) = descriptors {
                    let id = FileId { device, inode };
                    let left = until.saturating_duration_since(Instant::now());
                    let passed = descriptors.take(id, Kind::Namespace, left);
                    evidence.passed = Some(passed.await);
                }
            }
            // Of others a path is refused, wherever it leads.
            NetnsUrl::File(path) if self.caller.is_administrator() => {
                evidence.id = namespace_at(path);
            }
            NetnsUrl::File(_) => {}
        }
        if let (Some(Ok(passed)), Some(forwarder)) = (&evidence.passed, forwarder)
            && !self.is_in(evidence.id)
        {
            evidence.owners = forwarder.owners(passed);
        }
        if let Some(id) = evidence.id {
            evidence.is_nodes_own = match node().owns(id) {
                None => self.is_of_process_1(&url, &evidence, forwarder).await,
                known => known,
            };
        }
        self.found.insert(url, evidence);
    }

    /// Whether it is the network namespace of process 1, which the agent does not see; none where that cannot be found out.
    async fn is_of_process_1(
        &self,
        url: &NetnsUrl,
        evidence: &Evidence,
        forwarder: Option<&dyn Forwarder>,
    ) -> Option<bool> {
        let passed = evidence.passed.as_ref();
        let named = PodNetns {
            url: url.clone(),
            descriptor: passed.and_then(|passed| passed.as_ref().ok()).cloned(),
        };
        if named.descriptor.is_none() && !self.caller.is_administrator() {
            // It is refused for want of the descriptor, and nothing is opened for it.
            return Some(false);
        }
        forwarder?.is_of_process_1(&named).await
    }

    fn is_in(&self, id: Option<NamespaceId>) -> bool {
        let facts = self.caller.process().and_then(|process| process.facts);
        facts.is_some_and(|facts| Some(facts.net) == id)
    }

    /// The namespace of a pod, as the policy admits it.
    fn prove(&self, end: End, netns: NetnsUrl) -> Result<PodNetns, Doubt> {
        let evidence = self.found.get(&netns).cloned();
        let evidence = evidence.unwrap_or(Evidence::NOTHING);
        let descriptor = match evidence.passed {
            Some(Err(reason @ MissingDescriptor::Kind { .. })) => {
                return Err(Doubt::Kind(netns, reason));
            }
            Some(Ok(descriptor)) => Some(descriptor),
            None | Some(Err(MissingDescriptor::NotPassed)) => None,
        };
        let claim = Claim {
            end,
            netns: &netns,
            id: evidence.id,
            is_passed: descriptor.is_some(),
            is_nodes_own: evidence.is_nodes_own,
            nodes_own_allowed: self.nodes_own_allowed,
            owners: &evidence.owners,
        };
        decide(&self.caller, Action::Namespace(claim)).map_err(Doubt::Refused)?;
        Ok(PodNetns {
            url: netns,
            descriptor,
        })
    }
}

impl Pod {
    /// The client's pod.
    pub(crate) fn of_client(
        mechanism: &Mechanism,
        named: &NamedNetns,
    ) -> Result<Self, RequestError> {
        let kernel = Kernel::parse(&mechanism.parameters)?;
        let url = kernel
            .netns
            .clone()
            .ok_or(RequestError::Missing("inodeURL in its KERNEL mechanism"))?;
        let netns = named.prove(End::Client, url).map_err(|doubt| match doubt {
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
    /// The namespaces that a client's mechanisms name. Without a forwarder no link is made, and none matters.
    pub(crate) async fn named_netns<'a>(
        &self,
        caller: Caller,
        descriptors: Option<&Descriptors>,
        mechanisms: impl Iterator<Item = &'a Mechanism>,
    ) -> NamedNetns {
        let mut named = NamedNetns::none_of(caller, self.config.node_namespace);
        let Some(forwarder) = self.forwarder.as_deref() else {
            return named;
        };
        let kernel = mechanisms.filter(|mechanism| mechanism.r#type == KERNEL);
        // What cannot be parsed is an error where it is used.
        let urls = kernel.filter_map(|mechanism| Kernel::parse(&mechanism.parameters).ok()?.netns);
        let urls = urls.collect();
        named.add_all(urls, descriptors, Some(forwarder)).await;
        named
    }

    /// What an endpoint of this node answered of its pod. Its claim is that of the process that listens on its socket.
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
        let peer = self.lookup.peers.get(&route.url);
        let endpoint = Caller::on_node(peer.descriptors.peer());
        let mut named = NamedNetns::none_of(endpoint, self.config.node_namespace);
        let (descriptors, forwarder) = (Some(&*peer.descriptors), self.forwarder.as_deref());
        named
            .add_all(vec![url.clone()], descriptors, forwarder)
            .await;
        let netns = named.prove(End::Endpoint, url);
        let netns = netns.map_err(|doubt| match doubt {
            Doubt::Refused(refusal) => wrong(refusal.to_string()),
            Doubt::Kind(url, reason) => wrong(format!("it names {url}, and {reason}")),
        })?;
        Ok(Pod { kernel, netns })
    }
}

impl Calls {
    /// The descriptor of an endpoint's namespace, to go back to it with the Close of a connection that stood. One that is not held any
    /// more is opened, but only that of the namespace which the endpoint was proved to have.
    pub(crate) async fn returned_netns(
        &self,
        peer: &Peer,
        established: &Established,
    ) -> Option<Passed> {
        let mechanism = established.next_mechanism.as_ref();
        if let Some(held) = passed_netns(peer, mechanism).await {
            return Some(held);
        }
        let proved = match established.plan.as_deref()? {
            Plan::Pair { endpoint, .. } => &endpoint.netns.url,
            Plan::Vxlan { netns, .. } => &netns.url,
        };
        let (url, _) = answered_netns(peer, mechanism)?;
        if url != *proved {
            return None;
        }
        self.forwarder().ok()?.netns(&url).await
    }
}

/// The descriptor of the namespace that an endpoint of this node named as its own, if it has passed that itself. It goes back with a
/// Close: NSM's endpoints take the mechanism that they answered for their own, and wait for the descriptor of each inode in it.
///
/// The answer may be one that was refused. To open a namespace that is only named would give an endpoint that of any pod.
pub(crate) async fn passed_netns(peer: &Peer, mechanism: Option<&Mechanism>) -> Option<Passed> {
    let (_, id) = answered_netns(peer, mechanism)?;
    let held = peer.descriptors.take(id, Kind::Namespace, Duration::ZERO);
    held.await.ok()
}

/// The namespace that an endpoint of this node named by its inode.
fn answered_netns(peer: &Peer, mechanism: Option<&Mechanism>) -> Option<(NetnsUrl, FileId)> {
    let mechanism = mechanism.filter(|it| it.r#type == KERNEL && peer.is_local())?;
    let url = Kernel::parse(&mechanism.parameters).ok()?.netns?;
    let id = file_id(&url)?;
    Some((url, id))
}

/// Why a namespace is not taken.
#[derive(Debug)]
enum Doubt {
    /// The policy refuses it.
    Refused(Refusal),
    /// What was passed is something else.
    Kind(NetnsUrl, MissingDescriptor),
}

/// How long a descriptor may be late. Of an administrator none is needed.
fn patience(caller: &Caller) -> Duration {
    if caller.is_administrator() {
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use nsm_core::identity::{Facts, Process, Surroundings};

    use super::*;

    const SOME: NamespaceId = NamespaceId {
        device: 4,
        inode: 4_026_539_999,
    };

    fn process(user: u32, net: NamespaceId, is_administrator: bool) -> Caller {
        let id = |inode| NamespaceId { device: 4, inode };
        Caller::on_node(Process {
            user: Some(user),
            home: None,
            facts: Some(Facts {
                surroundings: Surroundings {
                    pid: id(1),
                    mount: id(2),
                    user: id(3),
                },
                net,
                has_sys_admin: false,
            }),
            is_administrator,
        })
    }

    fn root() -> Caller {
        process(0, nodes_own(), true)
    }

    fn nodes_own() -> NamespaceId {
        let metadata = std::fs::metadata("/proc/self/ns/net").unwrap();
        NamespaceId {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    fn url(id: NamespaceId) -> NetnsUrl {
        NetnsUrl::Inode {
            dev: id.device,
            inode: id.inode,
        }
    }

    fn pod(named: &NamedNetns, netns: &NetnsUrl) -> Result<Pod, RequestError> {
        let mechanism = Mechanism {
            r#type: KERNEL.to_owned(),
            parameters: [("inodeURL".to_owned(), netns.to_string())].into(),
            ..Mechanism::default()
        };
        Pod::of_client(&mechanism, named)
    }

    fn with(
        caller: Caller,
        id: NamespaceId,
        passed: Result<Passed, MissingDescriptor>,
    ) -> NamedNetns {
        let mut named = NamedNetns::none_of(caller, false);
        let evidence = Evidence {
            id: Some(id),
            is_nodes_own: Some(node().networks.contains(&id)),
            passed: Some(passed),
            owners: Vec::new(),
        };
        named.found.insert(url(id), evidence);
        named
    }

    fn descriptor() -> Passed {
        Passed::new(std::fs::File::open("/proc/self/ns/net").unwrap().into())
    }

    fn refusal(outcome: Result<Pod, RequestError>) -> String {
        let error = outcome.unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied, "{error}");
        error.to_string()
    }

    #[test]
    fn a_claim_is_believed_of_administrators_only() {
        let path: NetnsUrl = "file:///run/netns/pod".parse().unwrap();
        let missing = || Err(MissingDescriptor::NotPassed);
        let none = |caller| NamedNetns::none_of(caller, false);
        for (named, netns) in [
            (none(root()), &path),
            (with(root(), SOME, missing()), &url(SOME)),
        ] {
            assert!(pod(&named, netns).unwrap().netns.descriptor.is_none());
        }
        let other = || process(0, SOME, false);
        for (named, netns) in [
            (none(other()), &path),
            (with(other(), SOME, missing()), &url(SOME)),
        ] {
            let text = refusal(pod(&named, netns));
            assert!(text.contains("as root") && text.contains(&netns.to_string()));
        }
    }

    #[test]
    fn a_descriptor_is_believed_of_who_is_in_the_namespace() {
        let inside = with(process(1000, SOME, false), SOME, Ok(descriptor()));
        assert!(pod(&inside, &url(SOME)).unwrap().netns.descriptor.is_some());
        let elsewhere = NamespaceId { inode: 5, ..SOME };
        let outside = with(process(1000, elsewhere, false), SOME, Ok(descriptor()));
        let text = refusal(pod(&outside, &url(SOME)));
        assert!(text.contains("CAP_SYS_ADMIN"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn descriptors_that_do_not_come_are_waited_for_together() {
        let mut named = NamedNetns::none_of(process(1000, SOME, false), false);
        let urls = (1..=16).map(|inode| url(NamespaceId { inode, ..SOME }));
        let urls = urls.collect();
        let start = Instant::now();
        named
            .add_all(urls, Some(&Descriptors::default()), None)
            .await;
        assert_eq!(named.found.len(), 16);
        assert!(start.elapsed() < 2 * PATIENCE, "{:?}", start.elapsed());
    }

    #[test]
    fn the_nodes_own_namespace_is_for_nobody_unless_configured() {
        let own = nodes_own();
        for caller in [root(), process(1000, own, false)] {
            let text = refusal(pod(&with(caller, own, Ok(descriptor())), &url(own)));
            assert!(text.contains("the node's own"), "{text}");
        }
        for (caller, is_allowed) in [(root(), true), (process(1000, own, false), false)] {
            let mut named = with(caller, own, Ok(descriptor()));
            named.nodes_own_allowed = true;
            assert_eq!(pod(&named, &url(own)).is_ok(), is_allowed);
        }
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let wrong = MissingDescriptor::Kind {
            found: Kind::Socket,
            wanted: Kind::Namespace,
        };
        for caller in [root(), process(1000, SOME, false)] {
            let error = pod(&with(caller, SOME, Err(wrong)), &url(SOME)).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            let text = error.to_string();
            assert!(
                text.contains("a socket") && text.contains("4026539999"),
                "{text}"
            );
        }
    }
}
