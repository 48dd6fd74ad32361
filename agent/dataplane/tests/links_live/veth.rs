//! Veth pairs between two pods of one node.

use nsm_core::link::{LinkAlias, LinkKind, LinkSpec};
use nsm_dataplane::{
    links::{LinkError, Links},
    netns::Netns,
};

use crate::{
    contents::assert_is,
    support::{
        add_foreign_link, delete_link, domain, inside, link, link_names, mac, name, net, netns,
        route,
    },
};

struct Pair {
    links: Links,
    pods: (Netns, Netns),
    specs: (LinkSpec, LinkSpec),
}

impl Pair {
    fn wanted() -> Self {
        Self {
            links: Links::in_namespace(netns()),
            pods: (netns(), netns()),
            specs: (link(1, 2), link(2, 1)),
        }
    }

    async fn up(
        &self,
    ) -> Result<(nsm_dataplane::links::UpLink, nsm_dataplane::links::UpLink), LinkError> {
        self.links
            .up_veth((&self.pods.0, &self.specs.0), (&self.pods.1, &self.specs.1))
            .await
    }

    fn names(&self) -> [Vec<String>; 2] {
        [link_names(&self.pods.0), link_names(&self.pods.1)]
    }

    async fn assert_is_wanted(&self) {
        for (pod, spec) in [(&self.pods.0, &self.specs.0), (&self.pods.1, &self.specs.1)] {
            let link = self.links.observe(pod, &spec.alias).await.unwrap().unwrap();
            assert!(
                matches!(link.kind, LinkKind::Veth { .. }) && link.up,
                "{link:?}"
            );
            assert_eq!(
                (link.name.as_str(), link.mtu, link.mac),
                (spec.name.as_str(), spec.mtu, spec.mac)
            );
            assert!(
                spec.addresses
                    .iter()
                    .all(|address| link.addresses.contains(address)),
                "{link:?}"
            );
            assert!(
                spec.routes
                    .iter()
                    .all(|route| link.routes.iter().any(|there| there.spec == *route)),
                "{link:?}"
            );
            assert_eq!(link.neighbours.len(), spec.neighbours.len());
        }
    }
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn joins_two_pods() {
    let pair = Pair::wanted();
    let (a, b) = pair.up().await.unwrap();
    assert!(a.created && b.created);
    pair.assert_is_wanted().await;
    let again = pair.up().await.unwrap();
    assert_eq!(
        (
            again.0.index,
            again.0.operations,
            again.1.index,
            again.1.operations
        ),
        (a.index, 0, b.index, 0)
    );
    // One end takes the other along.
    assert!(
        pair.links
            .down(&pair.pods.1, &pair.specs.1.alias)
            .await
            .unwrap()
    );
    assert_eq!(pair.names(), [[""; 0]; 2]);
    assert!(
        !pair
            .links
            .down(&pair.pods.0, &pair.specs.0.alias)
            .await
            .unwrap()
    );
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn changes_in_place() {
    let mut pair = Pair::wanted();
    let (a, b) = pair.up().await.unwrap();
    pair.specs.0.mtu = 1400;
    pair.specs.1.mac = Some(mac(9));
    pair.specs.1.addresses = vec![net("172.16.1.2/32"), net("172.16.2.2/24")];
    pair.specs.1.routes.pop();
    pair.specs.1.neighbours.pop();
    let changed = pair.up().await.unwrap();
    assert_eq!((changed.0.index, changed.1.index), (a.index, b.index));
    assert!(changed.0.operations > 0 && changed.1.operations > 0);
    pair.assert_is_wanted().await;
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_made_anew_when_an_end_is_not_the_others() {
    let pair = Pair::wanted();
    let (a, _) = pair.up().await.unwrap();
    delete_link(&pair.pods.0, a.index);
    let again = pair.up().await.unwrap();
    assert!(again.0.created && again.1.created);
}

/// Both aliases are there, with the very indexes of a pair, but as ends of two pairs.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_made_anew_when_the_ends_belong_to_two_pairs() {
    let (one, two) = (Pair::wanted(), Pair::wanted());
    let ups = (one.up().await.unwrap(), two.up().await.unwrap());
    assert_eq!(
        (ups.0.0.index, ups.0.1.index),
        (ups.1.0.index, ups.1.1.index)
    );
    let crossed = Pair {
        links: one.links.clone(),
        pods: (one.pods.0.clone(), two.pods.1.clone()),
        specs: (one.specs.0.clone(), two.specs.1.clone()),
    };
    assert!(crossed.up().await.unwrap().0.created);
    crossed.assert_is_wanted().await;
    assert_eq!(crossed.up().await.unwrap().1.operations, 0);
    assert_eq!((one.names()[1].len(), two.names()[0].len()), (0, 0));
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn lies_within_one_pod_too() {
    let mut pair = Pair::wanted();
    pair.pods.1 = pair.pods.0.clone();
    pair.specs.1.name = name("nsm-2");
    // Within one namespace each address leads to itself, so neither end needs the other's route.
    (pair.specs.0.routes, pair.specs.1.routes) = (vec![], vec![]);
    pair.up().await.unwrap();
    pair.assert_is_wanted().await;
    assert_eq!(pair.up().await.unwrap().0.operations, 0);

    pair.specs.1.alias = pair.specs.0.alias.clone();
    assert!(matches!(pair.up().await, Err(LinkError::SameAlias { .. })));
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn failures_leave_neither_end() {
    let mut pair = Pair::wanted();
    add_foreign_link(&pair.pods.1, "nsm-1");
    let error = pair.up().await.unwrap_err();
    assert!(
        matches!(&error, LinkError::NameTaken { netns, .. } if *netns == pair.pods.1.id()),
        "{error}"
    );
    assert_eq!(pair.names()[0], [""; 0]);

    pair.specs.1.name = name("nsm-2");
    for end in [0, 1] {
        let mut broken = Pair {
            links: pair.links.clone(),
            pods: pair.pods.clone(),
            specs: pair.specs.clone(),
        };
        let spec = if end == 0 {
            &mut broken.specs.0
        } else {
            &mut broken.specs.1
        };
        spec.routes.push(route("10.0.0.0/8", Some("224.0.0.1")));
        let error = broken.up().await.unwrap_err();
        assert!(matches!(error, LinkError::RouteRefused { .. }), "{error}");
        assert_eq!(broken.names()[0], [""; 0]);
        assert_eq!(
            broken.names()[1].len(),
            2,
            "the foreign pair alone: {:?}",
            broken.names()
        );
    }
    pair.up().await.unwrap();
    pair.assert_is_wanted().await;
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_found_again_after_a_restart() {
    let mut pair = Pair::wanted();
    // Found are namespaces that a process is in.
    let _processes = [&pair.pods.0, &pair.pods.1].map(|pod| inside(pod, Process::start));
    let domain = format!("restart.{}", domain());
    pair.specs.0.alias = LinkAlias::new(&domain, "client").unwrap();
    pair.specs.1.alias = LinkAlias::new(&domain, "endpoint").unwrap();
    add_foreign_link(&pair.pods.0, "eth0");
    pair.up().await.unwrap();
    let mut found = pair.links.find_ours(&domain).await.unwrap();
    found.sort_by_key(|(_, link)| link.alias.clone());
    for ((pod, spec), (netns, link)) in
        [(&pair.pods.0, &pair.specs.0), (&pair.pods.1, &pair.specs.1)]
            .into_iter()
            .zip(&found)
    {
        assert_eq!(netns.id(), pod.id());
        assert_is(link, spec);
    }
    assert_eq!(found.len(), 2, "{found:?}");
    let others = pair.links.find_ours("another.example").await.unwrap();
    assert!(others.is_empty());
}

/// A process in the namespace of the thread that starts it, until dropped.
struct Process(std::process::Child);

impl Process {
    fn start() -> Self {
        Self(
            std::process::Command::new("sleep")
                .arg("60")
                .spawn()
                .unwrap(),
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
