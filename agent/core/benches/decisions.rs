//! What the decisions of one Request cost, at the sizes of a busy node: none of them may be seen beside a round trip or a signature.
//!
//! `cargo bench -p nsm-core` runs them, `cargo xtask bench core` shows them in its table.

use std::{
    collections::BTreeMap,
    hint::black_box,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use nsm_core::{
    link::{Link, LinkAlias, LinkKind, LinkSpec, Route, RouteSpec, diff},
    mechanism::vni_pool::{QUARANTINE, VniPool},
    net::{IfName, MacAddr, Vni},
    nsm::{
        name::InterdomainName,
        path::{Path, Segment, check_reply},
        registry::{EndpointView, endpoint_matches},
        select::{Candidate, Destination, Match, select},
    },
};

/// Connections of a node that is full by the numbers we hold.
const CONNECTIONS: u32 = 10_000;

/// Endpoints in a domain's registry.
const ENDPOINTS: usize = 1_000;

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

/// A path of `length` hops, with tokens as long as real ones.
fn path(length: usize, index: u32) -> Path {
    let segment = |hop: usize| Segment {
        name: format!("nsmgr-proxy-{hop}.cluster-{hop}.example"),
        id: format!("6f1c9f0e-5b3a-4d6c-9a53-{hop:012}"),
        token: "e".repeat(240),
        expires: Some(now() + Duration::from_secs(600)),
        metrics: BTreeMap::new(),
    };
    Path {
        index,
        segments: (0..length).map(segment).collect(),
    }
}

fn paths(c: &mut Criterion) {
    let mut group = c.benchmark_group("path");
    let new = path(4, 3);
    let sender = new.segments[3].id.clone();
    let descend = |mut path: Path| {
        let hop = path.descend(&sender, "nsmgr-proxy-4.cluster-4.example", || {
            "own-id".to_owned()
        });
        (hop, path)
    };
    group.bench_function("descend_new_hop", |b| {
        b.iter_batched(|| new.clone(), descend, BatchSize::SmallInput);
    });
    let known = path(8, 3);
    group.bench_function("descend_refresh", |b| {
        b.iter_batched(|| known.clone(), descend, BatchSize::SmallInput);
    });
    let (sent, reply) = (path(5, 4), path(8, 4));
    group.bench_function("check_reply", |b| {
        let check = |sent: &Path, reply: &Path| {
            let segments = reply.segments.iter();
            let names = segments.map(|segment| (segment.name.as_str(), segment.id.as_str()));
            check_reply(sent, reply.index, names)
        };
        b.iter(|| check(black_box(&sent), black_box(&reply)));
    });
    group.finish();
}

fn selection(c: &mut Criterion) {
    let route = |version: &str, weight| Destination {
        selector: labels(&[("app", "web"), ("version", version)]),
        weight,
    };
    let rules = [
        Match {
            source: labels(&[("app", "firewall")]),
            routes: vec![route("v0", 1)],
            fallthrough: true,
        },
        Match {
            source: BTreeMap::new(),
            routes: vec![route("v1", 90), route("v2", 10)],
            fallthrough: false,
        },
    ];
    let endpoints: Vec<_> = (0..10)
        .map(|n| labels(&[("app", "web"), ("version", ["v1", "v2"][n % 2])]))
        .collect();
    let candidates: Vec<_> = endpoints
        .iter()
        .map(|labels| Candidate {
            name: "nse",
            labels,
        })
        .collect();
    let client = labels(&[("app", "client")]);
    let mut turn = 0;
    c.benchmark_group("select")
        .bench_function("two_rules_ten_endpoints", |b| {
            b.iter(|| {
                turn += 1;
                select(black_box(&rules), &client, &candidates, turn)
            });
        });
}

fn vnis(c: &mut Criterion) {
    let (local, remote) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
    let mut random = 0u32;
    let mut draw = move || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        random >> 8
    };
    let mut pool = VniPool::new(Vni::MANAGEMENT);
    for _ in 0..CONNECTIONS {
        pool.allocate(local, remote, now(), &mut draw)
            .expect("the pool is nearly empty");
    }
    // Time goes on by a quarantine with every turn, so that the pool stays as large as it is.
    let mut time = now();
    c.benchmark_group("vni")
        .bench_function("allocate_and_release_among_10000", |b| {
            b.iter(|| {
                time += QUARANTINE;
                let vni = pool
                    .allocate(local, remote, time, &mut draw)
                    .expect("the pool is nearly empty");
                pool.release(vni, time);
                vni
            });
        });
}

fn names(c: &mut Criterion) {
    let mut group = c.benchmark_group("name");
    for (name, text) in [
        (
            "dns",
            "icmp-responder@cluster-2.nsm.interdomain.example.com",
        ),
        ("address", "icmp-responder@[2001:db8::7]:5005"),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| black_box(text).parse::<InterdomainName>());
        });
    }
    group.finish();
}

fn registries(c: &mut Criterion) {
    struct Endpoint {
        name: String,
        services: Vec<String>,
        labels: BTreeMap<String, String>,
        url: String,
    }
    let endpoints: Vec<_> = (0..ENDPOINTS)
        .map(|n| Endpoint {
            name: format!("nse-{n}"),
            services: vec![format!("service-{}", n % 50), "icmp-responder".to_owned()],
            labels: labels(&[("app", "web"), ("version", ["v1", "v2"][n % 2])]),
            url: format!("tcp://192.0.2.{}:5006", n % 250),
        })
        .collect();
    let views: Vec<_> = endpoints
        .iter()
        .map(|endpoint| EndpointView {
            name: &endpoint.name,
            services: &endpoint.services,
            labels: BTreeMap::from([(endpoint.services[0].as_str(), &endpoint.labels)]),
            url: &endpoint.url,
        })
        .collect();
    let (services, wanted) = (["service-7".to_owned()], labels(&[("version", "v2")]));
    let query = EndpointView {
        services: &services,
        labels: BTreeMap::from([("service-7", &wanted)]),
        ..EndpointView::default()
    };
    assert_eq!(
        views
            .iter()
            .filter(|view| endpoint_matches(&query, view))
            .count(),
        ENDPOINTS / 50,
        "every fiftieth endpoint serves service-7, each at an odd place and so of v2"
    );
    c.benchmark_group("registry")
        .bench_function("find_among_1000_endpoints", |b| {
            b.iter(|| {
                views
                    .iter()
                    .filter(|view| endpoint_matches(black_box(&query), view))
                    .count()
            });
        });
}

fn tunnels(c: &mut Criterion) {
    let host = |last: u8| IpAddr::from([172, 16, 1, last]).into();
    let mac = |last| MacAddr::new([2, 0, 0, 0, 0, last]);
    let spec = LinkSpec {
        alias: LinkAlias::new("cluster-1.example", "6f1c9f0e-5b3a-4d6c-9a53-000000000001")
            .expect("a domain and a UUID make an alias"),
        name: IfName::try_from("nsm-1").expect("five characters"),
        mac: Some(mac(1)),
        mtu: 1450,
        addresses: vec![host(1)],
        routes: vec![RouteSpec {
            prefix: host(0),
            via: None,
        }],
        neighbours: vec![(IpAddr::from([172, 16, 1, 0]), mac(2))],
    };
    let link = Link {
        index: 3,
        name: spec.name.to_string(),
        alias: Some(spec.alias.clone()),
        mac: spec.mac,
        mtu: spec.mtu,
        up: true,
        kind: LinkKind::Veth {
            peer: 2,
            peer_netns: Some(0),
        },
        addresses: spec.addresses.clone(),
        routes: spec
            .routes
            .iter()
            .map(|&spec| Route { spec, ours: true })
            .collect(),
        neighbours: spec.neighbours.clone(),
    };
    assert_eq!(diff(&spec, Some(&link)), [], "the link is as wanted");
    let mut group = c.benchmark_group("tunnel");
    group.bench_function("diff_of_a_refresh", |b| {
        b.iter(|| diff(black_box(&spec), black_box(Some(&link))));
    });
    group.bench_function("diff_of_a_new_link", |b| {
        b.iter(|| diff(black_box(&spec), None));
    });
    group.finish();
}

criterion_group! {
    name = decisions;
    // Nanoseconds settle within a second; what is longer buys digits that nobody reads.
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = paths, selection, vnis, names, registries, tunnels
}
criterion_main!(decisions);
