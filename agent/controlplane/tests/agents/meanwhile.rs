//! What is learnt of a path while a connection over it is being made.

use nsm_controlplane::ports::Plan;

use crate::support::{Client, SERVICE, World, eventually};

const FAR: &str = "192.0.2.2";

/// The link is asked for with the MTU that was known then. What the search finds next is told to the connections there are, and this
/// one is not yet among them.
#[tokio::test]
async fn the_mtu_that_is_found_while_the_link_is_made_holds() {
    let world = World::two().await;
    let [a, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let held = a.kernel().make_no_links().await;
    let find = async {
        eventually(1, || a.kernel().asked()).await;
        let visits = a.kernel().paths().visits();
        a.kernel().paths().set_mtu(FAR, 1230);
        eventually(visits + 1, || a.kernel().paths().visits()).await;
        drop(held);
    };
    let (granted, ()) = tokio::join!(client.ask(SERVICE), find);
    let mtu = || match a.kernel().only().plan {
        Plan::Vxlan { spec, .. } => spec.link.mtu,
        Plan::Pair { .. } => 0,
    };
    eventually(1230, mtu).await;
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}
