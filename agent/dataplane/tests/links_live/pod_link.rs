//! Pod links: a pair for each connection, with one end on the node.

use std::collections::{BTreeSet, HashMap};

use nsm_core::link::{LinkKind, LinkSpec, NODE_GROUP, NodeLink, RouteSpec, node_end_name};
use nsm_dataplane::{
    links::{Changed, LinkError, Links, Mended, NodeWatch, PodLink},
    netns::Netns,
};

use crate::support::{
    add_foreign_link, alias, delete_link, domain, eventually, inside, ip_tool, link, link_names,
    mac, name, net, netns, route, set_up,
};

struct Connection {
    links: Links,
    node: Netns,
    pod: Netns,
    spec: LinkSpec,
}

impl Connection {
    fn wanted() -> Self {
        Self::of(netns(), netns())
    }

    fn of(node: Netns, pod: Netns) -> Self {
        Self {
            links: Links::in_namespace(node.clone()),
            node,
            pod,
            spec: link(1, 2),
        }
    }

    async fn up(&self) -> Result<PodLink, LinkError> {
        self.links.up_pod_link(&self.pod, &self.spec).await
    }

    /// The node's end, as the list of all has it.
    async fn node_end(&self) -> Option<NodeLink> {
        let ends = self.links.pod_links(&domain()).await.unwrap();
        ends.into_iter()
            .find(|end| end.alias.as_ref() == Some(&self.spec.alias))
    }

    async fn assert_is_wanted(&self) {
        let spec = &self.spec;
        let link = self.links.observe(&self.pod, &spec.alias).await;
        let link = link.unwrap().unwrap();
        assert!(
            matches!(link.kind, LinkKind::Veth { .. }) && link.up,
            "{link:?}"
        );
        assert_eq!(
            (link.name.as_str(), link.mtu, link.mac),
            (spec.name.as_str(), spec.mtu, spec.mac)
        );
        let has_address = |address| link.addresses.contains(address);
        assert!(spec.addresses.iter().all(has_address), "{link:?}");
        let has_route = |route: &RouteSpec| link.routes.iter().any(|there| there.spec == *route);
        assert!(spec.routes.iter().all(has_route), "{link:?}");
        assert_eq!(link.neighbours.len(), spec.neighbours.len());

        let end = self.node_end().await.unwrap();
        assert_eq!(
            (
                end.name.as_str(),
                end.mtu,
                end.group,
                end.peer.map(|peer| peer.index)
            ),
            (
                node_end_name(&spec.alias).as_str(),
                spec.mtu,
                NODE_GROUP,
                Some(link.index)
            )
        );
        let switch = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", end.name);
        let ipv6 = inside(&self.node, || std::fs::read_to_string(&switch).unwrap());
        assert_eq!(ipv6, "1\n");
        assert!(end.up && !end.arp && !end.generates_addresses, "{end:?}");
    }
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_made_as_wanted_and_found_again() {
    let connection = Connection::wanted();
    let made = connection.up().await.unwrap();
    assert!(made.pod.created);
    assert_eq!(connection.node_end().await.as_ref(), Some(&made.node));
    connection.assert_is_wanted().await;
    assert_eq!(link_names(&connection.node), [made.node.name.as_str()]);
    for key in ["accept_ra", "accept_redirects"] {
        let path = format!("/proc/sys/net/ipv6/conf/{}/{key}", connection.spec.name);
        let value = inside(&connection.pod, || std::fs::read_to_string(&path)).unwrap();
        assert_eq!(value, "0\n", "{key}");
    }

    let again = connection.up().await.unwrap();
    assert_eq!((again.pod.operations, again.pod.created), (0, false));
    assert_eq!(
        (again.pod.index, &again.node),
        (made.pod.index, &made.node),
        "nothing differs"
    );
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn changes_in_place() {
    let mut connection = Connection::wanted();
    let made = connection.up().await.unwrap();
    connection.spec.mtu = 1400;
    connection.spec.mac = Some(mac(9));
    connection.spec.addresses = vec![net("172.16.1.2/32"), net("172.16.2.2/24")];
    connection.spec.routes.pop();
    connection.spec.neighbours.pop();
    let changed = connection.up().await.unwrap();
    assert_eq!(
        (changed.pod.index, changed.node.index),
        (made.pod.index, made.node.index)
    );
    assert!(changed.pod.operations > 0);
    connection.assert_is_wanted().await;
}

/// What a pod with CAP_NET_ADMIN does to its end is repaired, or the link is made again.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_pods_changes_are_repaired() {
    let connection = Connection::wanted();
    let made = connection.up().await.unwrap();
    set_up(&connection.pod, made.pod.index, false);
    let repaired = connection.up().await.unwrap();
    assert_eq!(repaired.pod.index, made.pod.index);
    connection.assert_is_wanted().await;

    ip_tool(&connection.pod, &["link", "set", "nsm-1", "alias", "x"]);
    let repaired = connection.up().await.unwrap();
    assert_eq!(repaired.pod.index, made.pod.index);
    connection.assert_is_wanted().await;

    ip_tool(&connection.pod, &["link", "set", "nsm-1", "down"]);
    ip_tool(&connection.pod, &["link", "set", "nsm-1", "name", "mine"]);
    assert!(connection.up().await.unwrap().pod.created);
    connection.assert_is_wanted().await;
    assert_eq!(link_names(&connection.pod), ["nsm-1"]);

    delete_link(&connection.pod, connection.up().await.unwrap().pod.index);
    assert_eq!(connection.node_end().await, None);
    assert!(connection.up().await.unwrap().pod.created);
    connection.assert_is_wanted().await;
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn the_nodes_end_is_watched_and_repaired() {
    let node = netns();
    let connection = Connection::of(node.clone(), netns());
    let untouched = Connection::of(node.clone(), netns());
    let made = connection.up().await.unwrap().node;
    let other = untouched.up().await.unwrap().node;
    let links: HashMap<u32, NodeLink> = [&made, &other]
        .into_iter()
        .map(|link| (link.index, link.clone()))
        .collect();
    let mut watch = inside(&node, || NodeWatch::open().unwrap());
    let mut look = || watch.look(&links).unwrap();
    // The first look reads all.
    let first = look();
    assert_eq!((first.changed, first.mended.len()), (Changed::Unknown, 0));

    let name = made.name.as_str();
    ip_tool(&node, &["link", "add", "br0", "type", "bridge"]);
    ip_tool(&node, &["link", "set", name, "master", "br0"]);
    ip_tool(&node, &["link", "set", name, "down"]);
    ip_tool(&node, &["link", "set", name, "group", "0", "arp", "on"]);
    ip_tool(&node, &["link", "set", name, "addrgenmode", "random"]);
    ip_tool(&node, &["address", "add", "192.0.2.7/32", "dev", name]);
    ip_tool(&node, &["link", "set", name, "alias", "somebody's"]);
    ip_tool(&node, &["link", "set", name, "name", "other"]);
    let found = look();
    assert!(
        matches!(found.mended.as_slice(), [(index, Mended::Repaired(8..))] if *index == made.index),
        "{found:?}"
    );
    connection.assert_is_wanted().await;
    assert_eq!(connection.node_end().await.as_ref(), Some(&made));
    let addresses = inside(&node, || {
        let mut ip = std::process::Command::new("ip");
        ip.args(["address", "show", "dev", name]).output().unwrap()
    });
    let addresses = String::from_utf8(addresses.stdout).unwrap();
    assert!(!addresses.contains("inet"), "{addresses}");
    // What the repair itself changed is announced, and right.
    eventually("no change is announced", || match look() {
        found if !found.mended.is_empty() => panic!("{found:?}"),
        found if found.changed == Changed::Links(BTreeSet::new()) => Ok(()),
        found => Err(format!("{found:?}")),
    });

    delete_link(&node, other.index);
    let found = look();
    assert!(
        matches!(found.mended.as_slice(), [(index, Mended::Gone)] if *index == other.index),
        "{found:?}"
    );
}

/// Off for all links of the pod, then for the connection's alone.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_pod_without_ipv6_has_it_on_its_link() {
    let connection = Connection::wanted();
    let switch_off = |link: &str| {
        inside(&connection.pod, || {
            let path = format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6");
            std::fs::write(path, "1").unwrap();
        });
    };
    ["all", "default"].into_iter().for_each(switch_off);
    connection.up().await.unwrap();
    connection.assert_is_wanted().await;
    switch_off(connection.spec.name.as_str());
    let again = connection.up().await.unwrap();
    assert!(!again.pod.created && again.pod.operations > 0, "{again:?}");
    connection.assert_is_wanted().await;
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn many_are_deleted_by_their_ends_on_the_node() {
    let node = netns();
    let pods: Vec<Connection> = (0..5)
        .map(|_| Connection::of(node.clone(), netns()))
        .collect();
    for connection in &pods {
        connection.up().await.unwrap();
    }
    let mut aliases: Vec<_> = pods.iter().map(|it| it.spec.alias.clone()).collect();
    let kept = aliases.pop().unwrap();
    aliases.push(alias());
    let links = &pods[0].links;
    assert_eq!(links.down_pod_links(&aliases).await.unwrap(), 4);
    assert_eq!(links.down_pod_links(&aliases).await.unwrap(), 0);
    assert_eq!(link_names(&node), [node_end_name(&kept).to_string()]);
    assert_eq!(link_names(&pods[0].pod), [""; 0]);
    pods[4].assert_is_wanted().await;
    assert_eq!(links.down_pod_links(&[kept]).await.unwrap(), 1);
    assert_eq!(link_names(&node), [""; 0]);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_pods_end_takes_the_nodes_along() {
    let connection = Connection::wanted();
    connection.up().await.unwrap();
    let Connection { node, pod, .. } = connection;
    drop(pod);
    eventually("the node's end goes", || match link_names(&node) {
        names if names.is_empty() => Ok(()),
        names => Err(format!("{names:?}")),
    });
}

/// Programs and maps name a link by its index.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn the_index_of_a_link_that_went_is_no_others() {
    let node = netns();
    let connection = Connection::of(node.clone(), netns());
    let mut last = 0;
    for _ in 0..3 {
        let index = connection.up().await.unwrap().node.index;
        assert!(index > last && index >= 1 << 30, "{index} after {last}");
        last = index;
        delete_link(&node, index);
        // The kernel's own choice is elsewhere, and stays where it was.
        add_foreign_link(&node, "foreign0");
        let foreign = inside(&node, || nix::net::if_::if_nametoindex("foreign0").unwrap());
        assert!(foreign < 1 << 20, "{foreign}");
        delete_link(&node, foreign);
    }
    // Another agent of the namespace has the next index.
    let taken = (last + 1).to_string();
    ip_tool(
        &node,
        &[
            "link", "add", "index", &taken, "name", "br0", "type", "bridge",
        ],
    );
    assert!(connection.up().await.unwrap().node.index > last + 1);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_client_may_be_in_the_nodes_namespace() {
    let node = netns();
    let mut connection = Connection::of(node.clone(), node);
    let made = connection.up().await.unwrap();
    assert_eq!(made.node.peer.unwrap().netns, None);
    assert_eq!(
        connection.links.pod_links(&domain()).await.unwrap().len(),
        1
    );
    assert_eq!(connection.up().await.unwrap().pod.operations, 0);
    connection.spec.mtu = 1300;
    let changed = connection.up().await.unwrap();
    assert_eq!((changed.pod.created, changed.node.mtu), (false, 1300));
    let aliases = [connection.spec.alias.clone()];
    assert_eq!(connection.links.down_pod_links(&aliases).await.unwrap(), 1);
    assert_eq!(link_names(&connection.node), [""; 0]);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn failures_leave_neither_end() {
    let mut connection = Connection::wanted();
    add_foreign_link(&connection.pod, "nsm-1");
    let error = connection.up().await.unwrap_err();
    let LinkError::NameTaken { netns, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*netns, connection.pod.id());
    assert_eq!(link_names(&connection.node), [""; 0]);

    connection.spec.name = name("nsm-2");
    connection
        .spec
        .routes
        .push(route("10.0.0.0/8", Some("224.0.0.1")));
    let error = connection.up().await.unwrap_err();
    assert!(matches!(error, LinkError::RouteRefused { .. }), "{error}");
    assert_eq!(link_names(&connection.node), [""; 0]);
    connection.spec.routes.pop();

    let taken = node_end_name(&connection.spec.alias).to_string();
    add_foreign_link(&connection.node, &taken);
    let error = connection.up().await.unwrap_err();
    let LinkError::NameTaken { netns, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*netns, connection.node.id());
    assert_eq!(link_names(&connection.pod).len(), 2, "the foreign pair");
}

/// A creation that failed halfway left a node's end without an alias.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_half_made_link_is_replaced() {
    let connection = Connection::wanted();
    connection.up().await.unwrap();
    let name = node_end_name(&connection.spec.alias).to_string();
    ip_tool(&connection.node, &["link", "set", &name, "alias", ""]);
    assert!(connection.up().await.unwrap().pod.created);
    connection.assert_is_wanted().await;
}

/// A pod that is named anew for the same connection: the pair moves there.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn follows_its_connection_to_another_pod() {
    let mut connection = Connection::wanted();
    connection.up().await.unwrap();
    let before = std::mem::replace(&mut connection.pod, netns());
    assert!(connection.up().await.unwrap().pod.created);
    connection.assert_is_wanted().await;
    assert_eq!(link_names(&before), [""; 0]);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_request_that_is_given_up_leaves_nothing() {
    let connection = Connection::wanted();
    let mut call = Box::pin(connection.up());
    // Once polled, the call runs to its end.
    std::future::poll_fn(|context| {
        let _ = Future::poll(call.as_mut(), context);
        std::task::Poll::Ready(())
    })
    .await;
    drop(call);
    let aliases = [connection.spec.alias.clone()];
    // The next call of the connection waits for the removal.
    assert_eq!(connection.links.down_pod_links(&aliases).await.unwrap(), 0);
    assert_eq!(link_names(&connection.node), [""; 0]);
}

/// What a closed connection had in a pod is free, although the kernel takes its time to delete the link.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_link_that_is_to_go_soon_holds_nothing() {
    let connection = Connection::wanted();
    let next = Connection {
        links: connection.links.clone(),
        node: connection.node.clone(),
        pod: connection.pod.clone(),
        // Of other name, with the same addresses and routes.
        spec: LinkSpec {
            name: name("nsm-2"),
            ..link(1, 2)
        },
    };
    let mut was_still_there = false;
    for _ in 0..20 {
        connection.up().await.unwrap();
        let links = &connection.links;
        let own = alias();
        let held = links.holdings(&connection.pod, &own).await.unwrap();
        assert!(held.iter().any(|it| it.link == "nsm-1"), "{held:?}");
        links
            .down_pod_link_soon(&connection.spec.alias)
            .await
            .unwrap();
        let held = links.holdings(&connection.pod, &own).await.unwrap();
        assert_eq!(held, []);
        was_still_there |= link_names(&connection.pod) == ["nsm-1"];
        next.up().await.unwrap();
        next.assert_is_wanted().await;
        let links = &next.links;
        links.down_pod_link_soon(&next.spec.alias).await.unwrap();
    }
    assert!(was_still_there, "the pod was looked at after the deletions");
    connection.links.settled().await;
    assert_eq!(link_names(&connection.pod), [""; 0]);
}

/// Closed connections do not wait for the kernel, and whoever comes next does.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn links_that_are_to_go_soon_are_in_nobodys_way() {
    let connection = Connection::wanted();
    let mut next = Connection {
        links: connection.links.clone(),
        node: connection.node.clone(),
        pod: connection.pod.clone(),
        spec: link(1, 2),
    };
    for _ in 0..5 {
        let before = connection.up().await.unwrap();
        connection
            .links
            .down_pod_link_soon(&connection.spec.alias)
            .await
            .unwrap();
        // The same connection.
        let made = connection.up().await.unwrap();
        assert!(made.pod.created && made.node.index != before.node.index);
        connection.assert_is_wanted().await;

        // Another one, of the same name in the same pod.
        connection
            .links
            .down_pod_link_soon(&connection.spec.alias)
            .await
            .unwrap();
        next.up().await.unwrap();
        next.assert_is_wanted().await;
        next.links
            .down_pod_link_soon(&next.spec.alias)
            .await
            .unwrap();
        next.spec.alias = alias();
    }
    connection.links.settled().await;
    assert_eq!(link_names(&connection.node), [""; 0]);
    connection.links.settled().await;

    // The links of a pod are no hindrance, whatever their number.
    let mut specs = vec![];
    for number in 0..20 {
        let mut spec = link(1, 2);
        spec.name = name(&format!("nsm-{number}"));
        (spec.routes, spec.neighbours) = (vec![], vec![]);
        connection
            .links
            .up_pod_link(&connection.pod, &spec)
            .await
            .unwrap();
        specs.push(spec);
    }
    for spec in &specs {
        let soon = connection.links.down_pod_link_soon(&spec.alias);
        soon.await.unwrap();
    }
    connection.links.settled().await;
    assert_eq!(link_names(&connection.pod), [""; 0]);
}
