//! The registry called in-process, with tokio's clock stopped where time matters.

use std::{collections::BTreeMap, time::Duration};

use nsm_proto::registry::{Destination, Match, NetworkServiceLabels};
use tokio_stream::StreamExt as _;

use super::*;

mod ownership;

/// Some time in the middle of an epoch.
fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

fn after(seconds: u64) -> SystemTime {
    now() + Duration::from_secs(seconds)
}

fn service(name: &str) -> NetworkService {
    NetworkService {
        name: name.to_owned(),
        ..NetworkService::default()
    }
}

/// An endpoint or, without a name, a query.
fn endpoint(name: &str, services: &[&str]) -> NetworkServiceEndpoint {
    let url = match name {
        "" => String::new(),
        name => format!("tcp://{name}.example:5001"),
    };
    NetworkServiceEndpoint {
        name: name.to_owned(),
        network_service_names: services.iter().map(ToString::to_string).collect(),
        url,
        ..NetworkServiceEndpoint::default()
    }
}

fn labelled(name: &str, service: &str, labels: &[(&str, &str)]) -> NetworkServiceEndpoint {
    let labels = labels
        .iter()
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect();
    let mut endpoint = endpoint(name, &[service]);
    endpoint.network_service_labels =
        BTreeMap::from([(service.to_owned(), NetworkServiceLabels { labels })]);
    endpoint
}

fn registry() -> Memory {
    Memory::new(Limits::default())
}

impl Memory {
    fn add(&self, endpoint: NetworkServiceEndpoint) -> NetworkServiceEndpoint {
        self.endpoints.register(endpoint, now(), &[]).unwrap()
    }

    /// Drops the endpoints that expire until `now`.
    fn pass(&self, now: Instant) {
        let inner = &self.endpoints.inner;
        inner.drop_expired(&mut inner.state.lock().unwrap(), now);
    }

    fn names(&self, query: &NetworkServiceEndpoint) -> Vec<String> {
        let found = self.endpoints.find(query);
        found.iter().map(|entry| entry.name.clone()).collect()
    }
}

/// Fails a test that would wait for ever; longer than the expiries, which pass on a stopped clock.
const PATIENCE: Duration = Duration::from_secs(90);

/// The next event as `+name` or `-name`.
async fn next(watch: &mut Watch<NetworkServiceEndpoint>) -> String {
    let event = tokio::time::timeout(PATIENCE, watch.next()).await;
    let event = event.expect("an event in time").unwrap().unwrap();
    let sign = if event.deleted { '-' } else { '+' };
    format!("{sign}{}", event.entry.name)
}

/// Waits for a condition that has no event.
async fn eventually(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    waited.expect("the condition in time");
}

/// The events that wait.
fn waiting(watch: &mut Watch<NetworkServiceEndpoint>) -> Vec<String> {
    let mut events = Vec::new();
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    while let std::task::Poll::Ready(Some(event)) =
        tokio_stream::Stream::poll_next(std::pin::Pin::new(&mut *watch), &mut cx)
    {
        let event = event.unwrap();
        let sign = if event.deleted { '-' } else { '+' };
        events.push(format!("{sign}{}", event.entry.name));
    }
    events
}

#[tokio::test]
async fn a_service_without_payload_carries_ip() {
    let registry = registry();
    let registered = registry
        .services
        .register(service("a"), now(), &[])
        .unwrap();
    assert_eq!(registered.payload, "IP");
    let mut ethernet = service("b");
    ethernet.payload = "ETHERNET".to_owned();
    registry
        .services
        .register(ethernet.clone(), now(), &[])
        .unwrap();

    let found = registry.services.find(&ethernet);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, "b");
    assert_eq!(registry.services.find(&service("")).len(), 2);
    assert!(registry.services.find(&service("c")).is_empty());
}

#[tokio::test]
async fn services_are_found_by_their_rules_as_a_whole() {
    let registry = registry();
    let mut with_rules = service("a");
    with_rules.matches = vec![Match {
        routes: vec![Destination {
            weight: 3,
            ..Destination::default()
        }],
        fallthrough: true,
        ..Match::default()
    }];
    registry
        .services
        .register(with_rules.clone(), now(), &[])
        .unwrap();
    registry
        .services
        .register(service("b"), now(), &[])
        .unwrap();
    with_rules.name.clear();
    let found = registry.services.find(&with_rules);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].matches, with_rules.matches);
    with_rules.matches[0].fallthrough = false;
    assert!(registry.services.find(&with_rules).is_empty());
}

/// Who offers a service registers it by its name alone; its rules are its operator's, who may be the same user.
#[tokio::test]
async fn a_registration_by_the_name_alone_leaves_payload_and_matches() {
    let registry = registry();
    let mut with_rules = service("a");
    with_rules.payload = "ETHERNET".to_owned();
    with_rules.matches = vec![Match {
        source_selector: [("app".to_owned(), "friend".to_owned())].into(),
        ..Match::default()
    }];
    let services = &registry.services;
    services.register(with_rules.clone(), now(), &[]).unwrap();
    let bare = service("a");
    let registered = services.register(bare.clone(), now(), &[]).unwrap();
    assert_eq!(registered, with_rules);
    assert_eq!(*services.find(&bare)[0], with_rules);
    // What a registration has replaces what was.
    with_rules.matches[0].source_selector.clear();
    services.register(with_rules.clone(), now(), &[]).unwrap();
    assert_eq!(*services.find(&bare)[0], with_rules);
    // Without rules again, when it is a new one.
    assert!(services.unregister("a"));
    let registered = services.register(bare, now(), &[]).unwrap();
    assert_eq!((registered.matches, &*registered.payload), (vec![], "IP"));
}

#[tokio::test]
async fn endpoints_are_found_by_name_url_service_and_labels() {
    let registry = registry();
    let firewall = [("app", "firewall"), ("zone", "a")];
    registry.add(labelled("one", "chain", &firewall));
    registry.add(labelled("two", "chain", &[("app", "gateway")]));
    registry.add(endpoint("three", &["other", "chain"]));
    let all = NetworkServiceEndpoint::default();

    let by = |change: fn(&mut NetworkServiceEndpoint)| {
        let mut query = all.clone();
        change(&mut query);
        registry.names(&query)
    };
    assert_eq!(by(|_| ()), ["one", "three", "two"]);
    assert_eq!(by(|query| query.name = "two".into()), ["two"]);
    assert!(by(|query| query.name = "tw".into()).is_empty());
    assert_eq!(by(|query| query.url = "://one".into()), ["one"]);
    assert_eq!(
        by(|query| query.network_service_names = vec!["chain".into()]),
        ["one", "three", "two"]
    );
    assert_eq!(
        by(|query| query.network_service_names = vec!["chain".into(), "other".into()]),
        ["three"]
    );
    let wanted = labelled("", "chain", &[("app", "firewall")]).network_service_labels;
    let query = NetworkServiceEndpoint {
        network_service_labels: wanted,
        ..all.clone()
    };
    assert_eq!(registry.names(&query), ["one"]);
    // Asked by one service and labelled for another: not a subset.
    let foreign = labelled("", "other", &[("app", "firewall")]).network_service_labels;
    let query = NetworkServiceEndpoint {
        network_service_labels: foreign,
        ..all
    };
    assert!(registry.names(&query).is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_earliest_bound_is_the_expiry() {
    let registry = registry();
    let mut asked = endpoint("a", &["s"]);
    let expiry = |asked: &NetworkServiceEndpoint, bounds: &[SystemTime]| {
        let registered = registry.endpoints.register(asked.clone(), now(), bounds);
        SystemTime::try_from(registered.unwrap().expiration_time.unwrap()).unwrap()
    };
    assert_eq!(expiry(&asked, &[]), after(60));
    assert_eq!(expiry(&asked, &[after(600), after(40)]), after(40));
    asked.expiration_time = Some(after(20).into());
    assert_eq!(expiry(&asked, &[after(40)]), after(20));
    asked.expiration_time = Some(after(7200).into());
    assert_eq!(expiry(&asked, &[]), after(60));
    asked.expiration_time = Some(prost_types::Timestamp {
        seconds: i64::MAX,
        nanos: i32::MAX,
    });
    assert_eq!(expiry(&asked, &[]), after(60));
}

#[tokio::test]
async fn what_has_expired_is_refused() {
    let registry = registry();
    let mut late = endpoint("a", &["s"]);
    for bounds in [vec![now()], vec![now() - Duration::from_millis(5)]] {
        let error = registry.endpoints.register(late.clone(), now(), &bounds);
        assert!(matches!(error, Err(RegistryError::Expired { .. })));
    }
    for seconds in [i64::MIN, -1, 0] {
        late.expiration_time = Some(prost_types::Timestamp { seconds, nanos: 0 });
        let error = registry.endpoints.register(late.clone(), now(), &[]);
        assert!(matches!(error, Err(RegistryError::Expired { .. })));
    }
    assert_eq!(registry.counts().endpoints, 0);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_is_gone_at_its_expiry_and_watchers_are_told() {
    let registry = registry();
    let mut watch = registry.endpoints.watch(endpoint("", &["s"])).unwrap();
    // The second expires first: the timer is moved forward.
    registry.add(endpoint("late", &["s"]));
    let bound = [after(10)];
    registry
        .endpoints
        .register(endpoint("soon", &["s"]), now(), &bound)
        .unwrap();
    let start = Instant::now();
    assert_eq!(waiting(&mut watch), ["+late", "+soon"]);

    assert_eq!(next(&mut watch).await, "-soon");
    assert!(start.elapsed() >= Duration::from_secs(10));
    assert!(start.elapsed() < Duration::from_secs(11));
    assert_eq!(registry.counts().endpoints, 1);
    assert_eq!(next(&mut watch).await, "-late");
    assert!(start.elapsed() >= Duration::from_secs(60));
    assert_eq!(registry.counts().endpoints, 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_due_is_not_found_even_before_the_timer_ran() {
    let registry = registry();
    registry.add(endpoint("a", &["s"]));
    // No await between the step of the clock and the question: the task had no turn.
    let due = Instant::now() + Duration::from_secs(60);
    assert_eq!(registry.counts().endpoints, 1);
    registry.pass(due - Duration::from_nanos(1));
    assert_eq!(registry.counts().endpoints, 1);
    registry.pass(due);
    assert!(registry.names(&endpoint("a", &[])).is_empty());
    assert!(!registry.endpoints.unregister("a"));
}

#[tokio::test(start_paused = true)]
async fn a_refresh_moves_the_expiry_and_keeps_the_first_registration_time() {
    let registry = registry();
    let first = registry.add(endpoint("a", &["s"]));
    assert_eq!(first.initial_registration_time, Some(now().into()));
    tokio::time::advance(Duration::from_secs(40)).await;
    let refreshed = registry
        .endpoints
        .register(endpoint("a", &["s"]), after(40), &[])
        .unwrap();
    assert_eq!(refreshed.initial_registration_time, Some(now().into()));
    tokio::time::advance(Duration::from_secs(59)).await;
    assert_eq!(registry.counts().endpoints, 1);
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(registry.counts().endpoints, 0);

    // One that comes back after its expiry brings the time along, as NSM's clients do.
    let back = registry
        .endpoints
        .register(refreshed.clone(), after(90), &[]);
    assert_eq!(back.unwrap().initial_registration_time, Some(now().into()));
}

#[tokio::test]
async fn unregister_of_what_is_unknown_succeeds() {
    let registry = registry();
    registry.add(endpoint("a", &["s"]));
    registry
        .services
        .register(service("s"), now(), &[])
        .unwrap();
    assert!(registry.endpoints.unregister("a"));
    assert!(!registry.endpoints.unregister("a"));
    assert!(registry.services.unregister("s"));
    assert!(!registry.services.unregister("s"));
    let counts = registry.counts();
    assert_eq!((counts.services, counts.endpoints), (0, 0));
    assert!(registry.names(&endpoint("", &["s"])).is_empty());
}

#[tokio::test]
async fn a_watch_tells_matches_then_changes() {
    let registry = registry();
    registry.add(endpoint("a", &["s"]));
    registry.add(endpoint("z", &["other"]));
    let mut watch = registry.endpoints.watch(endpoint("", &["s"])).unwrap();
    let mut by_name = registry.endpoints.watch(endpoint("a", &[])).unwrap();
    let mut all = registry.endpoints.watch(endpoint("", &[])).unwrap();
    assert_eq!(waiting(&mut all), ["+a", "+z"]);
    // A query with an URL: no index, all changes are compared.
    let mut odd = NetworkServiceEndpoint {
        url: "tcp://b".to_owned(),
        ..NetworkServiceEndpoint::default()
    };
    let mut by_url = registry.endpoints.watch(odd.clone()).unwrap();
    odd.network_service_names = vec!["s".to_owned()];

    registry.add(endpoint("b", &["s", "s"]));
    registry.add(endpoint("a", &["s", "t"]));
    // Stops matching, then matches again, then goes.
    registry.add(endpoint("a", &["t"]));
    registry.add(endpoint("a", &["s"]));
    registry.endpoints.unregister("a");
    registry.endpoints.unregister("z");

    let wanted = ["+a", "+b", "+a", "-a", "+a", "-a"];
    assert_eq!(waiting(&mut watch), wanted);
    assert_eq!(waiting(&mut by_name), ["+a", "+a", "+a", "+a", "-a"]);
    let wanted = ["+b", "+a", "+a", "+a", "-a", "-z"];
    assert_eq!(waiting(&mut all), wanted);
    assert_eq!(waiting(&mut by_url), ["+b"]);
}

#[tokio::test]
async fn services_are_watched_too() {
    let registry = registry();
    registry
        .services
        .register(service("a"), now(), &[])
        .unwrap();
    let mut watch = registry.services.watch(service("a")).unwrap();
    let mut next = async || {
        let event = tokio::time::timeout(PATIENCE, watch.next()).await;
        event.expect("an event in time").unwrap().unwrap()
    };
    assert!(!next().await.deleted);
    registry
        .services
        .register(service("b"), now(), &[])
        .unwrap();
    registry.services.unregister("a");
    let gone = next().await;
    assert!(gone.deleted);
    assert_eq!(gone.entry.name, "a");
    assert_eq!(gone.entry.payload, "IP");
}

#[tokio::test]
async fn a_dropped_watch_leaves_nothing() {
    let registry = registry();
    let watches: Vec<_> = (0..100)
        .map(|i| {
            registry
                .endpoints
                .watch(endpoint(&format!("{}", i % 7), &[]))
        })
        .collect();
    let services = registry.services.watch(service("a")).unwrap();
    assert_eq!(registry.counts().watchers, 101);
    drop(watches);
    assert_eq!(registry.counts().watchers, 1);
    drop(services);
    assert_eq!(registry.counts().watchers, 0);
    assert_eq!(registry.endpoints.inner.lock().table.scopes(), 0);
}

#[tokio::test]
async fn a_slow_watcher_is_dropped_and_told_so() {
    let registry = Memory::new(Limits {
        watch_depth: 4,
        ..Limits::default()
    });
    let mut slow = registry.endpoints.watch(endpoint("", &["s"])).unwrap();
    let mut quick = registry.endpoints.watch(endpoint("", &["s"])).unwrap();
    for i in 0..5 {
        registry.add(endpoint(&format!("e{i}"), &["s"]));
        assert_eq!(waiting(&mut quick).len(), 1);
    }
    assert_eq!(registry.counts().watchers, 1);
    for i in 0..4 {
        assert_eq!(next(&mut slow).await, format!("+e{i}"));
    }
    let last = slow.next().await.unwrap();
    assert_eq!(last, Err(RegistryError::Lagged { depth: 4 }));
    assert!(slow.next().await.is_none());
    drop(slow);
    assert_eq!(registry.counts().watchers, 1);
}

#[tokio::test]
async fn closing_ends_watches_and_refuses_news() {
    let registry = registry();
    registry.add(endpoint("a", &["s"]));
    let mut watch = registry.endpoints.watch(endpoint("", &["s"])).unwrap();
    registry.close();
    assert_eq!(next(&mut watch).await, "+a");
    assert!(watch.next().await.is_none());
    assert_eq!(registry.counts().watchers, 0);
    let refused = registry
        .endpoints
        .register(endpoint("b", &["s"]), now(), &[]);
    assert_eq!(refused, Err(RegistryError::Closed));
    assert!(registry.services.watch(service("")).is_err());
    assert_eq!(registry.names(&endpoint("a", &[])), ["a"]);
}

#[tokio::test]
async fn limits_are_told() {
    let registry = Memory::new(Limits {
        name_bytes: 40,
        services_per_endpoint: 2,
        entry_bytes: 200,
        ..Limits::default()
    });
    let refused = |endpoint| {
        registry
            .endpoints
            .register(endpoint, now(), &[])
            .unwrap_err()
    };

    assert!(matches!(
        refused(endpoint("", &["s"])),
        RegistryError::NoName { .. }
    ));
    let long = "é".repeat(21);
    let error = refused(endpoint(&long, &["s"]));
    assert!(matches!(
        error,
        RegistryError::NameTooLong { length: 42, .. }
    ));
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
    let error = refused(endpoint("a", &["s", "t", "u"]));
    assert!(matches!(error, RegistryError::TooManyServices { .. }));
    let large = "v".repeat(200);
    let error = refused(labelled("a", "s", &[("key", &large)]));
    assert!(matches!(error, RegistryError::TooLarge { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn thousands_of_endpoints_are_indexed_and_expire() {
    let registry = registry();
    for i in 0..10_000_u32 {
        let service = format!("s{}", i % 1000);
        registry.add(endpoint(&format!("e{i:05}"), &[&service]));
    }
    assert_eq!(registry.counts().endpoints, 10_000);
    let found = registry.names(&endpoint("", &["s7"]));
    let wanted: Vec<_> = (0..10).map(|i| format!("e{:05}", i * 1000 + 7)).collect();
    assert_eq!(found, wanted);
    assert_eq!(registry.names(&endpoint("e09999", &[])), ["e09999"]);

    let mut watch = registry.endpoints.watch(endpoint("", &["s7"])).unwrap();
    assert_eq!(waiting(&mut watch).len(), 10);
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(registry.counts().endpoints, 0);
    assert_eq!(waiting(&mut watch).len(), 10);
    assert!(registry.names(&endpoint("", &["s7"])).is_empty());
    assert_eq!(registry.endpoints.inner.lock().table.indexed_services(), 0);
}

#[tokio::test]
async fn the_expiry_task_ends_with_the_registry() {
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let before = tasks();
    let registry = registry();
    registry.add(endpoint("a", &["s"]));
    let mut watch = registry.endpoints.watch(endpoint("", &["s"])).unwrap();
    tokio::task::yield_now().await;
    assert_eq!(tasks(), before + 2);
    drop(registry);
    assert_eq!(next(&mut watch).await, "+a");
    assert!(watch.next().await.is_none());
    eventually(|| tasks() == before).await;
}

#[tokio::test]
async fn path_ids_are_kept_as_given() {
    let registry = registry();
    let mut with_path = endpoint("a", &["s"]);
    with_path.path_ids = vec!["spiffe://a".to_owned(), "spiffe://b".to_owned()];
    registry.add(with_path.clone());
    let found = registry.endpoints.find(&endpoint("a", &[]));
    assert_eq!(found[0].path_ids, with_path.path_ids);
}
