//! What the node knows of the way to a peer.

use nsm_dataplane::links::{LinkError, Links};

use crate::support::{
    add_address, add_foreign_link, add_multipath_route, add_route, inside, ip, link, net, netns,
    set_up, two_nodes,
};

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn is_read_from_the_nodes_routes() {
    let (node, _other) = two_nodes();
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

/// As nodes with two uplinks have it.
#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_default_route_of_several_ways_has_a_source() {
    for (default, gateway, source, other_gateway, far) in [
        (
            "0.0.0.0/0",
            "192.0.2.2",
            "192.0.2.1",
            "198.51.100.9",
            "203.0.113.9",
        ),
        (
            "::/0",
            "2001:db8::2",
            "2001:db8::1",
            "2001:db8:1::9",
            "2001:db8:9::9",
        ),
    ] {
        let (node, _other) = two_nodes();
        add_foreign_link(&node, "eth1");
        let [eth0, eth1] = ["eth0", "eth1"]
            .map(|name| inside(&node, move || nix::net::if_::if_nametoindex(name).unwrap()));
        set_up(&node, eth1, true);
        add_address(&node, eth1, net("198.51.100.1/24"));
        add_address(&node, eth1, net("2001:db8:1::1/64"));
        let ways = [(eth0, ip(gateway)), (eth1, ip(other_gateway))];
        add_multipath_route(&node, net(default), &ways);
        let links = Links::in_namespace(node.clone());
        assert_eq!(links.default_source().await.unwrap(), ip(source));
        let chosen = links.source_address(ip(far)).await.unwrap();
        let own = ["192.0.2.1", "198.51.100.1", "2001:db8::1", "2001:db8:1::1"];
        assert!(own.into_iter().any(|own| ip(own) == chosen), "{chosen}");
        assert_eq!(links.underlay_mtu(ip(far)).await.unwrap(), 1500);
    }
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
