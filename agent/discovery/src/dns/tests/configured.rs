//! Domains that need no question, or another one.

use super::*;

#[tokio::test]
async fn addresses_need_no_question() {
    // Nothing listens there: a question would fail.
    let resolver = Resolver::new(config(&addresses(&["127.0.0.1:1"])));
    let found = resolver.resolve(&domain("192.0.2.1:6000")).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.1:6000"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.1:6000"]));
    let found = resolver.resolve(&domain("192.0.2.1")).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.1:5005"]));
    assert_eq!(found.proxy, addresses(&["192.0.2.1:5006"]));
    let found = resolver.resolve(&domain("[2001:db8::1]:6000")).await;
    assert_eq!(found.unwrap().registry, addresses(&["[2001:db8::1]:6000"]));
}

#[tokio::test]
async fn configured_hosts_come_first_and_are_replaced_by_a_reload() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .a("gw.example", 30, "192.0.2.7")
        .serve()
        .await;
    let mut config = config(&[server.address]);
    let entry = |registry: &str, proxy: &str| HostEntry {
        registry: registry.parse().unwrap(),
        proxy: proxy.parse().unwrap(),
    };
    config
        .hosts
        .insert(domain(X), entry("198.51.100.1", "198.51.100.2:7002"));
    config.hosts.insert(
        domain("cluster-3.example"),
        entry("gw.example", "gw.example:7002"),
    );
    let resolver = Resolver::new(config.clone());

    let found = resolver.resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["198.51.100.1:5005"]));
    assert_eq!(found.proxy, addresses(&["198.51.100.2:7002"]));
    assert_eq!(server.questions(), 0);

    let by_name = resolver.resolve(&domain("cluster-3.example")).await;
    let by_name = by_name.unwrap();
    assert_eq!(by_name.registry, addresses(&["192.0.2.7:5005"]));
    assert_eq!(by_name.proxy, addresses(&["192.0.2.7:7002"]));
    assert_eq!(by_name.question, "A gw.example");

    config.hosts.clear();
    resolver.reload(config);
    let found = resolver.resolve(&domain(X)).await.unwrap();
    assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    let gone = resolver.resolve(&domain("cluster-3.example")).await;
    assert!(matches!(gone, Err(ResolveError::NoDomain { .. })));
}

#[test]
fn hosts_are_read_from_text() {
    let ip = "192.0.2.1".parse::<HostTarget>().unwrap();
    assert_eq!(ip, HostTarget::Ip("192.0.2.1".parse().unwrap()));
    let socket = "[2001:db8::1]:7".parse::<HostTarget>().unwrap();
    assert_eq!(
        socket,
        HostTarget::Socket("[2001:db8::1]:7".parse().unwrap())
    );
    for text in ["gw.example", "gw.example:7001", "192.0.2.1:7001"] {
        assert_eq!(text.parse::<HostTarget>().unwrap().to_string(), text);
    }
    for text in [
        "gw.example:0",
        "gw.example:70000",
        "gw.example:x",
        "gw.example:+7",
    ] {
        let error = text.parse::<HostTarget>().unwrap_err();
        assert!(matches!(error, HostError::Port { .. }), "{text}: {error}");
    }
    assert!("gw..example".parse::<HostTarget>().is_err());
    // Where an IPv6 address ends and a port begins, brackets say.
    assert!("2001:db8::1:+7".parse::<HostTarget>().is_err());
    assert!("".parse::<HostTarget>().is_err());
}
