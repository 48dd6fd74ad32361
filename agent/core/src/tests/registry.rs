use std::collections::BTreeMap;

use super::map;
use crate::nsm::{
    registry::{EndpointView, ServiceView, endpoint_matches, service_matches},
    select::Match,
};

type Labels = BTreeMap<String, String>;

fn services(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn labels<'a>(of: &[(&'a str, &'a Labels)]) -> BTreeMap<&'a str, &'a Labels> {
    of.iter().copied().collect()
}

#[test]
fn an_endpoint_matches_by_name_url_services_and_labels() {
    let (both, one, other) = (
        services(&["s1", "s2"]),
        services(&["s2"]),
        services(&["s3"]),
    );
    let (two, red, blue, none) = (
        map(&[("color", "red"), ("size", "1")]),
        map(&[("color", "red")]),
        map(&[("color", "blue")]),
        Labels::new(),
    );
    let nse = EndpointView {
        name: "nse-1",
        services: &both,
        labels: labels(&[("s1", &two)]),
        url: "tcp://192.0.2.1:5001",
    };
    let any = EndpointView::default();
    let matches = |query: EndpointView<'_>| endpoint_matches(&query, &nse);

    assert!(matches(any.clone()));
    assert!(matches(nse.clone()));
    assert!(matches(EndpointView {
        name: "nse-1",
        ..any.clone()
    }));
    assert!(
        !matches(EndpointView {
            name: "nse",
            ..any.clone()
        }),
        "names are not matched in part"
    );
    assert!(matches(EndpointView {
        url: "://192",
        ..any.clone()
    }));
    assert!(!matches(EndpointView {
        url: "udp://",
        ..any.clone()
    }));
    assert!(matches(EndpointView {
        services: &one,
        ..any.clone()
    }));
    assert!(!matches(EndpointView {
        services: &other,
        ..any.clone()
    }));
    assert!(matches(EndpointView {
        labels: labels(&[("s1", &red)]),
        ..any.clone()
    }));
    assert!(matches(EndpointView {
        labels: labels(&[("s1", &none)]),
        ..any.clone()
    }));
    assert!(!matches(EndpointView {
        labels: labels(&[("s1", &blue)]),
        ..any.clone()
    }));
    assert!(
        !matches(EndpointView {
            labels: labels(&[("s2", &none)]),
            ..any.clone()
        }),
        "it has no labels for s2"
    );
    let more = map(&[("color", "red"), ("zone", "a")]);
    assert!(!matches(EndpointView {
        labels: labels(&[("s1", &more)]),
        ..any
    }));
}

#[test]
fn a_service_matches_by_name_payload_and_rules() {
    let rules = [Match {
        source: map(&[("app", "firewall")]),
        ..Match::default()
    }];
    let others = [Match {
        source: map(&[("app", "vpn")]),
        ..Match::default()
    }];
    let ns = ServiceView {
        name: "ns-1",
        payload: "IP",
        matches: &rules,
    };
    let any = ServiceView::default();
    assert!(service_matches(&any, &ns));
    assert!(service_matches(&ns, &ns));
    assert!(service_matches(
        &ServiceView {
            name: "ns-1",
            ..any.clone()
        },
        &ns
    ));
    assert!(!service_matches(
        &ServiceView {
            name: "ns",
            ..any.clone()
        },
        &ns
    ));
    assert!(service_matches(
        &ServiceView {
            payload: "IP",
            ..any.clone()
        },
        &ns
    ));
    assert!(!service_matches(
        &ServiceView {
            payload: "ETHERNET",
            ..any.clone()
        },
        &ns
    ));
    assert!(service_matches(
        &ServiceView {
            matches: &rules,
            ..any.clone()
        },
        &ns
    ));
    assert!(!service_matches(
        &ServiceView {
            matches: &others,
            ..any
        },
        &ns
    ));
}
