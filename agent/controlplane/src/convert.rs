//! Between wire messages and the types of `nsm-core`: parsing happens here, once.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ipnet::IpNet;
use nsm_core::{
    link::RouteSpec,
    net::MacAddr,
    nsm::{
        path::{Path, Segment},
        select,
    },
};
use nsm_proto::{connection as wire, connectioncontext::Route, registry};
use prost_types::Timestamp;

use crate::error::RequestError;

/// A wire timestamp as system time; `None` for one before 1970 or beyond what the clock can hold.
pub fn time(stamp: &Timestamp) -> Option<SystemTime> {
    let seconds = u64::try_from(stamp.seconds).ok()?;
    let nanos = u32::try_from(stamp.nanos)
        .ok()
        .filter(|&n| n < 1_000_000_000)?;
    UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

/// System time as a wire timestamp.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

/// The wire path as typed path.
pub fn path(path: wire::Path) -> Path {
    Path {
        index: path.index,
        segments: path
            .path_segments
            .into_iter()
            .map(|segment| Segment {
                expires: segment.expires.as_ref().and_then(time),
                name: segment.name,
                id: segment.id,
                token: segment.token,
                metrics: segment.metrics,
            })
            .collect(),
    }
}

/// The typed path as wire path.
pub(crate) fn wire_path(path: Path) -> wire::Path {
    wire::Path {
        index: path.index,
        path_segments: path
            .segments
            .into_iter()
            .map(|segment| wire::PathSegment {
                name: segment.name,
                id: segment.id,
                token: segment.token,
                expires: segment.expires.map(timestamp),
                metrics: segment.metrics,
            })
            .collect(),
    }
}

/// A mechanism of the given class and type.
pub(crate) fn mechanism(
    cls: &str,
    r#type: &str,
    parameters: BTreeMap<String, String>,
) -> wire::Mechanism {
    wire::Mechanism {
        cls: cls.to_owned(),
        r#type: r#type.to_owned(),
        parameters,
    }
}

/// Addresses with prefix lengths; an address without one is a host's.
///
/// # Errors
/// One is no address; `field` names it.
pub fn addresses(field: &'static str, texts: &[String]) -> Result<Vec<IpNet>, RequestError> {
    texts.iter().map(|text| address(field, text)).collect()
}

fn address(field: &'static str, text: &str) -> Result<IpNet, RequestError> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| RequestError::Field {
            field,
            value: text.to_owned(),
            reason: "write an address with its prefix length, like 172.16.1.1/32".to_owned(),
        })
}

/// The routes of an IP context. A next hop that is the prefix itself means "on the link".
///
/// # Errors
/// A prefix or a next hop is no address; `field` names it.
pub fn routes(field: &'static str, routes: &[Route]) -> Result<Vec<RouteSpec>, RequestError> {
    routes
        .iter()
        .map(|route| {
            let prefix = address(field, &route.prefix)?;
            let via = match route.next_hop.as_str() {
                "" => None,
                hop => Some(hop.parse::<IpAddr>().map_err(|_| RequestError::Field {
                    field,
                    value: hop.to_owned(),
                    reason: "the next hop must be an address".to_owned(),
                })?),
            };
            Ok(RouteSpec {
                prefix: prefix.trunc(),
                via: via.filter(|via| IpNet::from(*via) != prefix),
            })
        })
        .collect()
}

/// A MAC address of the Ethernet context; empty is none.
///
/// # Errors
/// The text is no MAC address; `field` names it.
pub fn mac(field: &'static str, text: &str) -> Result<Option<MacAddr>, RequestError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| RequestError::Field {
        field,
        value: text.to_owned(),
        reason: "write a MAC address like 02:00:00:00:00:01".to_owned(),
    })
}

/// The matches of a registered service as selection rules.
pub fn matches(service: &registry::NetworkService) -> Vec<select::Match> {
    service
        .matches
        .iter()
        .map(|rule| {
            let routes = rule
                .routes
                .iter()
                .map(|route| select::Destination {
                    selector: route.destination_selector.clone(),
                    weight: route.weight,
                })
                .collect();
            select::Match::from_wire(
                rule.source_selector.clone(),
                routes,
                rule.fallthrough,
                rule.metadata.is_some(),
            )
        })
        .collect()
}
