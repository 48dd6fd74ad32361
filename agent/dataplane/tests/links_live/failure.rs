//! What cannot be done is told, and leaves nothing.

use nix::libc;
use nsm_core::{
    link::{LinkSpec, NodeLink},
    net::MacAddr,
};
use nsm_dataplane::{
    links::{LinkError, Links},
    netns::{Netns, NetnsError},
};

use crate::support::{
    add_foreign_link, add_route, domain, in_thread, inside, link, link_names, name, net, netns,
    route, set_up,
};

/// Expects a failure that leaves neither end of a link.
async fn fails(links: &Links, pod: &Netns, spec: &LinkSpec) -> LinkError {
    let before = link_names(pod);
    let error = links.up_pod_link(pod, spec).await.unwrap_err();
    assert_eq!(link_names(pod), before, "{error}");
    let node = links.pod_links(&domain()).await.unwrap();
    let is_left = |end: &NodeLink| end.alias.as_ref() == Some(&spec.alias);
    assert!(!node.iter().any(is_left), "{error}: {node:?}");
    error
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn the_name_is_taken() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    add_foreign_link(&pod, "nsm-1");
    let error = fails(&links, &pod, &link(1, 2)).await.to_string();
    assert!(
        error.contains("`nsm-1` is taken") && error.contains("a veth that is not ours"),
        "{error}"
    );

    let mut spec = link(1, 2);
    spec.name = name("lo");
    let error = fails(&links, &pod, &spec).await.to_string();
    assert!(error.contains("a device that is not ours"), "{error}");

    // By another connection.
    spec.name = name("nsm-2");
    links.up_pod_link(&pod, &spec).await.unwrap();
    let mut other = link(1, 2);
    other.name = name("nsm-2");
    let error = fails(&links, &pod, &other).await;
    assert!(
        matches!(&error, LinkError::NameTaken { holder, .. } if holder.alias == Some(spec.alias)),
        "{error}"
    );
}

/// Each step that can be refused, with what must stand in the message.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn every_step_is_undone() {
    type Change = fn(&mut LinkSpec);
    let steps: [(Change, &[&str]); 8] = [
        (
            |spec| spec.mac = Some(MacAddr::new([1, 0, 0, 0, 0, 1])),
            &["create veth link `nsm-1`"],
        ),
        (|spec| spec.mtu = 70_000, &["create veth link `nsm-1`"]),
        // IPv6 needs an MTU of 1280.
        (
            |spec| spec.mtu = 1000,
            &[
                "address fd00:1::1/128 was refused on link `nsm-1`",
                "MTU of 1280",
            ],
        ),
        (
            |spec| {
                spec.mtu = 1000;
                spec.addresses.pop();
                spec.routes.pop();
            },
            &["neighbour fd00:1::2 was refused on link `nsm-1`"],
        ),
        (
            |spec| spec.routes.push(route("10.0.0.0/8", Some("127.0.0.1"))),
            &["route to 10.0.0.0/8 via 127.0.0.1 was refused on link `nsm-1`"],
        ),
        (
            |spec| spec.routes.push(route("10.0.0.0/8", Some("224.0.0.1"))),
            &["route to 10.0.0.0/8 via 224.0.0.1 was refused"],
        ),
        (
            |spec| {
                spec.routes.extend([
                    route("10.0.0.0/8", Some("172.16.1.2")),
                    route("10.0.0.0/8", Some("172.16.1.3")),
                ])
            },
            &[
                "route to 10.0.0.0/8 via 172.16.1.3 was refused",
                "EEXIST",
                "another route to it in the namespace",
            ],
        ),
        (
            |spec| spec.routes.push(route("fd00:5::/64", Some("10.0.0.1"))),
            &["route to fd00:5::/64 via 10.0.0.1 was refused"],
        ),
    ];
    let pod = netns();
    let links = Links::in_namespace(netns());
    for (change, words) in steps {
        let mut spec = link(1, 2);
        change(&mut spec);
        let error = links
            .up_pod_link(&pod, &spec)
            .await
            .unwrap_err()
            .to_string();
        for word in words {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
        println!("{error}");
        assert_eq!(link_names(&pod), [""; 0], "{error}");
    }
    links.up_pod_link(&pod, &link(1, 2)).await.unwrap();
}

/// A route of somebody else in the pod is not replaced.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn others_routes_are_left_alone() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    add_foreign_link(&pod, "eth0");
    let index =
        |name: &'static str| inside(&pod, move || nix::net::if_::if_nametoindex(name).unwrap());
    for end in ["eth0", "veth0"] {
        set_up(&pod, index(end), true);
    }
    add_route(&pod, index("eth0"), net("0.0.0.0/0"), None);
    let mut spec = link(1, 2);
    spec.routes.push(route("0.0.0.0/0", Some("172.16.1.2")));
    let error = fails(&links, &pod, &spec).await;
    assert!(matches!(error, LinkError::RouteRefused { .. }), "{error}");
    let routes = inside(&pod, || {
        std::fs::read_to_string("/proc/thread-self/net/route").unwrap()
    });
    assert!(routes.contains("eth0\t00000000\t"), "{routes}");
}

/// A change that is refused leaves the link that was there.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_refused_change_keeps_the_link() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    let mut spec = link(1, 2);
    let first = links.up_pod_link(&pod, &spec).await.unwrap();
    spec.routes.push(route("10.0.0.0/8", Some("224.0.0.1")));
    links.up_pod_link(&pod, &spec).await.unwrap_err();
    spec.routes.pop();
    assert_eq!(
        links.up_pod_link(&pod, &spec).await.unwrap().pod.index,
        first.pod.index
    );
}

async fn down(links: &Links, spec: &LinkSpec) -> usize {
    let aliases = [spec.alias.clone()];
    links.down_pod_links(&aliases).await.unwrap()
}

/// Whoever gives up a request leaves no link, at whatever moment; asking again at once works.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn giving_up_leaves_nothing() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    let mut kept_once = false;
    for microseconds in (0..2000).step_by(100) {
        let spec = link(1, 2);
        let call = links.up_pod_link(&pod, &spec);
        let finished =
            tokio::time::timeout(std::time::Duration::from_micros(microseconds), call).await;
        if let Ok(result) = finished {
            result.unwrap();
            kept_once = true;
            assert_eq!(down(&links, &spec).await, 1);
        } else {
            // Waits until the call that was given up is undone.
            assert_eq!(down(&links, &spec).await, 0);
        }
        assert_eq!(
            link_names(&pod),
            [""; 0],
            "given up after {microseconds} µs"
        );
    }
    println!("finished at least once: {kept_once}");

    let spec = link(1, 2);
    for _ in 0..5 {
        let _ =
            tokio::time::timeout(std::time::Duration::ZERO, links.up_pod_link(&pod, &spec)).await;
    }
    assert!(links.up_pod_link(&pod, &spec).await.is_ok());
    assert!(links.observe(&pod, &spec.alias).await.unwrap().is_some());
}

/// Drops capabilities of the calling thread alone, and of those that it starts.
fn drop_capabilities(dropped: &[u32]) {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    /// _LINUX_CAPABILITY_VERSION_3 of linux/capability.h: two words of each.
    const VERSION: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: header and data have the layout of version 3, and the kernel only writes to data.
    let read = unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) };
    assert_eq!(read, 0);
    for capability in dropped {
        let word = &mut data[*capability as usize / 32];
        word.effective &= !(1 << (capability % 32));
        word.permitted &= !(1 << (capability % 32));
    }
    // SAFETY: as above; the kernel only reads.
    let written = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    assert_eq!(written, 0);
}

const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

#[test]
#[ignore = "needs root: makes network namespaces and links"]
fn missing_rights_are_named() {
    let (node, pod) = (netns(), netns());
    let attempt = |dropped: &'static [u32]| {
        in_thread(|| {
            drop_capabilities(dropped);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .unwrap();
            runtime
                .block_on(Links::in_namespace(node.clone()).up_pod_link(&pod, &link(1, 2)))
                .unwrap_err()
        })
    };
    let error = attempt(&[CAP_SYS_ADMIN]);
    assert!(
        matches!(error, LinkError::Namespace(NetnsError::EnterDenied { .. })),
        "{error}"
    );
    assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
    let error = attempt(&[CAP_NET_ADMIN]);
    assert!(
        matches!(
            error,
            LinkError::NotPermitted {
                capability: "CAP_NET_ADMIN",
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("create veth link `nsm-1`"),
        "{error}"
    );
    assert_eq!(link_names(&pod), [""; 0]);
}
