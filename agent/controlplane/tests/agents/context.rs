//! The context of a connection changes at its endpoint, and the agents on the path follow.

use nsm_core::link::LinkSpec;
use nsm_proto::{
    connection::{Connection, ConnectionEvent, ConnectionEventType::*, State},
    connectioncontext::Route,
};

use crate::support::{Agent, Client, Setup, World, client_side, endpoint_side, eventually};

const SERVICE: &str = "icmp-responder@cluster-2.example";

fn route(prefix: &str) -> Route {
    Route {
        prefix: prefix.to_owned(),
        next_hop: String::new(),
    }
}

/// What the endpoint publishes when it changes the context that it granted.
fn changed(connection: &Connection, change: impl FnOnce(&mut Connection)) -> ConnectionEvent {
    let mut reported = connection.clone();
    let path = reported.path.as_mut().expect("a path");
    path.index = u32::try_from(path.path_segments.len() - 1).expect("few");
    reported.set_state(State::Up);
    change(&mut reported);
    ConnectionEvent {
        r#type: Update.into(),
        connections: [(reported.id.clone(), reported)].into(),
    }
}

fn links(agent: &Agent) -> Vec<LinkSpec> {
    let plan = agent.kernel().only().plan;
    plan.links().map(|(_, link)| link.clone()).collect()
}

/// The routes of the link `at` of the agent.
fn routes(agent: &Agent, at: usize) -> Vec<String> {
    let link = &links(agent)[at];
    link.routes.iter().map(|it| it.prefix.to_string()).collect()
}

fn addresses(agent: &Agent, at: usize) -> Vec<String> {
    let link = &links(agent)[at];
    link.addresses.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn a_changed_context_is_published_and_its_links_follow_at_both_ends() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    let mut watch = client.monitor().await;
    watch.one(InitialStateTransfer).await;
    eventually((1, 1), || {
        (endpoint.monitors(), b.plane.holdings().monitors)
    })
    .await;
    let changes = (a.kernel().changes(), b.kernel().changes());
    let event = changed(&granted.connection, |it| {
        let ip = it.context.as_mut().expect("one").ip_context.as_mut();
        let ip = ip.expect("one");
        ip.src_routes.push(route("172.16.200.0/24"));
        ip.dst_ip_addrs.push("172.16.200.1/32".to_owned());
    });
    endpoint.tell(event).await;
    let told = watch.one(Update).await;
    let ip = told.context.expect("one").ip_context.expect("one");
    assert_eq!(ip.src_routes.len(), 2);
    assert_eq!(told.state, i32::from(State::Up));
    assert!(routes(a, 0).contains(&"172.16.200.0/24".to_owned()));
    assert!(addresses(b, 0).contains(&"172.16.200.1/32".to_owned()));
    // A refresh goes on with it, and no link was made anew.
    let again = client.refresh(&granted).await.expect("refreshed");
    drop(again);
    assert_eq!(
        (a.kernel().changes().1, b.kernel().changes().1),
        (changes.0.1, changes.1.1)
    );
    client.close(&granted.connection).await.expect("closed");
    drop(watch);
    world.settles(&before).await;
}

/// The rules of what others may put into a pod hold for a change as for a grant.
#[tokio::test]
async fn a_changed_context_that_is_not_admitted_changes_nothing() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    let mut watch = client.monitor().await;
    watch.one(InitialStateTransfer).await;
    eventually((1, 1), || {
        (endpoint.monitors(), b.plane.holdings().monitors)
    })
    .await;
    let link = links(a);
    for prefix in ["0.0.0.0/0", "169.254.169.254/32", "nonsense"] {
        let event = changed(&granted.connection, |it| {
            let ip = it.context.as_mut().expect("one").ip_context.as_mut();
            ip.expect("one").src_routes.push(route(prefix));
        });
        endpoint.tell(event).await;
    }
    let event = changed(&granted.connection, |it| {
        let ip = it.context.as_mut().expect("one").ip_context.as_mut();
        ip.expect("one").src_routes.push(route("172.16.201.0/24"));
    });
    endpoint.tell(event).await;
    let told = watch.one(Update).await;
    let ip = told.context.expect("one").ip_context.expect("one");
    let prefixes: Vec<_> = ip.src_routes.iter().map(|it| it.prefix.as_str()).collect();
    assert_eq!(prefixes[1..], ["172.16.201.0/24"]);
    assert_eq!(links(a)[0].addresses, link[0].addresses);
    assert_eq!(routes(a, 0).len(), 2);
    client.close(&granted.connection).await.expect("closed");
}

#[tokio::test]
async fn both_pods_of_one_node_follow() {
    let world = World::two().await;
    let [_, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(b).await;
    let granted = client.ask("icmp-responder").await;
    eventually(1, || endpoint.monitors()).await;
    let event = changed(&granted.connection, |it| {
        let ip = it.context.as_mut().expect("one").ip_context.as_mut();
        let ip = ip.expect("one");
        ip.src_routes.push(route("172.16.202.0/24"));
        ip.dst_routes.push(route("172.16.203.0/24"));
    });
    endpoint.tell(event).await;
    eventually((true, true), || {
        let has = |at, prefix: &str| routes(b, at).contains(&prefix.to_owned());
        (has(0, "172.16.202.0/24"), has(1, "172.16.203.0/24"))
    })
    .await;
    client.close(&granted.connection).await.expect("closed");
}

/// A hop without links of its own passes the change on, in one event with the rest.
#[tokio::test]
async fn a_hop_between_passes_a_changed_context_on() {
    let sides = [client_side(), endpoint_side()].map(Setup::without_forwarder);
    let world = World::of(sides).await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let client = Client::on_node(a).await;
    let granted = client.ask(SERVICE).await;
    let mut watch = client.monitor().await;
    watch.one(InitialStateTransfer).await;
    eventually((1, 1), || {
        (endpoint.monitors(), b.plane.holdings().monitors)
    })
    .await;
    let event = changed(&granted.connection, |it| {
        it.set_state(State::Down);
        let context = it.context.as_mut().expect("one");
        context
            .extra_context
            .insert("news".to_owned(), "1".to_owned());
    });
    endpoint.tell(event).await;
    let told = watch.one(Update).await;
    assert_eq!(told.state(), State::Down);
    assert_eq!(told.context.expect("one").extra_context["news"], "1");
    client.close(&granted.connection).await.expect("closed");
}
