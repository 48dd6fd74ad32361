//! Whose entries are, how many one source may have, and how long services stay.

use nsm_core::identity::{Caller, Process, relay::Relays, share::Limit};

use super::*;
use crate::registry::memory::ownership::CLAIM;

/// What a caller of the network registers.
fn terms(last: u8) -> Terms {
    let caller = Caller::from_address(Some([192, 0, 2, last].into()));
    Terms {
        holder: Holder::of(&caller, &Relays::default()),
        caller,
        deadline: Instant::now() + PATIENCE,
        owner: None,
        expires: None,
    }
}

/// The same of a pod of this node.
fn terms_of(user: u32) -> Terms {
    let caller = Caller::on_node(Process {
        user: Some(user),
        ..Process::unknown()
    });
    Terms {
        holder: Holder::of(&caller, &Relays::default()),
        caller,
        ..terms(1)
    }
}

/// A service with a rule of its own.
fn ruled(name: &str, rule: &str) -> NetworkService {
    let routes = vec![Destination {
        destination_selector: BTreeMap::from([("rule".to_owned(), rule.to_owned())]),
        ..Destination::default()
    }];
    NetworkService {
        matches: vec![Match {
            routes,
            ..Match::default()
        }],
        ..service(name)
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_is_of_who_registered_it_first() {
    let registry = registry();
    let services = &registry.services;
    let register = async |service: NetworkService, terms| {
        let registered = Entries::register(services, service, terms).await;
        registered
            .map(|it| it.matches)
            .map_err(|error| error.code())
    };
    let denied = tonic::Code::PermissionDenied;
    let one = ruled("s", "one").matches;
    assert_eq!(
        register(ruled("s", "one"), terms_of(1)).await,
        Ok(one.clone())
    );
    // Who offers it too registers it as it is, and changes nothing.
    assert_eq!(register(service("s"), terms_of(2)).await, Ok(one.clone()));
    assert_eq!(register(ruled("s", "one"), terms(1)).await, Ok(one.clone()));
    assert_eq!(register(ruled("s", "two"), terms_of(2)).await, Err(denied));
    assert_eq!(register(ruled("s", "two"), terms(1)).await, Err(denied));
    let payload = NetworkService {
        payload: "ETHERNET".to_owned(),
        ..service("s")
    };
    assert_eq!(register(payload, terms_of(2)).await, Err(denied));
    for terms in [terms_of(2), terms(1)] {
        let error = Entries::unregister(services, service("s"), terms).await;
        assert_eq!(error.unwrap_err().code(), denied);
    }
    let two = ruled("s", "two").matches;
    assert_eq!(register(ruled("s", "two"), terms_of(1)).await, Ok(two));

    // Its owner is gone, and so it is of who offers it.
    let mut offer = endpoint("nse", &["s"]);
    offer.expiration_time = None;
    Entries::register(&registry.endpoints, offer, terms_of(2))
        .await
        .unwrap();
    tokio::time::advance(Duration::from_secs(59)).await;
    assert_eq!(register(ruled("s", "one"), terms_of(2)).await, Err(denied));
    tokio::time::advance(CLAIM).await;
    Entries::register(&registry.endpoints, endpoint("nse", &["s"]), terms_of(2))
        .await
        .unwrap();
    assert_eq!(
        register(ruled("s", "three"), terms_of(3)).await,
        Err(denied)
    );
    assert_eq!(register(ruled("s", "one"), terms_of(2)).await, Ok(one));
    Entries::unregister(services, service("s"), terms_of(2))
        .await
        .unwrap();
    assert_eq!(registry.counts().services, 0);
}

#[tokio::test(start_paused = true)]
async fn a_service_stays_while_an_endpoint_offers_it() {
    let registry = Memory::new(Limits {
        service_life: Duration::from_secs(100),
        ..Limits::default()
    });
    let mut watch = registry.services.watch(service("")).unwrap();
    for name in ["s", "alone"] {
        registry
            .services
            .register(service(name), now(), &[])
            .unwrap();
    }
    let start = Instant::now();
    registry.add(endpoint("nse", &["s"]));
    tokio::time::advance(Duration::from_secs(50)).await;
    // It is there until 110 s.
    registry
        .endpoints
        .register(endpoint("nse", &["s"]), after(50), &[])
        .unwrap();
    let mut gone = async || loop {
        let event = watch.next().await.unwrap().unwrap();
        if event.deleted {
            break (event.entry.name.clone(), start.elapsed().as_secs());
        }
    };
    assert_eq!(gone().await, ("alone".to_owned(), 100));
    assert_eq!(gone().await, ("s".to_owned(), 200));
}

#[tokio::test]
async fn one_source_does_not_fill_the_registry() {
    let budget = Budget::new(&Wide {
        entries: Limit { all: 64, of_one: 4 },
        ..Wide::wide()
    });
    let registry = Memory::charging(Limits::default(), &budget);
    let register = async |name: &str, last| {
        Entries::register(&registry.services, service(name), terms(last)).await
    };
    for name in ["a", "b", "c", "d"] {
        register(name, 1).await.unwrap();
    }
    let error = register("e", 1).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::ResourceExhausted);
    assert!(
        error.to_string().contains("max_entries_per_source"),
        "{error}"
    );
    // A refresh finds its place, others have theirs, and what is given back is free again.
    register("a", 1).await.unwrap();
    register("e", 2).await.unwrap();
    Entries::unregister(&registry.services, service("a"), terms(1))
        .await
        .unwrap();
    register("f", 1).await.unwrap();
    registry.services.unregister("f");
    assert_eq!(budget.entries.taken(), 4);
}
