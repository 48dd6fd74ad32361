//! What holds for every registry, wherever its entries are.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use nsm_core::{
    identity::{relay::Relays, share::Holder},
    link::admission::Rules,
    mechanism::vni_pool::VniPool,
    net::PeerUrl,
};
use nsm_discovery::dns::{Resolver, ResolverConfig};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use tokio::time::{Instant, timeout};
use tokio_stream::StreamExt as _;
use tonic::{Code, service::Routes};

use super::{
    Asker, DomainRegistry, Events, Terms,
    backend::Backend,
    memory::{Limits, Memory},
    remote::Remote,
};
use crate::{
    api::listener::{ListenerLimits, Socket, serve},
    identity::{gate::Gate, token::TokenSource},
    liveness::Reachability,
    peer::peers::Peers,
    places::{Budget, Limits as Wide},
    plane::{ControlPlane, Settings},
    transport::{clients::Clients, guard::DialGuard},
};

const PATIENCE: Duration = Duration::from_secs(10);

fn terms() -> Terms {
    Terms {
        holder: Holder::our_own(),
        caller: nsm_core::identity::Caller::over_network(),
        deadline: Instant::now() + PATIENCE,
        owner: None,
        expires: None,
    }
}

fn asker() -> Asker {
    Asker {
        holder: terms().holder,
        deadline: terms().deadline,
    }
}

fn service(name: &str) -> NetworkService {
    NetworkService {
        name: name.to_owned(),
        ..NetworkService::default()
    }
}

fn endpoint(name: &str) -> NetworkServiceEndpoint {
    NetworkServiceEndpoint {
        name: name.to_owned(),
        url: "tcp://192.0.2.7:5001".to_owned(),
        network_service_names: vec!["s".to_owned()],
        ..NetworkServiceEndpoint::default()
    }
}

/// The next event as `+name` or `-name`.
async fn next(events: &mut Events<NetworkServiceEndpoint>) -> String {
    let event = timeout(PATIENCE, events.next()).await;
    let event = event.expect("an event in time").unwrap().unwrap();
    let sign = if event.deleted { '-' } else { '+' };
    format!("{sign}{}", event.entry.name)
}

async fn register_find_watch_unregister(registry: &dyn DomainRegistry) {
    let (services, endpoints) = (registry.services(), registry.endpoints());
    let registered = services.register(service("s"), terms()).await.unwrap();
    assert_eq!(registered.payload, "IP");
    let mut short = terms();
    short.expires = Some(SystemTime::now() + Duration::from_secs(60));
    let registered = endpoints.register(endpoint("a"), short).await.unwrap();
    let expiry = SystemTime::try_from(registered.expiration_time.unwrap()).unwrap();
    assert!(expiry <= SystemTime::now() + Duration::from_secs(60));

    // An empty query finds everything.
    let deadline = terms().deadline;
    let all = services.find(service(""), deadline).await.unwrap();
    assert_eq!(all.collect(9).await.unwrap().len(), 1);
    let none = endpoints.find(endpoint("b"), deadline).await.unwrap();
    assert_eq!(none.collect(9).await.unwrap().len(), 0);
    endpoints.register(endpoint("b"), terms()).await.unwrap();
    let all = endpoints.find(NetworkServiceEndpoint::default(), deadline);
    let all = all.await.unwrap().collect(9).await.unwrap();
    assert_eq!(all.len(), 2);
    assert_eq!(all[0].name, "a");

    let mut watch = endpoints.watch(endpoint("a"), asker()).await.unwrap();
    assert_eq!(next(&mut watch).await, "+a");
    endpoints.unregister(endpoint("b"), terms()).await.unwrap();
    endpoints.unregister(endpoint("a"), terms()).await.unwrap();
    assert_eq!(next(&mut watch).await, "-a");
    endpoints.unregister(endpoint("a"), terms()).await.unwrap();

    let nameless = endpoints.register(endpoint(""), terms()).await.unwrap_err();
    assert_eq!(nameless.code(), Code::InvalidArgument, "{nameless}");
}

async fn a_dropped_watch_leaves_no_watcher(registry: &dyn DomainRegistry, memory: &Memory) {
    let watchers = async |wanted: usize| {
        let reached = async {
            while memory.counts().watchers != wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, reached)
            .await
            .expect("the watchers in time");
    };
    let endpoints = registry.endpoints();
    endpoints.register(endpoint("a"), terms()).await.unwrap();
    let mut watches = Vec::new();
    for _ in 0..50 {
        let mut watch = endpoints.watch(endpoint("a"), asker()).await.unwrap();
        assert_eq!(next(&mut watch).await, "+a");
        watches.push(watch);
    }
    watchers(50).await;
    drop(watches);
    watchers(0).await;
}

fn tokens() -> Arc<TokenSource> {
    let id = "spiffe://cluster-1.example/agent-1";
    Arc::new(TokenSource::hs256(id, b"test", PATIENCE))
}

fn peers() -> Arc<Peers> {
    let loopback = DialGuard::new(vec!["127.0.0.0/8".parse().unwrap()], []);
    Arc::new(Peers::connecting_with(tokens(), PATIENCE, 1 << 20).guarded_by(loopback))
}

/// An agent whose registry is `memory`, on loopback, and its URL. Its watches end with the plane.
async fn serving(memory: &Memory) -> (ControlPlane, PeerUrl) {
    let settings = Settings {
        name: "agent-1".to_owned(),
        domain: "cluster-1.example".parse().unwrap(),
        advertise_url: Some("tcp://192.0.2.1:5006".to_owned()),
        upstream_nsmgr_url: None,
        registry_proxy_url: None,
        request_timeout: PATIENCE,
        dial_timeout: PATIENCE,
        budget: Budget::new(&Wide::wide()),
        max_message_bytes: 1 << 20,
        reachability: Reachability::Off,
        node_namespace: false,
        admission: Rules::default(),
        gate: Arc::new(Gate::of_own_domain("cluster-1.example".parse().unwrap())),
        relays: Relays::default(),
        dial_inside: Vec::new(),
        peer_ports: Vec::new(),
        client_info: Default::default(),
        tls: None,
    };
    let plane = ControlPlane::start(
        settings,
        tokens(),
        Resolver::new(ResolverConfig::default()),
        Backend::Memory(memory.clone()),
        None,
        VniPool::default(),
    );
    let budget = Budget::new(&Wide::wide());
    let limits = ListenerLimits {
        clients: Clients::of_our_own(budget.clients),
        messages: budget.messages,
        max_message_bytes: 1 << 20,
        max_streams: 100,
        tls: None,
    };
    let socket = Socket::tcp(SocketAddr::from(([127, 0, 0, 1], 0))).await;
    let socket = socket.unwrap();
    let Socket::Tcp(listener) = &socket else {
        panic!("made as TCP")
    };
    let url = PeerUrl::from(listener.local_addr().unwrap());
    let routes = plane.network_front().add_to(Routes::default(), &limits);
    tokio::spawn(async move { serve(socket, routes, &limits, std::future::pending()).await });
    (plane, url)
}

#[tokio::test]
async fn in_memory() {
    let memory = Memory::new(Limits::default());
    register_find_watch_unregister(&memory).await;
    a_dropped_watch_leaves_no_watcher(&memory, &memory).await;
}

#[tokio::test]
async fn behind_another_agent() {
    let memory = Memory::new(Limits::default());
    let (_plane, url) = serving(&memory).await;
    let remote = Backend::Remote(url).open(&peers());
    assert_eq!(remote.counts(), None);
    register_find_watch_unregister(&*remote).await;
    a_dropped_watch_leaves_no_watcher(&*remote, &memory).await;
}

/// The first URL that can be reached is asked; one that cannot is an error with its cause.
#[tokio::test]
async fn of_several_urls_the_first_that_can_be_reached_is_asked() {
    let memory = Memory::new(Limits::default());
    let (_plane, url) = serving(&memory).await;
    let closed: PeerUrl = "tcp://127.0.0.1:1".parse().unwrap();
    let peers = &peers();
    let remote = Remote::at(peers, [closed.clone(), url]);
    register_find_watch_unregister(&remote).await;
    let remote = Remote::at(peers, [closed.clone()]);
    let refused = remote.services().find(service("s"), terms().deadline).await;
    let refused = refused.err().expect("nothing listens there");
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.to_string().contains(closed.as_str()), "{refused}");
}
