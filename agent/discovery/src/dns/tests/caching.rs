//! How long an answer is used, and by whom.

use super::*;

#[tokio::test]
async fn an_answer_is_asked_for_once_a_ttl() {
    let server = Zone::new()
        .negative_ttl(3600)
        .a(X, 30, "192.0.2.2")
        .serve()
        .await;
    let resolver = resolver(&server);
    let first = resolver.resolve(&domain(X)).await.unwrap();
    let asked = server.questions();
    let left = first.expires - Instant::now();
    assert!(left <= Duration::from_secs(30) && left > Duration::from_secs(28));

    let again = resolver.resolve(&domain(X)).await.unwrap();
    assert!(again.cached);
    assert_eq!(again.registry, first.registry);
    pass(Duration::from_secs(25)).await;
    assert!(resolver.resolve(&domain(X)).await.unwrap().cached);
    assert_eq!(server.questions(), asked);

    pass(Duration::from_secs(6)).await;
    assert!(!resolver.resolve(&domain(X)).await.unwrap().cached);
    assert_eq!(server.asked(X, RecordType::A), 2);
}

#[tokio::test]
async fn ttls_are_bounded_on_both_sides() {
    for (ttl, least, most) in [(0, 0, 1), (86400, 3598, 3600)] {
        let server = Zone::new()
            .srv(REGISTRY, ttl, 0, 5005, X)
            .srv(PROXY, ttl, 0, 5006, X)
            .a(X, ttl, "192.0.2.2")
            .serve()
            .await;
        let found = resolver(&server).resolve(&domain(X)).await.unwrap();
        let left = found.expires - Instant::now();
        assert!(left <= Duration::from_secs(most), "{left:?}");
        assert!(left > Duration::from_secs(least), "{left:?}");
    }
}

#[tokio::test]
async fn a_failure_is_kept_briefly() {
    let server = Zone::new().serve().await;
    let resolver = resolver(&server);
    resolver.resolve(&domain(X)).await.unwrap_err();
    let asked = server.questions();
    resolver.resolve(&domain(X)).await.unwrap_err();
    assert_eq!(server.questions(), asked);
    pass(Duration::from_secs(6)).await;
    resolver.resolve(&domain(X)).await.unwrap_err();
    assert!(server.questions() > asked);
}

#[tokio::test]
async fn callers_share_one_flight_and_one_that_leaves_harms_no_other() {
    let server = Zone::new()
        .a(X, 30, "192.0.2.2")
        .fault(X, RecordType::A, Fault::Held)
        .serve()
        .await;
    let resolver = resolver(&server);
    let mut callers = Vec::new();
    for _ in 0..50 {
        let resolver = resolver.clone();
        callers.push(tokio::spawn(
            async move { resolver.resolve(&domain(X)).await },
        ));
    }
    let asked = async {
        while server.asked(X, RecordType::A) == 0 {
            tokio::task::yield_now().await;
        }
    };
    let asked = tokio::time::timeout(Duration::from_secs(1), asked).await;
    asked.expect("the question within the resolver's time");
    callers.remove(0).abort();
    server.release();
    for caller in callers {
        let found = caller.await.unwrap().unwrap();
        assert_eq!(found.registry, addresses(&["192.0.2.2:5005"]));
    }
    assert_eq!(server.asked(REGISTRY, RecordType::SRV), 1);
    assert_eq!(server.asked(X, RecordType::A), 1);
    let setup = Arc::clone(&resolver.setup.read().unwrap());
    assert_eq!(setup.cache().len(), (1, 0));
}

#[tokio::test]
async fn the_cache_is_bounded() {
    let mut cache = Cache::default();
    let now = Instant::now();
    let failed = || -> Outcome {
        Err(ResolveError::Interrupted {
            domain: String::new(),
        })
    };
    let name = |i: usize| domain(&format!("d{i}.example"));
    for i in 0..cache::MAX_ANSWERS + 100 {
        // The later, the longer it holds: what goes is the oldest.
        let expires = now + Duration::from_secs(1 + i as u64);
        cache.land(name(i), failed(), expires, now);
    }
    assert_eq!(cache.len(), (cache::MAX_ANSWERS, 0));
    assert!(matches!(
        cache.look_up(&name(100), now),
        Known::Answer(Err(_))
    ));
    let mut flights = Vec::new();
    for i in 0..MAX_FLIGHTS {
        let known = cache.look_up(&domain(&format!("f{i}.example")), now);
        let Known::Unknown(sender, _) = known else {
            panic!("a new domain opens a flight");
        };
        flights.push(sender);
    }
    assert!(matches!(cache.look_up(&name(0), now), Known::Full));
    // A flight that crashed counts as none.
    flights.pop();
    assert!(matches!(cache.look_up(&name(0), now), Known::Unknown(..)));
    let long_after = now + Duration::from_secs(10_000);
    cache.land(name(0), failed(), long_after, long_after);
    assert_eq!(cache.len().0, 1);
}

#[tokio::test]
async fn what_is_remembered_is_listed_until_it_expires() {
    let server = Zone::new()
        .negative_ttl(3600)
        .a(X, 30, "192.0.2.2")
        .serve()
        .await;
    let resolver = resolver(&server);
    assert_eq!(resolver.remembered().len(), 0);
    let found = resolver.resolve(&domain(X)).await.unwrap();
    pass(Duration::from_secs(10)).await;
    let all = resolver.remembered();
    let [known] = all.as_slice() else {
        panic!("{all:?}");
    };
    assert_eq!((&known.domain, known.expires), (&domain(X), found.expires));
    assert!(known.answered.elapsed() >= Duration::from_secs(10));
    assert_eq!(known.outcome.as_ref().unwrap().registry, found.registry);
    pass(Duration::from_secs(21)).await;
    assert_eq!(resolver.remembered().len(), 0);
}

/// Where an answer leads nobody may listen any more, long before its TTL ends.
#[tokio::test]
async fn an_answer_that_is_of_no_use_is_asked_for_again() {
    let old = Zone::new().a(X, 3600, "192.0.2.2").serve().await;
    let resolver = resolver(&old);
    let fresh = resolver.resolve(&domain(X)).await.unwrap();
    assert_eq!(
        resolver.again(&domain(X), &fresh, ()).await,
        None,
        "it is new"
    );
    let stale = resolver.resolve(&domain(X)).await.unwrap();
    assert_eq!(
        resolver.again(&domain(X), &stale, ()).await,
        None,
        "it is young"
    );
    let asked = old.questions();
    pass(Resolver::AGE_OF_DOUBT).await;
    assert_eq!(
        resolver.again(&domain(X), &stale, ()).await,
        None,
        "it is the same"
    );
    assert!(old.questions() > asked);

    old.change(Zone::new().a(X, 3600, "192.0.2.3"));
    pass(Resolver::AGE_OF_DOUBT).await;
    let stale = resolver.resolve(&domain(X)).await.unwrap();
    let again = resolver.again(&domain(X), &stale, ()).await.unwrap();
    assert_eq!(again.registry, addresses(&["192.0.2.3:5005"]));
    assert!(resolver.resolve(&domain(X)).await.unwrap().cached);

    // The network is away: what is remembered is all there is.
    let fault = Fault::Code(ResponseCode::ServFail);
    old.change(Zone::new().fault_all(X, fault));
    pass(Resolver::AGE_OF_DOUBT).await;
    let stale = resolver.resolve(&domain(X)).await.unwrap();
    assert_eq!(resolver.again(&domain(X), &stale, ()).await, None);
    let kept = resolver.resolve(&domain(X)).await.unwrap();
    assert_eq!(kept.registry, addresses(&["192.0.2.3:5005"]));
}
