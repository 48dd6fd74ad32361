//! Callers that have shown certificates: what another made stays out of reach, also after a restart, and a domain gets what it was given.

use nsm_core::identity::access::Rules;
use nsm_proto::{connection::Connection, registry::NetworkServiceEndpoint};
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};

use crate::support::{
    AGENT, Agent, Chain, Client, Pod, World, assert_refusal, client_side, endpoint_side,
    eventually, id, registration, within,
};

/// The endpoint's domain: the client's sees one service of it.
fn rules(services: &[&str]) -> Rules {
    let rules = serde_json::json!({"domains": [
        {"domain": "cluster-1.example", "trust_domain": "td-1", "services": services},
        {"domain": "cluster-3.example", "trust_domain": "td-3", "services": ["*"], "registers": ["nse-*", "svc"]},
    ]});
    serde_json::from_value(rules).expect("rules")
}

async fn world() -> World {
    let endpoints = endpoint_side().policy(rules(&["icmp-responder"]));
    World::of([client_side(), endpoints]).await
}

/// A pod of nsm-system.
fn pod(trust_domain: &str, name: &str) -> Pod {
    Pod::new(&format!("{trust_domain}/ns/nsm-system/pod/{name}"))
}

/// A client, and the proxy of its domain.
fn chain(trust_domain: &str, client: &str, proxy: &str) -> Chain {
    let client = Pod::new(&format!("{trust_domain}/ns/default/pod/{client}"));
    Chain::of(&[&client, &pod(trust_domain, proxy)])
}

/// The same client by another proxy.
fn by_another_proxy(chain: &Chain, name: &str) -> Chain {
    let client = &chain.pods[0];
    let trust_domain = client.id.trust_domain().as_str();
    Chain::of(&[client, &pod(trust_domain, name)])
}

fn refused(outcome: Result<impl std::fmt::Debug, Status>, words: &[&str]) {
    let status = outcome.expect_err("it is refused");
    assert_refusal(&status, Code::PermissionDenied, words);
}

/// What `thief` gets of a connection of another.
async fn reaches_nothing(thief: &Chain, agent: &Agent, connection: &Connection) {
    refused(thief.refresh(agent, connection).await, &["made by another"]);
    refused(thief.close(agent, connection).await, &["made by another"]);
}

#[tokio::test]
async fn what_a_proven_caller_made_no_other_reaches_also_after_a_restart() {
    let world = world().await;
    let [_, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let owner = chain("td-1", "nsc", "nsmgr-proxy-a");
    let connection = owner.ask(b, "icmp-responder").await.expect("granted");
    let ours = connection.path.as_ref().expect("a path").path_segments[2]
        .id
        .clone();
    // The same proxy for another client, clients of other domains, and the client itself without its proxy.
    let client = owner.pods[0].clone();
    let thieves = [
        Chain::of(&[&Pod::new("td-1/ns/default/pod/other"), &owner.pods[1]]),
        chain("td-3", "nsc", "nsmgr-proxy-a"),
        chain("td-2", "nsc", "nsmgr-a"),
        Chain::of(&[&client, &client]),
    ];
    for thief in &thieves {
        reaches_nothing(thief, b, &connection).await;
    }
    // Its monitor has it, those of other domains do not.
    assert_eq!(owner.follows(b).await.expect("followed"), [ours.as_str()]);
    for thief in &thieves[1..3] {
        assert_eq!(
            thief.follows(b).await.expect("followed"),
            Vec::<String>::new()
        );
    }

    b.kill();
    let c = b.start_again().await;
    world.tell_hosts_to(&c);
    for thief in &thieves {
        reaches_nothing(thief, &c, &connection).await;
    }
    let entry = registration(&endpoint, "icmp-responder", &[]);
    let node = Client::on_node(&c).await;
    node.offer(entry).await.expect("registered");
    for thief in &thieves {
        reaches_nothing(thief, &c, &connection).await;
    }
    // The proxy, too, was replaced by one of another name.
    let owner = by_another_proxy(&owner, "nsmgr-proxy-b");
    let again = owner.refresh(&c, &connection).await.expect("its own");
    assert_eq!(
        again.path.as_ref().expect("a path").path_segments[2].id,
        ours
    );
    for thief in &thieves {
        reaches_nothing(thief, &c, &again).await;
    }
    owner.close(&c, &again).await.expect("its own");
    eventually(0, || c.plane.holdings().connections).await;
}

#[tokio::test]
async fn an_nsmgr_that_is_replaced_keeps_what_it_made() {
    let world = world().await;
    let [_, b] = world.agents();
    world.endpoint(b, "nse-1", "svc").await;
    let client = Pod::new("td-2/ns/default/pod/nsc");
    let by = |nsmgr: &str| Chain::of(&[&client, &pod("td-2", nsmgr)]);
    let connection = by("nsmgr-old").ask(b, "svc").await.expect("granted");
    let again = by("nsmgr-new")
        .refresh(b, &connection)
        .await
        .expect("its own");
    assert_eq!(again.id, connection.id);
    // A forwarder is no NSMgr, and a pod that calls itself one elsewhere is none either.
    for other in [
        by("forwarder-vpp-x"),
        Chain::of(&[&client, &Pod::new("td-2/ns/default/pod/nsmgr-new")]),
    ] {
        reaches_nothing(&other, b, &again).await;
    }
    by("nsmgr-third").close(b, &again).await.expect("its own");
    eventually(0, || b.plane.holdings().connections).await;
}

#[tokio::test]
async fn what_a_domain_does_not_see_is_as_if_it_did_not_exist() {
    let world = world().await;
    let [_, b] = world.agents();
    for (name, service) in [("nse-1", "icmp-responder"), ("nse-2", "secret")] {
        world.endpoint(b, name, service).await;
    }
    let both = Client::on_node(b).await;
    let endpoint = world.endpoint(b, "nse-3", "icmp-responder").await;
    let mut of_both = registration(&endpoint, "icmp-responder", &[]);
    of_both.network_service_names.push("secret".to_owned());
    both.register(of_both).await.expect("registered");

    let stranger = chain("td-1", "nsc", "proxy-nsmgr-a");
    let status = |outcome: Result<Connection, Status>| {
        let status = outcome.expect_err("refused");
        (status.code(), status.message().replace("secret", "nothing"))
    };
    let hidden = status(stranger.ask(b, "secret@cluster-2.example").await);
    let missing = status(stranger.ask(b, "nothing@cluster-2.example").await);
    assert_eq!(hidden, missing);
    let query = |service: &str| NetworkServiceEndpoint {
        network_service_names: vec![service.to_owned()],
        ..NetworkServiceEndpoint::default()
    };
    let of = async |chain: &Chain, query: NetworkServiceEndpoint| {
        let mut found = chain.find(b, query).await.expect("found");
        found.sort_by(|one, other| one.name.cmp(&other.name));
        let names = found
            .into_iter()
            .map(|it| (it.name, it.network_service_names));
        names.collect::<Vec<_>>()
    };
    assert_eq!(of(&stranger, query("nothing")).await, []);
    let seen = vec!["icmp-responder".to_owned()];
    let all = [
        ("nse-1".to_owned(), seen.clone()),
        ("nse-3".to_owned(), seen),
    ];
    assert_eq!(of(&stranger, query("icmp-responder")).await, all);
    assert_eq!(of(&stranger, NetworkServiceEndpoint::default()).await, all);
    // That an endpoint is asked for by a service that is hidden makes no difference to asking for one that nobody has.
    assert_eq!(of(&stranger, query("secret")).await, []);
    // Our own systems see it.
    let own = Chain::of(&[&pod("td-2", "nsmgr-a")]);
    assert_eq!(of(&own, query("secret")).await.len(), 2);
}

#[tokio::test]
async fn a_domain_registers_relays_and_asks_for_what_it_was_given_alone() {
    let world = world().await;
    let [_, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let entry = |name: &str| NetworkServiceEndpoint {
        name: name.to_owned(),
        url: "tcp://192.0.2.66:5006".to_owned(),
        ..registration(&endpoint, "svc", &[])
    };
    let first = chain("td-1", "nse", "registry-a");
    refused(
        first.register(b, entry("nse-9")).await,
        &["registers", "nse-9"],
    );
    refused(
        first.register(b, entry("nse-9@cluster-3.example")).await,
        &["register there itself"],
    );
    refused(first.ask(b, "icmp-responder").await, &["role proxy"]);
    let unknown = chain("td-9", "nsc", "nsmgr-proxy-a");
    refused(unknown.ask(b, "icmp-responder").await, &["td-9", "domains"]);
    refused(unknown.follows(b).await, &["td-9"]);
    refused(unknown.find(b, entry("")).await, &["td-9"]);
    // A client of another domain is none of the caller's.
    let carried = Chain::of(&[
        &Pod::new("td-2/ns/default/pod/nsc"),
        &pod("td-1", "nsmgr-proxy-a"),
    ]);
    refused(
        carried.ask(b, "icmp-responder").await,
        &["of another trust domain"],
    );

    // One that may register has its names to itself, by the trust domain of who registered them.
    let third = chain("td-3", "nse", "registry-a");
    let registered = third.register(b, entry("nse-9")).await.expect("given");
    let ids = [
        third.pods[0].id.to_string(),
        third.pods[1].id.to_string(),
        id(AGENT).to_string(),
    ];
    assert_eq!(registered.path_ids, ids);
    // What would get the traffic of a service's clients is registered by who may have that name, too.
    let mut planted = entry("nse-8");
    planted
        .network_service_names
        .push("icmp-responder".to_owned());
    refused(
        third.register(b, planted).await,
        &["registers", "icmp-responder"],
    );
    let other = chain("td-3", "other", "registry-a");
    let own = Chain::of(&[&pod("td-2", "nsmgr-a")]);
    for thief in [&other, &own] {
        refused(thief.register(b, entry("nse-9")).await, &["another name"]);
        refused(thief.unregister(b, entry("nse-9")).await, &["another name"]);
    }
    refused(third.register(b, entry("nse-1")).await, &["another name"]);
    let replaced = by_another_proxy(&third, "registry-b");
    replaced.register(b, entry("nse-9")).await.expect("its own");
    replaced
        .unregister(b, entry("nse-9"))
        .await
        .expect("its own");
}

#[tokio::test]
async fn tokens_are_the_callers_own_and_for_this_agent() {
    let world = world().await;
    let [_, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let good = chain("td-1", "nsc", "nsmgr-proxy-a");
    // Another key under the same id, as after a rotation that the connection has not seen.
    let mut forged = good.clone();
    let request = good.request_for("icmp-responder");
    forged.pods[1] = Pod::new(forged.pods[1].id.as_str().trim_start_matches("spiffe://"));
    let mut call = forged.call(request.clone());
    let shown = good
        .call(())
        .extensions()
        .get::<std::sync::Arc<nsm_controlplane::identity::gate::Shown>>()
        .cloned();
    call.extensions_mut().insert(shown.expect("shown"));
    refused(
        send(b, call).await,
        &["prev_token_signed", "not signed with the key"],
    );
    // A token of the time before.
    let mut broken = request.clone();
    let path = broken
        .connection
        .as_mut()
        .expect("one")
        .path
        .as_mut()
        .expect("a path");
    path.path_segments[0].token.truncate(20);
    refused(
        good.send(b, broken).await,
        &["tokens_valid", "path segment 0"],
    );
    let mut other = request;
    let path = other
        .connection
        .as_mut()
        .expect("one")
        .path
        .as_mut()
        .expect("a path");
    let next = Chain::of(&[&good.pods[0], &pod("td-1", "spy")]);
    let mut stolen = next.request_for("icmp-responder");
    let stolen = stolen
        .connection
        .as_mut()
        .expect("one")
        .path
        .as_mut()
        .expect("a path");
    path.path_segments[0]
        .token
        .clone_from(&stolen.path_segments[0].token);
    refused(good.send(b, other).await, &["tokens_chained", "/spy"]);
    assert_eq!(b.plane.holdings().connections, 0);
}

async fn send(
    agent: &Agent,
    call: tonic::Request<nsm_proto::networkservice::NetworkServiceRequest>,
) -> Result<Connection, Status> {
    use nsm_proto::networkservice::network_service_server::NetworkService as _;
    let front = agent.plane.network_front();
    Ok(within(front.request(call)).await?.into_inner())
}

#[tokio::test]
async fn a_policy_that_is_replaced_closes_what_it_does_not_allow() {
    let world = world().await;
    let [_, b] = world.agents();
    world.endpoint(b, "nse-1", "icmp-responder").await;
    let chains = [
        chain("td-1", "nsc", "nsmgr-proxy-a"),
        chain("td-3", "nsc", "nsmgr-proxy-a"),
        Chain::of(&[&pod("td-2", "nsmgr-a")]),
    ];
    for chain in &chains {
        chain.ask(b, "icmp-responder").await.expect("granted");
    }
    assert_eq!(b.plane.holdings().connections, 3);
    b.plane
        .set_rules(rules(&["icmp-responder"]))
        .expect("rules");
    for chain in &chains {
        chain.ask(b, "icmp-responder").await.expect("granted");
    }
    // The first domain does not see the service any more.
    b.plane.set_rules(rules(&[])).expect("rules");
    eventually(4, || b.plane.holdings().connections).await;
    let status = chains[0]
        .ask(b, "icmp-responder")
        .await
        .expect_err("hidden");
    assert_eq!(status.code(), Code::NotFound, "{status:?}");
    // No other domain is left.
    b.plane.set_rules(Rules::default()).expect("rules");
    eventually(2, || b.plane.holdings().connections).await;
    refused(chains[1].ask(b, "icmp-responder").await, &["trust_domain"]);
    chains[2].ask(b, "icmp-responder").await.expect("granted");
}

#[tokio::test]
async fn a_role_that_is_given_takes_nothing_from_who_has_it_now() {
    let world = world().await;
    let [_, b] = world.agents();
    world.endpoint(b, "nse-1", "svc").await;
    let client = Pod::new("td-2/ns/default/pod/nsc");
    let chain = Chain::of(&[&client, &Pod::new("td-2/ns/x/pod/y")]);
    let connection = chain.ask(b, "svc").await.expect("granted");
    let mut with_role = rules(&[]);
    let pattern = "/ns/x/pod/*".parse().expect("a pattern");
    with_role.roles.forwarder.push(pattern);
    b.plane.set_rules(with_role).expect("rules");
    let again = chain.refresh(b, &connection).await.expect("its own");
    assert_eq!(again.id, connection.id);
    // What it makes now is its role's.
    let of_role = chain.ask(b, "svc").await.expect("granted");
    let other = Chain::of(&[&client, &Pod::new("td-2/ns/x/pod/z")]);
    refused(other.close(b, &again).await, &["made by another"]);
    other.close(b, &of_role).await.expect("its role's");
    chain.close(b, &again).await.expect("its own");
    eventually(0, || b.plane.holdings().connections).await;
}

#[tokio::test]
async fn streams_end_when_the_policy_does_not_allow_them() {
    let world = world().await;
    let [_, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let proxies = ["td-1", "td-3"].map(|domain| chain(domain, "nsc", "nsmgr-proxy-a"));
    let mut monitors = Vec::new();
    for proxy in &proxies {
        proxy.ask(b, "icmp-responder").await.expect("granted");
        let mut events = proxy.monitor(b).await.expect("followed");
        let first = within(events.next()).await.expect("an event");
        assert_eq!(first.expect("no error").connections.len(), 1);
        monitors.push(events);
    }
    let mut watch = proxies[0]
        .watch(b, "icmp-responder")
        .await
        .expect("watched");
    let first = within(watch.next())
        .await
        .expect("an entry")
        .expect("no error");
    let first = first.network_service_endpoint.expect("an endpoint");
    assert_eq!(
        (first.name, first.path_ids),
        (endpoint.name.clone(), Vec::new())
    );
    // The second domain goes; the first one stays, and watches anew.
    let mut without = rules(&["icmp-responder"]);
    without.domains.pop();
    b.plane.set_rules(without).expect("rules");
    let [first, second] = monitors.try_into().ok().expect("two");
    while within(watch.next()).await.is_some() {}
    let last = within(second.collect::<Vec<_>>()).await;
    assert!(last.iter().all(Result::is_ok), "{last:?}");
    let mut first = first;
    proxies[0].ask(b, "icmp-responder").await.expect("granted");
    within(first.next())
        .await
        .expect("it goes on")
        .expect("an event");
}

#[tokio::test]
async fn an_endpoint_that_is_hidden_later_is_gone_for_who_watches() {
    let world = world().await;
    let [_, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let stranger = chain("td-1", "nsc", "proxy-nsmgr-a");
    let query = NetworkServiceEndpoint::default();
    let mut watch = stranger.watch_by(b, query).await.expect("watched");
    let mut next = async || {
        let answer = within(watch.next()).await.expect("an entry");
        let answer = answer.expect("no error");
        let found = answer.network_service_endpoint.expect("an endpoint");
        (found.name, found.network_service_names, answer.deleted)
    };
    let seen = vec!["icmp-responder".to_owned()];
    assert_eq!(next().await, ("nse-1".to_owned(), seen.clone(), false));
    let local = Client::on_node(b).await;
    let entry = registration(&endpoint, "secret", &[]);
    local.offer(entry).await.expect("registered");
    assert_eq!(next().await, ("nse-1".to_owned(), Vec::new(), true));
    let entry = registration(&endpoint, "icmp-responder", &[]);
    local.offer(entry).await.expect("registered");
    assert_eq!(next().await, ("nse-1".to_owned(), seen, false));
    // A URL is not found out by its parts.
    let query = NetworkServiceEndpoint {
        url: "unix".to_owned(),
        ..NetworkServiceEndpoint::default()
    };
    assert_eq!(stranger.find(b, query).await.expect("found"), []);
}
