//! What the node knows of the way to a peer.

use nsm_dataplane::links::{LinkError, Links};

use crate::support::{
    add_address, add_foreign_link, add_route, inside, ip, link, net, netns, set_up, two_nodes,
};

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_read_from_the_nodes_routes() {
    let (node, _other) = two_nodes().await;
    let links = Links::in_namespace(node.clone());
    assert_eq!(links.underlay_mtu(ip("192.0.2.2")).await.unwrap(), 1500);
    assert_eq!(links.underlay_mtu(ip("2001:db8::2")).await.unwrap(), 1500);
    assert_eq!(
        links.source_address(ip("192.0.2.2")).await.unwrap(),
        ip("192.0.2.1")
    );
    assert_eq!(
        links.source_address(ip("2001:db8::2")).await.unwrap(),
        ip("2001:db8::1")
    );

    let error = links.underlay_mtu(ip("198.51.100.1")).await.unwrap_err();
    assert!(matches!(error, LinkError::NoRoute { .. }), "{error}");
    assert!(
        error.to_string().contains("no route to 198.51.100.1"),
        "{error}"
    );
    assert!(matches!(
        links.source_address(ip("198.51.100.1")).await,
        Err(LinkError::NoRoute { .. })
    ));
    assert!(matches!(
        links.default_source().await,
        Err(LinkError::NoDefaultRoute)
    ));

    let eth0 = inside(&node, || nix::net::if_::if_nametoindex("eth0").unwrap());
    add_route(&node, eth0, net("::/0"), Some(ip("2001:db8::2")));
    assert_eq!(links.default_source().await.unwrap(), ip("2001:db8::1"));
    add_route(&node, eth0, net("0.0.0.0/0"), Some(ip("192.0.2.2")));
    assert_eq!(links.default_source().await.unwrap(), ip("192.0.2.1"));
    assert_eq!(
        links.source_address(ip("198.51.100.1")).await.unwrap(),
        ip("192.0.2.1")
    );
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_node_without_links_has_no_way() {
    let links = Links::in_namespace(netns());
    assert!(matches!(
        links.default_source().await,
        Err(LinkError::NoDefaultRoute)
    ));
    assert!(matches!(
        links.underlay_mtu(ip("192.0.2.2")).await,
        Err(LinkError::NoRoute { .. })
    ));
}

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_connection_in_the_nodes_own_namespace_is_no_network_of_the_node() {
    let node = netns();
    add_foreign_link(&node, "eth0");
    let eth0 = inside(&node, || nix::net::if_::if_nametoindex("eth0").unwrap());
    set_up(&node, eth0, true);
    add_address(&node, eth0, net("192.0.2.1/24"));
    let links = Links::in_namespace(node.clone());
    links.up_pod_link(&node, &link(1, 2)).await.unwrap();
    assert_eq!(
        links.own_addresses().await.unwrap(),
        [net("192.0.2.1/24")],
        "a refresh would find its own address taken"
    );
}
