//! Changes of the node's own addresses are told.

use std::time::Duration;

use nsm_dataplane::addresses::AddressEvents;

use crate::support::{add_address, delete_link, inside, net, two_nodes};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
#[ignore = "needs root: makes network namespaces and links"]
async fn an_address_that_comes_or_goes_is_told_and_one_of_another_namespace_is_not() {
    let (node, other) = two_nodes();
    let runtime = tokio::runtime::Handle::current();
    let mut events = inside(&node, || {
        let _runtime = runtime.enter();
        AddressEvents::open().unwrap()
    });
    let index = |netns| inside(netns, || nix::net::if_::if_nametoindex("eth0").unwrap());

    add_address(&other, index(&other), net("198.51.100.2/24"));
    add_address(&node, index(&node), net("198.51.100.1/24"));
    add_address(&node, index(&node), net("2001:db8:1::1/64"));
    let told = tokio::time::timeout(PATIENCE, events.changed()).await;
    told.expect("an address came").unwrap();

    // What is left of the burst, such as the end of IPv6's duplicate detection.
    while let Ok(told) = tokio::time::timeout(Duration::from_millis(100), events.changed()).await {
        told.unwrap();
    }
    delete_link(&node, index(&node));
    let told = tokio::time::timeout(PATIENCE, events.changed()).await;
    told.expect("the addresses went with their link").unwrap();
}
