use std::time::{Duration, SystemTime};

use nsm_core::identity::{Caller, User, relay::Relays};
use nsm_discovery::dns::{Resolver, ResolverConfig};
use nsm_proto::registry::NetworkServiceEndpoint;
use tokio::time::Instant;
use tonic::Code;

use super::*;
use crate::{
    identity::token::TokenSource,
    peer::peers::Peers,
    registry::memory::{Limits, Memory},
    route::{addresses::Addresses, bypass::Bypass, local::LocalEndpoints, router::Arrival},
};

fn registrar() -> Registrar {
    let second = Duration::from_secs(1);
    let tokens = TokenSource::hs256("spiffe://cluster-1.example/agent-1", b"test", 60 * second);
    let lookup = Lookup {
        registry: Arc::new(Memory::new(Limits::default())),
        resolver: Resolver::new(ResolverConfig::default()),
        peers: Arc::new(Peers::connecting_with(Arc::new(tokens), second, 1 << 16)),
        relays: Relays::default(),
        addresses: Addresses::new("tcp://192.0.2.1:5006".to_owned()),
        bypass: Bypass::default(),
        local_endpoints: LocalEndpoints::default(),
    };
    let domain = "cluster-1.example".parse().expect("a domain");
    let drained = watch::Sender::new(false);
    Registrar::new(domain, None, Arc::new(lookup), drained)
}

/// A call of a process of this user, for the endpoint whose socket lies in its folder.
fn call_of(uid: u32, life: Duration) -> Call<NetworkServiceEndpoint> {
    let expires = SystemTime::now() + life;
    Call {
        message: NetworkServiceEndpoint {
            name: "nse-1".to_owned(),
            network_service_names: vec!["svc".to_owned()],
            url: format!("unix:///run/user/{uid}/nse.sock"),
            ..NetworkServiceEndpoint::default()
        },
        arrival: Arrival::Local,
        source: Source::Node,
        descriptors: None,
        caller: Caller::on_node(User::of(Some(uid), None)),
        token: Some(("token".to_owned(), expires)),
        deadline: Instant::now() + Duration::from_secs(10),
    }
}

fn url_kept(registrar: &Registrar) -> Option<String> {
    let endpoint = registrar.lookup.local_endpoints.get("nse-1")?;
    Some(endpoint.url.to_string())
}

#[tokio::test]
async fn an_endpoint_is_its_users_alone() {
    const MINUTE: Duration = Duration::from_secs(60);
    let registrar = registrar();
    let register = |uid, life| registrar.register_endpoint(call_of(uid, life), None);
    let unregister = |uid| registrar.unregister_endpoint(call_of(uid, MINUTE), None);
    register(1000, MINUTE).await.expect("registered");
    for refused in [
        register(1001, MINUTE).await.map(drop),
        unregister(1001).await,
    ] {
        let refused = refused.expect_err("another's");
        assert_eq!(refused.code(), Code::PermissionDenied);
        let refused = refused.to_string();
        for word in ["nse-1", "user 1000", "user 1001", "another name"] {
            assert!(refused.contains(word), "{refused}");
        }
    }
    let url = |uid: u32| Some(format!("unix:///run/user/{uid}/nse.sock"));
    assert_eq!(url_kept(&registrar), url(1000));
    // Its own user refreshes it and takes it out, and then it is whose who comes first; root may always.
    register(1000, MINUTE).await.expect("refreshed");
    unregister(1000).await.expect("unregistered");
    register(1001, MINUTE).await.expect("free");
    register(0, MINUTE).await.expect("root");
    assert_eq!(url_kept(&registrar), url(0));
    unregister(0).await.expect("root");
    assert_eq!(url_kept(&registrar), None);
}

#[tokio::test]
async fn a_lapsed_endpoint_is_nobodys() {
    let registrar = registrar();
    let mut lapsed = call_of(1000, Duration::from_secs(60));
    lapsed.token = None;
    registrar
        .register_endpoint(lapsed, None)
        .await
        .expect("registered");
    let endpoints = &registrar.lookup.local_endpoints;
    let mut endpoint = endpoints.get("nse-1").expect("it is kept");
    endpoint.expires = SystemTime::now();
    endpoints.insert("nse-1".to_owned(), endpoint);
    let other = call_of(1001, Duration::from_secs(60));
    registrar
        .register_endpoint(other, None)
        .await
        .expect("free");
}
