//! VXLAN links: made, found as they are, changed, removed.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use nsm_core::link::{Link, LinkKind, VxlanSpec};
use nsm_dataplane::links::Links;

use crate::support::{
    add_foreign_link, eventually, in_thread, inside, ip, link_names, mac, name, net, netns, route,
    vxlan,
};

/// Compares a link with what was wanted, without the planner's help.
pub(crate) fn assert_is(link: &Link, spec: &VxlanSpec) {
    let wanted = &spec.link;
    assert_eq!(
        link.kind,
        LinkKind::Vxlan {
            vni: spec.vni.get(),
            local: Some(spec.local),
            remote: Some(spec.remote),
            port: spec.port
        }
    );
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
    let mut spec = vxlan(100);
    spec.link.routes.extend([
        route("10.1.0.0/16", Some("172.16.1.2")),
        route("fd00:9::/48", Some("fd00:1::2")),
    ]);
    // IPv4 over an IPv6 next hop, and a route that comes with an address.
    spec.link
        .routes
        .push(route("10.2.0.0/16", Some("fd00:1::2")));
    spec.link.addresses.push(net("10.3.0.1/24"));

    let up = links.up_vxlan(&pod, &spec).await.unwrap();
    assert!(up.created);
    assert_eq!((up.name.as_str(), Some(up.mac)), ("nsm-1", spec.link.mac));
    let link = links
        .observe(&pod, &spec.link.alias)
        .await
        .unwrap()
        .unwrap();
    assert_is(&link, &spec);
    assert_eq!(link.index, up.index);
    assert_eq!(link_names(&pod), ["nsm-1"]);
    assert_eq!(link_names(&node), [""; 0]);

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
    // The socket is the node's.
    let sockets = inside(&node, || {
        std::fs::read_to_string("/proc/thread-self/net/udp").unwrap()
    });
    assert!(sockets.contains(":12B5 "), "{sockets}");
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn asked_twice_is_one() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    let spec = vxlan(100);
    let first = links.up_vxlan(&pod, &spec).await.unwrap();
    let second = links.up_vxlan(&pod, &spec).await.unwrap();
    assert_eq!(
        (second.created, second.operations, second.index, second.mac),
        (false, 0, first.index, first.mac)
    );
    assert_eq!(link_names(&pod), ["nsm-1"]);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn keeps_the_address_that_the_kernel_drew() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    let mut spec = vxlan(100);
    spec.link.mac = None;
    let first = links.up_vxlan(&pod, &spec).await.unwrap();
    assert!(first.mac.is_unicast());
    assert_eq!(links.up_vxlan(&pod, &spec).await.unwrap().mac, first.mac);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn changes_in_place() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    let mut spec = vxlan(100);
    let first = links.up_vxlan(&pod, &spec).await.unwrap();

    type Change = fn(&mut VxlanSpec);
    let changes: [(&str, Change); 9] = [
        ("remote", |spec| spec.remote = ip("192.0.2.3")),
        ("local", |spec| spec.local = ip("192.0.2.9")),
        ("mtu", |spec| spec.link.mtu = 1400),
        ("mac", |spec| spec.link.mac = Some(mac(9))),
        ("neighbour", |spec| spec.link.neighbours[0].1 = mac(8)),
        ("address", |spec| {
            spec.link.addresses[0] = net("172.16.1.7/24")
        }),
        ("second address", |spec| {
            spec.link.addresses.insert(0, net("172.16.1.8/24"))
        }),
        ("prefix length", |spec| {
            spec.link.addresses[2] = net("fd00:1::1/64")
        }),
        ("routes", |spec| {
            spec.link.routes = vec![route("10.0.0.0/8", Some("172.16.1.2"))]
        }),
    ];
    for (what, change) in changes {
        change(&mut spec);
        let up = links.up_vxlan(&pod, &spec).await.unwrap();
        assert!(
            !up.created && up.index == first.index && up.operations > 0,
            "{what}: {up:?}"
        );
        assert_is(
            &links
                .observe(&pod, &spec.link.alias)
                .await
                .unwrap()
                .unwrap(),
            &spec,
        );
        assert_eq!(
            links.up_vxlan(&pod, &spec).await.unwrap().operations,
            0,
            "{what}"
        );
    }
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_made_anew_where_it_must() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    let mut spec = vxlan(100);
    type Change = fn(&mut VxlanSpec);
    let changes: [(&str, Change); 4] = [
        ("vni", |spec| spec.vni = 101.try_into().unwrap()),
        ("port", |spec| spec.port = 8472),
        ("family", |spec| {
            (spec.local, spec.remote) = (ip("2001:db8::1"), ip("2001:db8::2"))
        }),
        ("name", |spec| spec.link.name = name("other")),
    ];
    links.up_vxlan(&pod, &spec).await.unwrap();
    for (what, change) in changes {
        change(&mut spec);
        assert!(links.up_vxlan(&pod, &spec).await.unwrap().created, "{what}");
        assert_is(
            &links
                .observe(&pod, &spec.link.alias)
                .await
                .unwrap()
                .unwrap(),
            &spec,
        );
        assert_eq!(link_names(&pod), [spec.link.name.as_str()]);
    }
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn only_ours_goes() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    add_foreign_link(&pod, "eth0");
    let (one, mut ten) = (vxlan(1001), vxlan(1010));
    ten.link.alias = nsm_core::link::LinkAlias::new(
        one.link.alias.domain(),
        format!("{}0", one.link.alias.connection_id()),
    )
    .unwrap();
    ten.link.name = name("nsm-10");
    (ten.link.routes, ten.link.neighbours) = (vec![], vec![]);
    links.up_vxlan(&pod, &one).await.unwrap();
    links.up_vxlan(&pod, &ten).await.unwrap();

    assert!(links.down(&pod, &one.link.alias).await.unwrap());
    assert!(
        !links.down(&pod, &one.link.alias).await.unwrap(),
        "a second time there is none"
    );
    let mut left = link_names(&pod);
    left.sort();
    // The foreign link is a veth with both ends here.
    assert_eq!(left, ["eth0", "nsm-10", "veth0"]);
    let both = [one.link.alias, ten.link.alias];
    assert_eq!(links.down_many(&pod, &both).await.unwrap(), 1);
    assert_eq!(link_names(&pod).len(), 2);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn many_go_at_once_and_others_stay() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    add_foreign_link(&pod, "eth0");
    let mut aliases = vec![];
    for number in 0..5 {
        let mut spec = vxlan(200 + number);
        spec.link.name = name(&format!("nsm-{number}"));
        (spec.link.routes, spec.link.neighbours) = (vec![], vec![]);
        links.up_vxlan(&pod, &spec).await.unwrap();
        aliases.push(spec.link.alias);
    }
    let kept = aliases.pop().unwrap();
    assert_eq!(links.down_many(&pod, &aliases).await.unwrap(), 4);
    assert_eq!(links.down_many(&pod, &aliases).await.unwrap(), 0);
    assert_eq!(links.down_many(&pod, &[]).await.unwrap(), 0);
    let mut left = link_names(&pod);
    left.sort();
    assert_eq!(left, ["eth0", "nsm-4", "veth0"]);
    assert!(links.down(&pod, &kept).await.unwrap());
}

/// Many pods and many links of one pod at the same time; of those who want one VNI exactly one gets it.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn many_are_made_at_once() {
    let links = Links::in_namespace(netns());
    let shared = netns();
    let mut making = tokio::task::JoinSet::new();
    for number in 0..24 {
        let links = links.clone();
        let pod = if number % 2 == 0 {
            shared.clone()
        } else {
            netns()
        };
        let mut spec = vxlan(500 + number / 2);
        spec.link.name = name(&format!("nsm-{number}"));
        (spec.link.routes, spec.link.neighbours) = (vec![], vec![]);
        making.spawn(async move {
            let made = links.up_vxlan(&pod, &spec).await;
            (links, pod, spec, made)
        });
    }
    let (mut made, mut refused) = (0, 0);
    let mut standing = vec![];
    while let Some(done) = making.join_next().await {
        let (links, pod, spec, result) = done.unwrap();
        match result {
            Ok(_) => made += 1,
            Err(error) => {
                assert!(error.is_vni_taken(), "{error}");
                refused += 1;
                continue;
            }
        }
        assert_is(
            &links
                .observe(&pod, &spec.link.alias)
                .await
                .unwrap()
                .unwrap(),
            &spec,
        );
        standing.push((links, pod, spec.link.alias));
    }
    // Two of each pair want the same.
    assert_eq!((made, refused), (12, 12));
    for (links, pod, alias) in standing {
        assert!(links.down(&pod, &alias).await.unwrap());
        assert_eq!(links.observe(&pod, &alias).await.unwrap(), None);
    }
    assert_eq!(link_names(&shared), [""; 0]);
}

/// The pod goes, and with it link, VNI and socket; nothing of ours keeps it.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn goes_with_its_pod() {
    let node = netns();
    let links = Links::in_namespace(node.clone());
    let (path, stop) = pod_with_path();
    let spec = vxlan(100);
    {
        let pod = nsm_dataplane::netns::Netns::open(&path).unwrap();
        links.up_vxlan(&pod, &spec).await.unwrap();
        drop(stop);
        eventually(
            "the end of the pod",
            || match nsm_dataplane::netns::Netns::open(&path) {
                Err(error) if error.is_gone() => Ok(()),
                other => Err(format!("{other:?}")),
            },
        );
        // Only our handle holds it now; what was made in it can still be changed and counted.
        assert_eq!(links.up_vxlan(&pod, &spec).await.unwrap().operations, 0);
        let counted = links.readings(&pod).await.unwrap();
        assert!(counted.contains_key(&spec.link.alias));
    }
    let other = netns();
    let again = VxlanSpec {
        link: vxlan(100).link,
        ..spec
    };
    for _ in 0..1000 {
        match links.up_vxlan(&other, &again).await {
            Ok(_) => return,
            Err(error) => assert!(error.is_vni_taken(), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the VNI of a pod that is gone stays taken");
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

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_found_again_after_a_restart() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    // Found are namespaces that a process is in.
    let mut process = in_thread(|| {
        nix::sched::setns(&pod, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        Reaped(
            std::process::Command::new("sleep")
                .arg("60")
                .spawn()
                .unwrap(),
        )
    });
    let mut spec = vxlan(100);
    let domain = format!("restart.{}", spec.link.alias.domain());
    spec.link.alias = nsm_core::link::LinkAlias::new(&domain, "connection").unwrap();
    add_foreign_link(&pod, "eth0");
    links.up_vxlan(&pod, &spec).await.unwrap();

    let found = links.find_ours(&domain).await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].0.id(), pod.id());
    assert_is(&found[0].1, &spec);
    assert!(links.find_ours("another.example").await.unwrap().is_empty());
    process.0.kill().unwrap();
}

struct Reaped(std::process::Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
#[ignore = "needs root: network namespaces, VXLAN"]
async fn the_mtu_of_a_live_link_follows_and_nothing_else_changes() {
    let (node, pod) = (netns(), netns());
    let links = Links::in_namespace(node);
    let mut spec = vxlan(100);
    links.up_vxlan(&pod, &spec).await.unwrap();
    for wanted in [1300, 1500] {
        spec.link.mtu = wanted;
        let up = links.up_vxlan(&pod, &spec).await.unwrap();
        assert!(!up.created);
        assert_eq!(up.operations, 1);
        let link = links.observe(&pod, &spec.link.alias).await.unwrap();
        assert_is(&link.unwrap(), &spec);
    }
}
