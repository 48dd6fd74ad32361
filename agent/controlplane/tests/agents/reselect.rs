//! RESELECT_REQUESTED where the agent does not have the connection any more.

use nsm_proto::{connection::State, networkservice::NetworkServiceRequest};

use crate::support::{Client, World, eventually};

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
