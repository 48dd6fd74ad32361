//! What each way of publishing a domain leads to.

use super::*;

#[tokio::test]
async fn service_records_are_honoured_with_target_and_port() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 7001, "gw.cluster-2.example")
        .srv(PROXY, 30, 0, 7002, "gw.cluster-2.example")
        .a("gw.cluster-2.example", 30, "192.0.2.2")
        .a(X, 30, "192.0.2.99")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:7001"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.2:7002"]));
    assert_eq!(found.question, format!("SRV {REGISTRY}"));
    assert_eq!(
        found.answer,
        "registry 192.0.2.2:7001, proxy 192.0.2.2:7002"
    );
    assert_eq!(found.server, server.address.to_string());
    assert!(!found.cached);
}

#[tokio::test]
async fn addresses_that_come_with_service_records_are_not_asked_for() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 5005, "gw.cluster-2.example")
        .srv(PROXY, 30, 0, 5006, "gw.cluster-2.example")
        .additional_a(REGISTRY, "gw.cluster-2.example", 30, "192.0.2.2")
        .additional_a(PROXY, "gw.cluster-2.example", 30, "192.0.2.2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.2:5006"]));
    assert_eq!(server.asked("gw.cluster-2.example", RecordType::A), 0);
}

#[tokio::test]
async fn service_records_are_ordered_by_priority() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 20, 1, "b.cluster-2.example")
        .srv(REGISTRY, 30, 10, 2, "a.cluster-2.example")
        .srv(REGISTRY, 30, 30, 3, "missing.cluster-2.example")
        .srv(PROXY, 30, 0, 5006, "a.cluster-2.example")
        .aaaa("a.cluster-2.example", 30, "2001:db8::1")
        .a("a.cluster-2.example", 30, "192.0.2.1")
        .a("b.cluster-2.example", 30, "192.0.2.2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    let wanted = addresses(&["192.0.2.1:2", "[2001:db8::1]:2", "192.0.2.2:1"]);
    assert_eq!(found.registry, wanted);
}

#[test]
fn weights_share_the_load() {
    use hickory_resolver::proto::rr::{Name, rdata::SRV};
    let record = |priority, weight, port| SRV::new(priority, weight, port, Name::root());
    let records = vec![record(1, 3, 10), record(0, 1, 11), record(0, 3, 12)];
    let mut first = BTreeMap::new();
    for draw in 0..=4 {
        let mut draws = [draw, 0, 0].into_iter();
        let ordered = srv::order(records.clone(), |_| draws.next().unwrap());
        assert_eq!(ordered[2].port, 10, "priority before weight");
        *first.entry(ordered[0].port).or_insert(0) += 1;
    }
    // The draws 0 and 1 take the weight of 1, the draws 2 to 4 that of 3.
    assert_eq!(first, BTreeMap::from([(11, 2), (12, 3)]));
    let many = vec![record(0, 0, 1); 1000];
    assert_eq!(srv::order(many, |_| 0).len(), 16);
}

#[tokio::test]
async fn a_service_without_record_is_at_the_address_of_the_domain() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 7001, "gw.cluster-2.example")
        .a("gw.cluster-2.example", 30, "192.0.2.2")
        .a(X, 30, "192.0.2.99")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:7001"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.99:5006"]));
}

#[tokio::test]
async fn a_domain_with_an_address_only_has_the_default_ports() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .aaaa(X, 30, "2001:db8::2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    let registry = addresses(&["192.0.2.2:5005", "[2001:db8::2]:5005"]);
    assert_eq!(found.registry, registry);
    let proxy = addresses(&["192.0.2.2:5006", "[2001:db8::2]:5006"]);
    assert_eq!(found.proxy, proxy);
    assert_eq!(found.question, format!("A {X}"));
}

#[tokio::test]
async fn an_address_does_not_wait_for_one_of_the_other_family() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .fault(X, RecordType::AAAA, Fault::Silent)
        .serve()
        .await;
    let start = Clock::now();
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
}

#[tokio::test]
async fn a_domain_may_have_a_registry_and_no_proxy() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 5005, "gw.cluster-2.example")
        .a("gw.cluster-2.example", 30, "192.0.2.2")
        .serve()
        .await;
    let found = resolver(&server).resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    assert_eq!(found.proxy, []);
    assert_eq!(found.answer, "registry 192.0.2.2:5005, no proxy");
}

#[tokio::test]
async fn a_service_that_is_not_offered_is_told_so() {
    let server = Zone::new()
        .srv(REGISTRY, 30, 0, 0, ".")
        .a(X, 30, "192.0.2.2")
        .serve()
        .await;
    let error = resolver(&server).resolve(&domain(X)).await.unwrap_err();
    assert!(matches!(error, ResolveError::NotOffered { .. }), "{error}");
}

#[tokio::test]
async fn a_domain_too_long_for_the_service_name_is_resolved_by_its_address() {
    let label = "a".repeat(60);
    let long = format!("{label}.{label}.{label}.{}", "b".repeat(60));
    let server = Zone::new().a(&long, 30, "192.0.2.2").serve().await;
    let found = resolver(&server).resolve(&domain(&long)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
}
