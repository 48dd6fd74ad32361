//! Another endpoint for a connection: RESELECT_REQUESTED where the agent does not have it any more, and a change between this node and another.

use nsm_controlplane::ports::Plan;
use nsm_proto::{connection::State, networkservice::NetworkServiceRequest};

use crate::support::{Client, Setup, World, client_side, eventually};

const SERVICE: &str = "icmp-responder@cluster-2.example";

/// The hops behind the agent still have it. They get the state, and let the old endpoint go.
#[tokio::test]
async fn an_agent_that_has_forgotten_the_connection_passes_the_wish_on() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    a.kill();
    a.kernel().forget();
    let a = a.start_again().await;
    world.tell_hosts_to(&a);
    let client = Client::on_node(&a).await;
    let mut connection = granted.connection.clone();
    connection.set_state(State::ReselectRequested);
    connection.network_service_endpoint_name.clear();
    connection.mechanism = None;
    let again = client
        .send(NetworkServiceRequest {
            connection: Some(connection),
            mechanism_preferences: vec![client.kernel("nsm-1")],
        })
        .await
        .expect("granted");
    assert_eq!(again.connection.state(), State::Up);
    assert_eq!(endpoint.closes().len(), 1, "the old one is closed");
    assert_eq!(endpoint.standing().len(), 1);
    client.close(&again.connection).await.expect("closed");
    eventually(0, || {
        a.plane.holdings().connections + b.plane.holdings().connections
    })
    .await;
}

/// The client's link is the same to the dataplane: nothing is taken down before, and it has the alias, namespace and name of before.
#[tokio::test]
async fn a_change_between_this_node_and_another_takes_nothing_down() {
    let other = Setup::new("agent-3", "cluster-1.example", "192.0.2.3");
    let world = World::of([client_side(), other.sharing_the_registry()]).await;
    let [node, second] = world.agents();
    world.endpoint(node, "near", "svc").await;
    world.endpoint(second, "far", "svc").await;
    let before = world.held();
    let client = Client::on_node(node).await;
    let mut request = client.request_for("svc");
    let mut standing = None;
    for (round, is_pair) in [false, true, false, true].into_iter().enumerate() {
        let connection = request.connection.as_mut().expect("a connection");
        let endpoint = if is_pair { "near" } else { "far" };
        endpoint.clone_into(&mut connection.network_service_endpoint_name);
        let granted = client.send(request.clone()).await.expect("granted");
        assert_eq!(granted.connection.network_service_endpoint_name, endpoint);
        let plan = node.kernel().only().plan;
        assert_eq!(matches!(plan, Plan::Pair { .. }), is_pair, "{plan:?}");
        let (netns, link) = plan.links().next().expect("a link");
        let place = (netns.clone(), link.alias.clone(), link.name.clone());
        assert_eq!(standing.get_or_insert_with(|| place.clone()), &place);
        assert_eq!(node.kernel().changes(), (round + 1, 0));
        request.connection = Some(granted.connection);
    }
    let connection = request.connection.expect("a connection");
    client.close(&connection).await.expect("closed");
    world.settles(&before).await;
}
