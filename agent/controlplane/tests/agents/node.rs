//! A node that cannot do what was agreed: VNIs that are taken, a kernel that refuses.

use nsm_controlplane::ports::ForwarderError;
use tonic::Code;

use crate::support::{Client, World, assert_refusal, taken};

const SERVICE: &str = "svc@peer.example";
const HONEST: &str = "icmp-responder@cluster-2.example";

#[tokio::test]
async fn a_vni_that_is_taken_here_is_asked_for_again() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let peer = world.foreign_domain("peer.example", "svc").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    // Something else on the node has the first, management the second, and then ours the third.
    a.kernel().occupy(9001);
    peer.choose_vnis([8000, 9001, 1, 8000, 9003]);
    let first = client.ask(SERVICE).await;
    let second = client.ask(SERVICE).await;
    assert_eq!(second.fact("nsm-vni"), "9003");
    assert_eq!(a.kernel().refused_vnis(), [9001]);
    assert_eq!(peer.closes().len(), 3);
    assert_eq!(peer.standing().len(), 2);
    assert_eq!(a.plane.holdings().vnis, 2);

    // A peer that cannot do better is left after four.
    peer.choose_vnis([8000, 9003, 9001, 8000, 4242]);
    let asked = peer.requests().len();
    let status = client.refused(client.request_for(SERVICE)).await;
    let words = [&peer.url, "VNI 8000", "4 times"];
    assert_refusal(&status, Code::ResourceExhausted, &words);
    assert_eq!(peer.requests().len(), asked + 4);
    for it in [first, second] {
        client.close(&it.connection).await.expect("closed");
    }
    world.settles(&before).await;
}

#[tokio::test]
async fn a_vni_that_is_taken_at_the_server_is_chosen_again() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    for _ in 0..3 {
        b.kernel().fail_next_up(taken(5));
    }
    let granted = client.ask(HONEST).await;
    assert_eq!(endpoint.requests().len(), 1);
    assert_eq!(a.kernel().only().tunnel, b.kernel().only().tunnel);
    client.close(&granted.connection).await.expect("closed");
    for _ in 0..4 {
        b.kernel().fail_next_up(taken(5));
    }
    let status = client.refused(client.request_for(HONEST)).await;
    assert_refusal(&status, Code::ResourceExhausted, &["VNI 5 is in use"]);
    world.settles(&before).await;
}

#[tokio::test]
async fn a_kernel_that_refuses_undoes_the_whole_way() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    world.endpoint(a, "nse-2", "local").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    for (agent, service) in [(a, HONEST), (b, HONEST), (a, "local")] {
        agent
            .kernel()
            .fail_next_up(ForwarderError::Kernel("out of memory".to_owned()));
        let status = client.refused(client.request_for(service)).await;
        assert_refusal(&status, Code::FailedPrecondition, &["out of memory"]);
        world.settles(&before).await;
    }
    assert_eq!(endpoint.closes().len(), 2);

    // An interface name that is taken.
    let granted = client.ask(HONEST).await;
    let mut request = client.request_for(HONEST);
    let name = crate::support::parameter(&granted.connection, "name");
    request.mechanism_preferences = vec![client.kernel(name)];
    let status = client.refused(request).await;
    assert_refusal(&status, Code::InvalidArgument, &[name, client.netns()]);

    // A refresh that cannot be done leaves what stood, or closes it everywhere; never half.
    a.kernel()
        .fail_next_up(ForwarderError::Kernel("busy".to_owned()));
    client.refresh(&granted).await.expect_err("busy");
    assert_eq!(a.kernel().only().tunnel, b.kernel().only().tunnel);
    assert_eq!(endpoint.standing().len(), 1);
    client.refresh(&granted).await.expect("refreshed");
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;

    // Without a way out nobody is asked.
    let asked = endpoint.requests().len();
    a.kernel().lose_underlay();
    let status = client.refused(client.request_for(HONEST)).await;
    assert_refusal(&status, Code::FailedPrecondition, &["no route to the peer"]);
    assert_eq!(endpoint.requests().len(), asked);
    world.settles(&before).await;
}
