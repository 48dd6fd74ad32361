use std::sync::Arc;

use nsm_core::mechanism::vni_pool::VniPool;
use nsm_discovery::dns::{Resolver, ResolverConfig};
use tonic::Code;

use super::*;
use crate::{
    identity::token::TokenSource,
    liveness::Reachability,
    plane::{OwnRegistry, Settings},
    registry::Limits,
};

fn plane() -> ControlPlane {
    let second = Duration::from_secs(1);
    let settings = Settings {
        name: "agent-1".to_owned(),
        domain: "cluster-1.example".parse().expect("a domain"),
        advertise_url: "tcp://192.0.2.1:5006".to_owned(),
        upstream_nsmgr_url: None,
        registry_proxy_url: None,
        request_timeout: second,
        dial_timeout: second,
        max_connections: 1,
        max_message_bytes: 1 << 16,
        reachability: Reachability::Off,
    };
    let tokens = TokenSource::hs256("spiffe://cluster-1.example/agent-1", b"test", 60 * second);
    ControlPlane::start(
        settings,
        Arc::new(tokens),
        Resolver::new(ResolverConfig::default()),
        OwnRegistry::Here(Registry::new(Limits::default())),
        None,
        VniPool::default(),
    )
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
        arrival: Arrival::Local { trusted: uid == 0 },
        descriptors: None,
        uid: Some(uid),
        token: Some(("token".to_owned(), expires)),
        deadline: Instant::now() + Duration::from_secs(10),
    }
}

fn url_kept(plane: &ControlPlane) -> Option<String> {
    let endpoints = lock(&plane.shared.local_endpoints);
    endpoints.get("nse-1").map(|endpoint| endpoint.url.clone())
}

#[tokio::test]
async fn an_endpoint_is_its_users_alone() {
    const MINUTE: Duration = Duration::from_secs(60);
    let plane = plane();
    let register = |uid, life| plane.register_endpoint(call_of(uid, life), None);
    let unregister = |uid| plane.unregister_endpoint(call_of(uid, MINUTE), None);
    register(1000, MINUTE).await.expect("registered");
    for refused in [
        register(1001, MINUTE).await.map(drop),
        unregister(1001).await,
    ] {
        let refused = refused.expect_err("another's");
        assert_eq!(refused.code(), Code::PermissionDenied);
        for word in ["nse-1", "user 1000", "user 1001", "another name"] {
            assert!(refused.message().contains(word), "{refused}");
        }
    }
    let url = |uid: u32| Some(format!("unix:///run/user/{uid}/nse.sock"));
    assert_eq!(url_kept(&plane), url(1000));
    // Its own user refreshes it and takes it out, and then it is whose who comes first; root may always.
    register(1000, MINUTE).await.expect("refreshed");
    unregister(1000).await.expect("unregistered");
    register(1001, MINUTE).await.expect("free");
    register(0, MINUTE).await.expect("root");
    assert_eq!(url_kept(&plane), url(0));
    unregister(0).await.expect("root");
    assert_eq!(url_kept(&plane), None);
}

#[tokio::test]
async fn a_lapsed_endpoint_is_nobodys() {
    let plane = plane();
    let mut lapsed = call_of(1000, Duration::from_secs(60));
    lapsed.token = None;
    plane
        .register_endpoint(lapsed, None)
        .await
        .expect("registered");
    for endpoint in lock(&plane.shared.local_endpoints).values_mut() {
        endpoint.expires = SystemTime::now();
    }
    let other = call_of(1001, Duration::from_secs(60));
    plane.register_endpoint(other, None).await.expect("free");
}
