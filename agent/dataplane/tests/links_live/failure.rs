//! What cannot be done is told, and leaves nothing.

use std::net::UdpSocket;

use nix::libc;
use nsm_core::{
    link::{LinkSpec, VxlanSpec},
    net::MacAddr,
};
use nsm_dataplane::{
    links::{LinkError, Links, PortHolder},
    netns::{Netns, NetnsError},
};

use crate::support::{
    add_foreign_link, add_route, alias, in_thread, inside, ip, link, link_names, name, net, netns,
    route, set_up, vxlan,
};

/// Expects a failure that leaves no link, and that a correct request afterwards succeeds: the VNI is free.
async fn fails(links: &Links, pod: &Netns, spec: &VxlanSpec) -> LinkError {
    let before = link_names(pod);
    let error = links.up_vxlan(pod, spec).await.unwrap_err();
    assert_eq!(link_names(pod), before, "{error}");
    let other = netns();
    let free = VxlanSpec {
        link: LinkSpec {
            alias: alias(),
            ..link(1, 2)
        },
        port: 4790,
        ..spec.clone()
    };
    links.up_vxlan(&other, &free).await.unwrap();
    assert!(links.down(&other, &free.link.alias).await.unwrap());
    error
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn the_name_is_taken() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    add_foreign_link(&pod, "nsm-1");
    let error = fails(&links, &pod, &vxlan(100)).await.to_string();
    assert!(
        error.contains("`nsm-1` is taken") && error.contains("a veth that is not ours"),
        "{error}"
    );

    let mut spec = vxlan(100);
    spec.link.name = name("lo");
    let error = fails(&links, &pod, &spec).await.to_string();
    assert!(error.contains("a device that is not ours"), "{error}");

    // By another connection.
    spec.link.name = name("nsm-2");
    links.up_vxlan(&pod, &spec).await.unwrap();
    let mut other = vxlan(101);
    other.link.name = name("nsm-2");
    let error = fails(&links, &pod, &other).await;
    assert!(
        matches!(&error, LinkError::NameTaken { holder, .. } if holder.alias == Some(spec.link.alias)),
        "{error}"
    );
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn the_vni_is_taken() {
    let (one, two) = (netns(), netns());
    let links = Links::in_namespace(netns());
    links.up_vxlan(&one, &vxlan(100)).await.unwrap();
    let mut spec = vxlan(100);
    // Whatever the remote.
    spec.remote = ip("192.0.2.77");
    let error = links.up_vxlan(&two, &spec).await.unwrap_err();
    assert!(error.is_vni_taken(), "{error}");
    assert!(
        error.to_string().contains("VNI 100") && error.to_string().contains("already exists"),
        "{error}"
    );
    assert_eq!(link_names(&two), [""; 0]);
    // Another VNI, and another port.
    spec.vni = 101.try_into().unwrap();
    links.up_vxlan(&two, &spec).await.unwrap();
    assert!(
        links
            .up_vxlan(
                &netns(),
                &VxlanSpec {
                    link: link(1, 2),
                    port: 4790,
                    ..vxlan(100)
                }
            )
            .await
            .is_ok()
    );
    // Another node does not mind.
    assert!(
        Links::in_namespace(netns())
            .up_vxlan(&netns(), &vxlan(100))
            .await
            .is_ok()
    );
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn the_port_is_taken() {
    for address in ["0.0.0.0:4789", "[::]:4789"] {
        let (node, pod) = (netns(), netns());
        let links = Links::in_namespace(node.clone());
        let socket = inside(&node, || UdpSocket::bind(address).unwrap());
        let error = fails(&links, &pod, &vxlan(100)).await;
        let LinkError::PortTaken {
            port: 4789,
            holder: PortHolder::Process { pid, .. },
            ..
        } = &error
        else {
            panic!("{address}: {error}")
        };
        assert_eq!(*pid, std::process::id());
        assert!(error.to_string().contains("UDP port 4789"), "{error}");
        drop(socket);
        links.up_vxlan(&pod, &vxlan(100)).await.unwrap();
    }
}

/// Each step that can be refused, with what must stand in the message.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn every_step_is_undone() {
    type Change = fn(&mut VxlanSpec);
    let steps: [(Change, &[&str]); 9] = [
        (
            |spec| spec.link.mac = Some(MacAddr::new([1, 0, 0, 0, 0, 1])),
            &["create vxlan link `nsm-1`"],
        ),
        (
            |spec| spec.link.mtu = 70_000,
            &["create vxlan link `nsm-1`"],
        ),
        (
            |spec| spec.remote = ip("2001:db8::1"),
            &["create vxlan link `nsm-1`"],
        ),
        // IPv6 needs an MTU of 1280.
        (
            |spec| spec.link.mtu = 1000,
            &[
                "address fd00:1::1/128 was refused on link `nsm-1`",
                "MTU of 1280",
            ],
        ),
        (
            |spec| {
                spec.link.mtu = 1000;
                spec.link.addresses.pop();
                spec.link.routes.pop();
            },
            &["neighbour fd00:1::2 was refused on link `nsm-1`"],
        ),
        (
            |spec| {
                spec.link
                    .routes
                    .push(route("10.0.0.0/8", Some("127.0.0.1")))
            },
            &["route to 10.0.0.0/8 via 127.0.0.1 was refused on link `nsm-1`"],
        ),
        (
            |spec| {
                spec.link
                    .routes
                    .push(route("10.0.0.0/8", Some("224.0.0.1")))
            },
            &["route to 10.0.0.0/8 via 224.0.0.1 was refused"],
        ),
        (
            |spec| {
                spec.link.routes.extend([
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
            |spec| {
                spec.link
                    .routes
                    .push(route("fd00:5::/64", Some("10.0.0.1")))
            },
            &["route to fd00:5::/64 via 10.0.0.1 was refused"],
        ),
    ];
    let pod = netns();
    let links = Links::in_namespace(netns());
    for (change, words) in steps {
        let mut spec = vxlan(100);
        change(&mut spec);
        let error = links.up_vxlan(&pod, &spec).await.unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
        println!("{error}");
        assert_eq!(link_names(&pod), [""; 0], "{error}");
    }
    // Whatever was refused, VNI and port are free.
    links.up_vxlan(&pod, &vxlan(100)).await.unwrap();
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
    let mut spec = vxlan(100);
    spec.link
        .routes
        .push(route("0.0.0.0/0", Some("172.16.1.2")));
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
    let mut spec = vxlan(100);
    let first = links.up_vxlan(&pod, &spec).await.unwrap();
    spec.link
        .routes
        .push(route("10.0.0.0/8", Some("224.0.0.1")));
    links.up_vxlan(&pod, &spec).await.unwrap_err();
    spec.link.routes.pop();
    assert_eq!(
        links.up_vxlan(&pod, &spec).await.unwrap().index,
        first.index
    );
}

/// Whoever gives up a request leaves no link, at whatever moment; asking again at once works.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn giving_up_leaves_nothing() {
    let pod = netns();
    let links = Links::in_namespace(netns());
    let mut kept_once = false;
    for microseconds in (0..2000).step_by(100) {
        let spec = vxlan(100);
        let call = links.up_vxlan(&pod, &spec);
        let finished =
            tokio::time::timeout(std::time::Duration::from_micros(microseconds), call).await;
        if let Ok(result) = finished {
            result.unwrap();
            kept_once = true;
            assert!(links.down(&pod, &spec.link.alias).await.unwrap());
        } else {
            // Waits until the call that was given up is undone.
            assert!(!links.down(&pod, &spec.link.alias).await.unwrap());
        }
        assert_eq!(
            link_names(&pod),
            [""; 0],
            "given up after {microseconds} µs"
        );
    }
    println!("finished at least once: {kept_once}");

    let spec = vxlan(100);
    for _ in 0..5 {
        let _ = tokio::time::timeout(std::time::Duration::ZERO, links.up_vxlan(&pod, &spec)).await;
    }
    assert!(links.up_vxlan(&pod, &spec).await.is_ok());
    assert!(
        links
            .observe(&pod, &spec.link.alias)
            .await
            .unwrap()
            .is_some()
    );
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
                .block_on(Links::in_namespace(node.clone()).up_vxlan(&pod, &vxlan(100)))
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
        error.to_string().contains("create vxlan link `nsm-1`"),
        "{error}"
    );
    assert_eq!(link_names(&pod), [""; 0]);
}
