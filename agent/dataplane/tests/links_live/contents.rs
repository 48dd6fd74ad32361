//! What lies on the pod's end of a link: made, changed, kept.

use std::{collections::BTreeSet, net::IpAddr};

use nsm_core::link::{Link, LinkAlias, LinkKind, LinkSpec, node_end_name};
use nsm_dataplane::{
    links::Links,
    netns::{Netns, NetnsError},
};

use crate::support::{
    add_foreign_link, eventually, inside, link, link_names, mac, name, net, netns, route,
};

/// Compares a link with what was wanted, without the planner's help.
pub(crate) fn assert_is(link: &Link, wanted: &LinkSpec) {
    assert!(matches!(link.kind, LinkKind::Veth { .. }), "{link:?}");
    assert!(link.up);
    assert_eq!(
        (link.name.as_str(), link.mtu, link.alias.as_ref()),
        (wanted.name.as_str(), wanted.mtu, Some(&wanted.alias))
    );
    if wanted.mac.is_some() {
        assert_eq!(link.mac, wanted.mac);
    }
    let is_global = |ip: IpAddr| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    let set = |addresses: &[ipnet::IpNet]| {
        addresses
            .iter()
            .copied()
            .filter(|address| is_global(address.addr()))
            .collect::<BTreeSet<_>>()
    };
    assert_eq!(set(&link.addresses), set(&wanted.addresses));
    assert_eq!(
        link.neighbours.iter().collect::<BTreeSet<_>>(),
        wanted.neighbours.iter().collect()
    );
    for route in &wanted.routes {
        assert!(
            link.routes.iter().any(|there| there.spec == *route),
            "{route:?} is not among {:?}",
            link.routes
        );
    }
    for route in link.routes.iter().filter(|route| route.ours) {
        assert!(
            wanted.routes.contains(&route.spec),
            "{route:?} is not wanted"
        );
    }
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_made_as_wanted() {
    let (node, pod) = (netns(), netns());
    let links = Links::in_namespace(node.clone());
    let mut spec = link(1, 2);
    spec.routes.extend([
        route("10.1.0.0/16", Some("172.16.1.2")),
        route("fd00:9::/48", Some("fd00:1::2")),
    ]);
    // IPv4 over an IPv6 next hop, and a route that comes with an address.
    spec.routes.push(route("10.2.0.0/16", Some("fd00:1::2")));
    spec.addresses.push(net("10.3.0.1/24"));

    let made = links.up_pod_link(&pod, &spec).await.unwrap();
    let up = made.pod;
    assert!(up.created);
    assert_eq!((up.name.as_str(), Some(up.mac)), ("nsm-1", spec.mac));
    let link = links.observe(&pod, &spec.alias).await.unwrap().unwrap();
    assert_is(&link, &spec);
    assert_eq!(link.index, up.index);
    assert_eq!(link_names(&pod), ["nsm-1"]);
    assert_eq!(link_names(&node), [made.node.name]);

    // The same by other eyes.
    let read = |path: &str| inside(&pod, || std::fs::read_to_string(path).unwrap());
    let routes = read("/proc/thread-self/net/route");
    // 10.1.0.0 through 172.16.1.2, in the order of the machine.
    assert!(
        routes
            .lines()
            .any(|line| line.starts_with("nsm-1\t0000010A\t020110AC\t")),
        "{routes}"
    );
    let neighbours = read("/proc/thread-self/net/arp");
    let neighbour = neighbours
        .lines()
        .find(|line| line.starts_with("172.16.1.2 "))
        .unwrap();
    // Complete and permanent (ATF_COM, ATF_PERM).
    assert_eq!(
        neighbour
            .split_ascii_whitespace()
            .skip(2)
            .collect::<Vec<_>>(),
        ["0x6", "02:00:00:00:00:02", "*", "nsm-1"]
    );
    let addresses = read("/proc/thread-self/net/if_inet6");
    // No duplicate address detection (IFA_F_NODAD) and permanent: usable at once.
    assert!(
        addresses
            .lines()
            .any(|line| line.starts_with("fd000001000000000000000000000001")
                && line.contains(" 80 00 82 ")),
        "{addresses}"
    );
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn keeps_the_address_that_the_kernel_drew() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    let mut spec = link(1, 2);
    spec.mac = None;
    let first = links.up_pod_link(&pod, &spec).await.unwrap().pod;
    assert!(first.mac.is_unicast());
    assert_eq!(
        links.up_pod_link(&pod, &spec).await.unwrap().pod.mac,
        first.mac
    );
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn changes_in_place() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    let mut spec = link(1, 2);
    let first = links.up_pod_link(&pod, &spec).await.unwrap().pod;

    type Change = fn(&mut LinkSpec);
    let changes: [(&str, Change); 7] = [
        ("mtu", |spec| spec.mtu = 1400),
        ("mac", |spec| spec.mac = Some(mac(9))),
        ("neighbour", |spec| spec.neighbours[0].1 = mac(8)),
        ("address", |spec| spec.addresses[0] = net("172.16.1.7/24")),
        ("second address", |spec| {
            spec.addresses.insert(0, net("172.16.1.8/24"))
        }),
        ("prefix length", |spec| {
            spec.addresses[2] = net("fd00:1::1/64")
        }),
        ("routes", |spec| {
            spec.routes = vec![route("10.0.0.0/8", Some("172.16.1.2"))]
        }),
    ];
    for (what, change) in changes {
        change(&mut spec);
        let up = links.up_pod_link(&pod, &spec).await.unwrap().pod;
        assert!(
            !up.created && up.index == first.index && up.operations > 0,
            "{what}: {up:?}"
        );
        assert_is(
            &links.observe(&pod, &spec.alias).await.unwrap().unwrap(),
            &spec,
        );
        assert_eq!(
            links.up_pod_link(&pod, &spec).await.unwrap().pod.operations,
            0,
            "{what}"
        );
    }
}

/// An alias that begins as another one is another's, and links of others are nobody's.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn only_what_is_meant_goes() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    add_foreign_link(&pod, "eth0");
    let (one, mut ten) = (link(1, 2), link(1, 2));
    let id = format!("{}0", one.alias.connection_id());
    ten.alias = LinkAlias::new(one.alias.domain(), id).unwrap();
    ten.name = name("nsm-10");
    (ten.routes, ten.neighbours) = (vec![], vec![]);
    links.up_pod_link(&pod, &one).await.unwrap();
    links.up_pod_link(&pod, &ten).await.unwrap();

    let aliases = [one.alias];
    assert_eq!(links.down_pod_links(&aliases).await.unwrap(), 1);
    assert_eq!(links.down_pod_links(&aliases).await.unwrap(), 0);
    let mut left = link_names(&pod);
    left.sort();
    // The foreign link is a veth with both ends here.
    assert_eq!(left, ["eth0", "nsm-10", "veth0"]);
}

/// Many pods and many links of one pod at the same time.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn many_are_made_at_once() {
    let node = netns();
    let links = Links::in_namespace(node.clone());
    let shared = netns();
    let mut making = tokio::task::JoinSet::new();
    for number in 0..24 {
        let links = links.clone();
        let pod = if number % 2 == 0 {
            shared.clone()
        } else {
            netns()
        };
        let mut spec = link(1, 2);
        spec.name = name(&format!("nsm-{number}"));
        (spec.routes, spec.neighbours) = (vec![], vec![]);
        making.spawn(async move {
            links.up_pod_link(&pod, &spec).await.unwrap();
            (pod, spec)
        });
    }
    // A namespace goes with its last handle, and takes its link along.
    let (mut aliases, mut pods) = (vec![], vec![]);
    while let Some(done) = making.join_next().await {
        let (pod, spec) = done.unwrap();
        let link = links.observe(&pod, &spec.alias).await.unwrap();
        assert_is(&link.unwrap(), &spec);
        aliases.push(spec.alias);
        pods.push(pod);
    }
    assert_eq!(links.down_pod_links(&aliases).await.unwrap(), 24);
    assert_eq!((link_names(&shared).len(), link_names(&node).len()), (0, 0));
}

/// The pod goes, and with it both ends; nothing of ours keeps it.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn goes_with_its_pod() {
    let node = netns();
    let links = Links::in_namespace(node.clone());
    let (path, stop) = pod_with_path();
    let spec = link(1, 2);
    {
        let pod = Netns::open(&path).unwrap();
        links.up_pod_link(&pod, &spec).await.unwrap();
        drop(stop);
        eventually("the end of the pod", || match Netns::open(&path) {
            Err(error) if NetnsError::is_gone(&error) => Ok(()),
            other => Err(format!("{other:?}")),
        });
        // Only our handle holds it now; what was made in it can still be changed and counted.
        let same = links.up_pod_link(&pod, &spec).await.unwrap();
        assert_eq!(same.pod.operations, 0);
        let counted = links.readings(&pod).await.unwrap();
        assert!(counted.contains_key(&spec.alias));
    }
    let name = node_end_name(&spec.alias).to_string();
    eventually("the node's end goes", || {
        let names = link_names(&node);
        if names.contains(&name) {
            Err(format!("{names:?}"))
        } else {
            Ok(())
        }
    });
}

/// A namespace that has a path, `/proc/…`, as long as the sender is kept.
fn pod_with_path() -> (std::path::PathBuf, std::sync::mpsc::Sender<()>) {
    let (keep, kept) = std::sync::mpsc::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let thread = std::fs::read_link("/proc/thread-self").unwrap();
        tell.send(std::path::Path::new("/proc").join(thread).join("ns/net"))
            .unwrap();
        let _ = kept.recv();
    });
    (told.recv().unwrap(), keep)
}

/// One operation: a path MTU that changes under traffic disturbs nothing else.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn the_mtu_of_a_live_link_follows_and_nothing_else_changes() {
    let (node, pod) = (netns(), netns());
    let links = Links::in_namespace(node);
    let mut spec = link(1, 2);
    links.up_pod_link(&pod, &spec).await.unwrap();
    for wanted in [1300, 1500] {
        spec.mtu = wanted;
        let up = links.up_pod_link(&pod, &spec).await.unwrap();
        assert_eq!((up.pod.created, up.node.mtu), (false, wanted));
        // One at each end.
        assert_eq!(up.pod.operations, 2);
        let link = links.observe(&pod, &spec.alias).await.unwrap();
        assert_is(&link.unwrap(), &spec);
    }
}
