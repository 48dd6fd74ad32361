//! What versions of the agent left that joined two pods of one node by a veth pair from pod to pod: found by its aliases, and never adopted.

use std::process::{Child, Command};

use nsm_core::link::{LinkAlias, LinkSpec};
use nsm_dataplane::{links::Links, netns::Netns};

use crate::support::{domain, inside, ip_tool, link, link_names, netns, veth};

/// Such a pair, for a connection of this domain.
fn direct_pair(domain: &str, pods: &[Netns; 2]) -> LinkAlias {
    let alias = LinkAlias::new(domain, "connection").unwrap();
    veth((&pods[0], "nsm-1"), (&pods[1], "nsm-2"));
    for (pod, name) in pods.iter().zip(["nsm-1", "nsm-2"]) {
        let mark = ["link", "set", name, "alias", &alias.to_string()];
        ip_tool(pod, &mark);
    }
    alias
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_direct_pair_is_found_and_goes_with_either_end() {
    let pods = [netns(), netns()];
    // Found are namespaces that a process is in.
    let _processes = pods.each_ref().map(|pod| inside(pod, Process::start));
    let domain = format!("leftover.{}", domain());
    let alias = direct_pair(&domain, &pods);
    let links = Links::in_namespace(netns());
    let found = links.find_ours(&domain).await.unwrap();
    let is_found = |pod: &Netns| found.iter().any(|(netns, _)| netns.id() == pod.id());
    assert!(found.len() == 2 && pods.iter().all(is_found), "{found:?}");
    let others = links.find_ours("another.example").await.unwrap();
    assert!(others.is_empty());
    assert!(links.pod_links(&domain).await.unwrap().is_empty());
    assert!(links.down(&pods[1], &alias).await.unwrap());
    assert_eq!(pods.map(|pod| link_names(&pod)), [[""; 0]; 2]);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_request_for_its_connection_replaces_a_direct_pair() {
    let (node, pods) = (netns(), [netns(), netns()]);
    let alias = direct_pair(&domain(), &pods);
    let spec = LinkSpec {
        alias,
        ..link(1, 2)
    };
    let made = Links::in_namespace(node.clone());
    let made = made.up_pod_link(&pods[0], &spec).await.unwrap();
    assert!(made.pod.created);
    assert_eq!(link_names(&pods[0]), ["nsm-1"]);
    assert_eq!(link_names(&pods[1]), [""; 0]);
    assert_eq!(link_names(&node), [made.node.name]);
}

/// A process in the namespace of the thread that starts it, until dropped.
struct Process(Child);

impl Process {
    fn start() -> Self {
        Self(Command::new("sleep").arg("60").spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
