//! The external device: made, adopted, repaired, and refused where the port is somebody else's.

use std::net::UdpSocket;

use nsm_core::link::NODE_GROUP;
use nsm_dataplane::{
    links::{ExternalSpec, LinkError, Links, Look, PortHolder},
    netns::Netns,
};

use crate::support::{add_foreign_vxlan, domain, inside, ip_tool, link_names, netns};

fn spec() -> ExternalSpec {
    ExternalSpec {
        domain: domain(),
        port: 4789,
    }
}

fn node() -> (Netns, Links) {
    let node = netns();
    (node.clone(), Links::in_namespace(node))
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_made_once_and_adopted() {
    let (node, links) = node();
    let made = links.up_external(&spec()).await.unwrap();
    assert!(!made.adopted && made.link.up && !made.link.arp && !made.link.generates_addresses);
    assert_eq!((made.link.group, made.link.peer), (NODE_GROUP, None));
    // Both families, whatever the device's own.
    let sockets = |table: &str| {
        let table = format!("/proc/thread-self/net/{table}");
        inside(&node, || std::fs::read_to_string(table).unwrap())
    };
    for table in ["udp", "udp6"] {
        assert!(sockets(table).contains(":12B5"), "{}", sockets(table));
    }

    let again = Links::in_namespace(node.clone());
    let adopted = again.up_external(&spec()).await.unwrap();
    assert!(adopted.adopted);
    assert_eq!(adopted.link, made.link);
    // It has no connection, so nothing takes it for an orphan.
    assert!(links.pod_links(&domain()).await.unwrap().is_empty());
    assert!(links.find_ours(&domain()).await.unwrap().is_empty());

    links.down_external(&spec()).await.unwrap();
    links.down_external(&spec()).await.unwrap();
    assert_eq!(link_names(&node), [""; 0]);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_repaired() {
    let (node, links) = node();
    let made = links.up_external(&spec()).await.unwrap();
    assert_eq!(links.look_at_external(&made).await.unwrap(), Look::Right);
    let name = made.link.name.as_str();
    ip_tool(&node, &["link", "set", name, "down"]);
    ip_tool(
        &node,
        &[
            "link", "set", name, "group", "7", "arp", "on", "name", "other",
        ],
    );
    let look = links.look_at_external(&made).await.unwrap();
    assert!(matches!(look, Look::Repaired(_)), "{look:?}");
    let adopted = links.up_external(&spec()).await.unwrap();
    assert_eq!(adopted.link, made.link);

    ip_tool(&node, &["link", "delete", name]);
    assert_eq!(links.look_at_external(&made).await.unwrap(), Look::Gone);
    assert!(!links.up_external(&spec()).await.unwrap().adopted);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn one_that_is_not_as_wanted_is_made_anew() {
    let (node, links) = node();
    let made = links.up_external(&spec()).await.unwrap();
    let alias = made.link.alias.unwrap().to_string();
    let name = made.link.name.as_str();
    ip_tool(&node, &["link", "delete", name]);
    ip_tool(
        &node,
        &[
            "link", "add", name, "type", "vxlan", "external", "dstport", "4790",
        ],
    );
    ip_tool(&node, &["link", "set", name, "alias", &alias]);
    assert!(!links.up_external(&spec()).await.unwrap().adopted);

    // A stranger's link of the same name stays.
    links.down_external(&spec()).await.unwrap();
    ip_tool(&node, &["link", "add", name, "type", "bridge"]);
    let error = links.up_external(&spec()).await.unwrap_err();
    assert!(matches!(error, LinkError::NameTaken { .. }), "{error}");
    links.down_external(&spec()).await.unwrap();
    assert_eq!(link_names(&node), [name]);
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_port_that_is_taken_is_reported() {
    let (node, links) = node();
    let socket = inside(&node, || UdpSocket::bind("0.0.0.0:4789").unwrap());
    let error = links.up_external(&spec()).await.unwrap_err();
    let LinkError::PortTaken { holder, .. } = &error else {
        panic!("{error}");
    };
    assert!(
        matches!(holder, PortHolder::Process { pid, .. } if *pid == std::process::id()),
        "{error}"
    );
    drop(socket);
    assert_eq!(link_names(&node), [""; 0]);

    // A VXLAN device of another program, as Calico has one on this port.
    let pod = netns();
    add_foreign_vxlan(&node, &pod, (4789, 4789));
    let error = links.up_external(&spec()).await.unwrap_err();
    assert!(matches!(error, LinkError::PortTaken { .. }), "{error}");
    assert_eq!(link_names(&node), [""; 0]);
}

/// It probed by a VXLAN device on the same port.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn the_probe_link_of_an_earlier_version_goes() {
    let (node, links) = node();
    let words = [
        "nsm-mgmt4-4789",
        "type",
        "vxlan",
        "id",
        "7",
        "dstport",
        "4789",
    ];
    ip_tool(&node, &[&["link", "add"], words.as_slice()].concat());
    ip_tool(&node, &["link", "set", "nsm-mgmt4-4789", "up"]);
    let alias = format!("proxy-nsmgr/{}/management-4789", domain());
    ip_tool(&node, &["link", "set", "nsm-mgmt4-4789", "alias", &alias]);
    let made = links.up_external(&spec()).await.unwrap();
    assert_eq!(link_names(&node), [made.link.name]);
}
