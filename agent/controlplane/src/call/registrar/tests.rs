use std::time::{Duration, SystemTime};

use nsm_core::identity::{Caller, Process, relay::Relays};
use nsm_discovery::dns::{Resolver, ResolverConfig};
use nsm_proto::registry::NetworkServiceEndpoint;
use tokio::time::Instant;
use tonic::Code;

use super::*;
use crate::{
    identity::{
        gate::Gate,
        token::{Token, TokenSource},
    },
    peer::peers::Peers,
    places::Limits as Wide,
    registry::memory::{Limits, Memory},
    route::{addresses::Addresses, bypass::Bypass, local::LocalEndpoints, router::Arrival},
};

fn registrar() -> Registrar {
    let second = Duration::from_secs(1);
    let tokens = TokenSource::hs256("spiffe://cluster-1.example/agent-1", b"test", 60 * second);
    let budget = Budget::new(&Wide::wide());
    let lookup = Lookup {
        registry: Arc::new(Memory::new(Limits::default())),
        resolver: Resolver::new(ResolverConfig::default()),
        questions: budget.questions.clone(),
        peers: Arc::new(Peers::connecting_with(Arc::new(tokens), second, 1 << 16)),
        gate: Arc::new(Gate::of_own_domain(
            "cluster-1.example".parse().expect("a domain"),
        )),
        relays: Relays::default(),
        addresses: Addresses::new(Some("tcp://192.0.2.1:5006".to_owned())),
        bypass: Bypass::default(),
        local_endpoints: LocalEndpoints::default(),
    };
    let domain = "cluster-1.example".parse().expect("a domain");
    let drained = watch::Sender::new(false);
    Registrar::new(
        domain,
        None,
        BTreeMap::new(),
        Arc::new(lookup),
        budget,
        drained,
    )
}

/// A call of a process of this user, for an endpoint at an address of its own.
fn call_of(uid: u32, life: Duration) -> Call<NetworkServiceEndpoint> {
    let expires = SystemTime::now() + life;
    Call {
        message: NetworkServiceEndpoint {
            name: "nse-1".to_owned(),
            network_service_names: vec!["svc".to_owned()],
            url: url_of(uid),
            ..NetworkServiceEndpoint::default()
        },
        arrival: Arrival::Local,
        source: Source::Node,
        descriptors: None,
        shown: None,
        session: None,
        holder: Holder::our_own(),
        caller: Caller::on_node(Process {
            user: Some(uid),
            is_administrator: uid == 0,
            ..Process::unknown()
        }),
        token: Some(Token {
            text: "token".to_owned(),
            expires,
        }),
        deadline: Instant::now() + Duration::from_secs(10),
    }
}

fn url_of(uid: u32) -> String {
    format!("tcp://192.0.2.7:{}", 9000 + uid)
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
        for word in ["nse-1", "another name"] {
            assert!(refused.contains(word), "{refused}");
        }
    }
    assert_eq!(url_kept(&registrar), Some(url_of(1000)));
    // Its own user refreshes it and takes it out, and then it is whose who comes first; root may always.
    register(1000, MINUTE).await.expect("refreshed");
    unregister(1000).await.expect("unregistered");
    register(1001, MINUTE).await.expect("free");
    register(0, MINUTE).await.expect("root");
    assert_eq!(url_kept(&registrar), Some(url_of(0)));
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
    // The registry has its own clock, by which it has lapsed too.
    let lapsed = call_of(1000, Duration::ZERO);
    let entries = registrar.lookup.registry.endpoints();
    let terms = terms(&lapsed, None);
    let unregistered = entries.unregister(lapsed.message, terms).await;
    unregistered.expect("its own");
    let other = call_of(1001, Duration::from_secs(60));
    registrar
        .register_endpoint(other, None)
        .await
        .expect("free");
}

/// The agent connects as root: a path would lead it to sockets that the caller cannot open.
#[tokio::test]
async fn a_socket_is_registered_by_its_path_by_administrators_only() {
    let registrar = registrar();
    let register = |uid| {
        let mut call = call_of(uid, Duration::from_secs(60));
        call.message.url = "unix:///run/priv.sock".to_owned();
        registrar.register_endpoint(call, None)
    };
    let refused = register(1000).await.expect_err("not root");
    assert_eq!(refused.code(), Code::PermissionDenied);
    let text = refused.to_string();
    assert!(
        text.contains("/run/priv.sock") && text.contains("descriptor"),
        "{text}"
    );
    assert_eq!(url_kept(&registrar), None);
    register(0).await.expect("root");
}
