use std::time::SystemTime;

use nsm_core::{
    link::{LinkAlias, LinkSpec, VxlanSpec},
    liveness::{Reflector, sbfd::Discriminator},
    net::{NetnsUrl, Vni},
};
use nsm_proto::connection::{Connection, Path};
use proptest::prelude::*;

use super::*;
use crate::{connection::model::PathState, ports::Plan, route::next::Route};

fn remote(number: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, number])
}

fn path(number: u8) -> PathId {
    PathId {
        address: remote(number),
        port: 4789,
        reflector: Reflector {
            discriminator: Discriminator::new(7).expect("above zero"),
            vni: vni(1),
        },
    }
}

fn vni(number: u32) -> Vni {
    number.try_into().expect("a VNI")
}

/// A tunnel to a peer.
fn plan(number: u8) -> Plan {
    Plan::Vxlan {
        netns: NetnsUrl::Inode { dev: 4, inode: 5 }.into(),
        spec: VxlanSpec {
            link: LinkSpec {
                alias: LinkAlias::new("one.example", "id").expect("an alias"),
                name: "nsm-1".parse().expect("a name"),
                mac: None,
                mtu: 1450,
                addresses: Vec::new(),
                routes: Vec::new(),
                neighbours: Vec::new(),
            },
            sources: vec![],
            vni: vni(5),
            local: remote(200),
            remote: remote(number),
            port: 4789,
        },
    }
}

/// A connection whose segments have these numbers as id, and names of which there are few.
fn established(segments: &[u8], to: Option<u8>, watched: Option<u8>) -> Established {
    let segments = segments.iter().map(|number| PathSegment {
        name: name(number % 3),
        id: id(*number),
        ..PathSegment::default()
    });
    Established {
        view: Connection {
            path: Some(Path {
                index: 0,
                path_segments: segments.collect(),
            }),
            ..Connection::default()
        },
        owner: nsm_core::identity::Owner::Nsmgr,
        shown: None,
        arrival: crate::route::router::Arrival::Local,
        route: Route::example("tcp://192.0.2.1:5006"),
        next_mechanism: None,
        plan: to.map(|number| Box::new(plan(number))),
        key: None,
        expires: SystemTime::UNIX_EPOCH,
        committed: tokio::time::Instant::now(),
        path: PathState {
            watched: watched.map(path),
            ..PathState::default()
        },
    }
}

fn id(number: u8) -> String {
    match number {
        0 => String::new(),
        number => format!("id-{number}"),
    }
}

fn name(number: u8) -> String {
    format!("name-{number}")
}

fn selector(name: &str, id: &str) -> MonitorScopeSelector {
    MonitorScopeSelector {
        path_segments: vec![PathSegment {
            name: name.to_owned(),
            id: id.to_owned(),
            ..PathSegment::default()
        }],
        network_services: Vec::new(),
    }
}

fn sorted(mut ids: Vec<ConnectionId>) -> Vec<ConnectionId> {
    ids.sort();
    ids
}

fn connection() -> impl Strategy<Value = Established> {
    let segments = proptest::collection::vec(0..8_u8, 0..4);
    let peer = || proptest::option::of(1..4_u8);
    (segments, peer(), peer())
        .prop_map(|(segments, to, watched)| established(&segments, to, watched))
}

proptest! {
    /// Whatever is stored, replaced and removed: an index finds what a look at every connection finds.
    #[test]
    fn an_index_finds_what_a_scan_finds(
        steps in proptest::collection::vec((0..6_usize, proptest::option::of(connection())), 0..40)
    ) {
        let ids: Vec<ConnectionId> = (0..6).map(|number| format!("c{number}").into()).collect();
        let mut stored: Vec<Option<Established>> = vec![None; ids.len()];
        let mut numbers = vec![None; ids.len()];
        let mut indexes = Indexes::default();
        for (at, new) in steps {
            indexes.replace(&ids[at], &mut numbers[at], stored[at].as_ref(), new.as_ref());
            stored[at] = new;
        }
        let scan = |fits: &dyn Fn(&Established) -> bool| -> Vec<ConnectionId> {
            let all = ids.iter().zip(&stored);
            let found = all.filter(|(_, it)| it.as_ref().is_some_and(fits));
            found.map(|(id, _)| Arc::clone(id)).collect()
        };
        for number in 1..4 {
            let on_path = scan(&|it| it.path.watched == Some(path(number)));
            prop_assert_eq!(sorted(indexes.on_path(path(number))), on_path);
            let to = scan(&|it| it.remote().map(|(ip, _)| ip) == Some(remote(number)));
            prop_assert_eq!(sorted(indexes.to(remote(number))), to);
        }
        let has = |it: &Established, fits: &dyn Fn(&PathSegment) -> bool| {
            it.view.path.iter().flat_map(|path| &path.path_segments).any(fits)
        };
        for number in 1..8 {
            let wanted = id(number);
            let by_id = scan(&|it| has(it, &|segment| segment.id == wanted));
            let found = indexes.candidates(&selector("", &wanted));
            prop_assert_eq!(found.map(sorted), Some(by_id.clone()));
            // An id is narrower than the name beside it.
            let found = indexes.candidates(&selector(&name(0), &wanted));
            prop_assert_eq!(found.map(sorted), Some(by_id));
        }
        for number in 0..3 {
            let wanted = name(number);
            let by_name = scan(&|it| has(it, &|segment| segment.name == wanted));
            prop_assert_eq!(indexes.candidates(&selector(&wanted, "")).map(sorted), Some(by_name));
        }
        prop_assert_eq!(indexes.candidates(&selector("", "")), None);
        // Nothing is left of what is gone.
        for ((id, number), old) in ids.iter().zip(&mut numbers).zip(&stored) {
            indexes.replace(id, number, old.as_ref(), None);
            prop_assert_eq!(*number, None);
        }
        prop_assert!(indexes.by_path.0.is_empty());
        prop_assert!(indexes.by_remote.0.is_empty() && indexes.ids.is_empty());
        prop_assert!(indexes.by_segment_id.0.is_empty() && indexes.by_segment_name.0.is_empty());
    }
}
