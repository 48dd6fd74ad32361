//! NSM's messages: Requests, contexts, entries of a registry, and the frames of gRPC around them.

use std::{collections::BTreeMap, net::IpAddr};

use futures_util::FutureExt as _;
use http_body_util::Full;
use ipnet::IpNet;
use nsm_controlplane::convert;
use nsm_core::{
    link::{
        RouteSpec,
        admission::{Dns, MAX_ADDRESSES, MAX_ROUTES, Proposal, Rules, Side, Surroundings},
    },
    liveness::{LostHop, Published},
    mechanism::{Kernel, RemoteMechanism},
    net::special::of_address,
    nsm::{
        path::{MAX_SEGMENTS, check_reply, selector_matches},
        select::{Candidate, select},
    },
};
use nsm_proto::{
    codec::SliceCodec,
    connection::Connection,
    connectioncontext::{ConnectionContext, IpContext},
    networkservice::NetworkServiceRequest,
    registry::{NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointResponse},
};
use prost::{Message, bytes::Bytes};
use tonic::{Streaming, codec::Codec as _};

/// The addresses of a node in a cluster whose pods and services have these prefixes.
const NODE: &str = "10.1.0.5/24";
const CLUSTER: [&str; 2] = ["10.96.0.0/12", "10.244.0.0/16"];

/// What our own step adds to a path.
const OWN_NAME: &str = "proxy-nsmgr";

/// A Request: its path, its mechanisms, and what its segments publish.
pub(super) fn request(bytes: &[u8]) {
    let Ok(request) = NetworkServiceRequest::decode(bytes) else {
        return;
    };
    let connection = request.connection.unwrap_or_default();
    for mechanism in request
        .mechanism_preferences
        .iter()
        .chain(&connection.mechanism)
    {
        let _ = Kernel::parse(&mechanism.parameters);
        if let Some(remote) = RemoteMechanism::of_type(&mechanism.r#type) {
            let _ = remote.asked(&mechanism.parameters);
            let _ = remote.granted(&mechanism.parameters);
        }
    }
    path(&connection);
}

/// One step down and up the path leaves a path that is right for the hop below, and for the sender.
fn path(connection: &Connection) {
    let mut path = convert::path(connection.path.clone().unwrap_or_default());
    for segment in &path.segments {
        let _ = Published::read(&segment.metrics);
        let _ = LostHop::read(&segment.metrics);
    }
    let sent = path.clone();
    let Ok(hop) = path.descend(&connection.id, OWN_NAME, || "own".to_owned()) else {
        assert_eq!(path, sent, "a refused path is unchanged");
        return;
    };
    assert!(path.segments.len() <= MAX_SEGMENTS);
    let own = &path.segments[usize::try_from(path.index).expect("an index")];
    assert_eq!((own.name.as_str(), &own.id), (OWN_NAME, &hop.id));
    let pairs: Vec<_> = path
        .segments
        .iter()
        .map(|segment| (segment.name.as_str(), segment.id.as_str()))
        .collect();
    assert_eq!(
        check_reply(&path, path.index, pairs.iter().copied()),
        Ok(())
    );
    assert!(selector_matches(&pairs, &pairs));
    path.ascend(&hop);
    assert_eq!(path.index, sent.index);
}

/// The context of another domain's answer: what is admitted holds nothing of ours and nothing special.
pub(super) fn context(bytes: &[u8]) {
    let Ok(context) = ConnectionContext::decode(bytes) else {
        return;
    };
    let nets = |texts: &[&str]| -> Vec<IpNet> {
        let parsed = texts.iter().map(|text| text.parse().expect("a prefix"));
        parsed.collect()
    };
    let rules = Rules {
        protected: nets(&CLUSTER),
        ..Rules::default()
    };
    let node = nets(&[NODE]);
    let around = Surroundings {
        domain: None,
        wants_default_route: false,
        peer: None,
        node: &node,
        pod: &[],
    };
    let ours = [nets(&CLUSTER), node.clone()].concat();
    for side in [Side::Client, Side::Endpoint] {
        let ip = context.ip_context.clone().unwrap_or_default();
        if let Some(part) = EndOf::read(&ip, side)
            && rules.admit(&part.proposal(side), &around).is_ok()
        {
            part.check(&ours);
        }
    }
    for config in context.dns_context.iter().flat_map(|dns| &dns.configs) {
        let texts = |texts: &'_ [String]| -> Vec<String> { texts.to_vec() };
        let (servers, search) = (texts(&config.dns_server_ips), texts(&config.search_domains));
        let servers: Vec<&str> = servers.iter().map(String::as_str).collect();
        let search: Vec<&str> = search.iter().map(String::as_str).collect();
        let dns = Dns {
            servers: &servers,
            search: &search,
        };
        if rules.admit_dns(dns, &around).is_ok() {
            let parsed = servers.iter().map(|text| text.parse().expect("admitted"));
            parsed.for_each(|ip: IpAddr| check_net(ip.into(), &ours));
        }
    }
    if let Some(ethernet) = &context.ethernet_context {
        let _ = convert::mac("src_mac", &ethernet.src_mac);
    }
}

/// One end of an IP context, read.
struct EndOf {
    addresses: Vec<IpNet>,
    others: Vec<IpNet>,
    routes: Vec<RouteSpec>,
    extra: Vec<IpNet>,
}

impl EndOf {
    fn read(ip: &IpContext, side: Side) -> Option<Self> {
        let src = convert::addresses("src", &ip.src_ip_addrs).ok()?;
        let dst = convert::addresses("dst", &ip.dst_ip_addrs).ok()?;
        let (addresses, others, routes) = match side {
            Side::Client => (src, dst, &ip.src_routes),
            Side::Endpoint => (dst, src, &ip.dst_routes),
        };
        Some(Self {
            addresses,
            others,
            routes: convert::routes("routes", routes).ok()?,
            extra: convert::addresses("extra", &ip.extra_prefixes).ok()?,
        })
    }

    fn proposal(&self, side: Side) -> Proposal<'_> {
        Proposal {
            side,
            addresses: &self.addresses,
            routes: &self.routes,
            extra: &self.extra,
            others: &self.others,
            neighbours: &[],
        }
    }

    /// What holds of everything that is admitted.
    fn check(&self, ours: &[IpNet]) {
        assert!(self.addresses.len() <= MAX_ADDRESSES && self.routes.len() <= MAX_ROUTES);
        let prefixes = self.routes.iter().map(|route| route.prefix);
        let all = self.addresses.iter().chain(&self.extra).copied();
        all.chain(prefixes)
            .for_each(|net| check_net(net.trunc(), ours));
    }
}

/// A prefix that a pod may have: it is special to nobody, and has no address of ours.
fn check_net(net: IpNet, ours: &[IpNet]) {
    for ip in [net.network(), net.broadcast()] {
        assert!(of_address(ip).is_none(), "{net} is admitted and special");
    }
    for own in ours {
        assert!(
            !own.contains(&net.network()) && !net.contains(&own.addr()),
            "{net} is admitted and overlaps {own}"
        );
    }
}

/// What a registry of another domain answers: the endpoints of one service and their choice.
pub(super) fn registry(bytes: &[u8]) {
    if let Ok(answer) = NetworkServiceEndpointResponse::decode(bytes) {
        let endpoint = answer.network_service_endpoint.unwrap_or_default();
        let _ = endpoint.expiration_time.as_ref().and_then(convert::time);
    }
    let Some((split, rest)) = super::choice(bytes) else {
        return;
    };
    let (service, endpoint) = rest.split_at(usize::from(split).min(rest.len()));
    let (Ok(service), Ok(endpoint)) = (
        NetworkService::decode(service),
        NetworkServiceEndpoint::decode(endpoint),
    ) else {
        return;
    };
    let matches = convert::matches(&service);
    let labels: Vec<&BTreeMap<String, String>> = endpoint
        .network_service_labels
        .values()
        .map(|labels| &labels.labels)
        .collect();
    let candidates: Vec<_> = labels
        .iter()
        .map(|labels| Candidate {
            name: &endpoint.name,
            labels,
        })
        .collect();
    let source = labels
        .first()
        .map(|labels| (*labels).clone())
        .unwrap_or_default();
    for turn in [0, 1, u64::MAX] {
        let mut chosen = select(&matches, &source, &candidates, turn);
        let count = chosen.len();
        chosen.sort_unstable();
        chosen.dedup();
        assert_eq!(chosen.len(), count, "an endpoint is chosen once");
        assert!(chosen.iter().all(|index| *index < candidates.len()));
    }
}

/// The body of a call: frames of gRPC, each with a Request.
pub(super) fn grpc(bytes: &[u8]) {
    const LARGEST: usize = 1 << 12;
    let body = Full::new(Bytes::copy_from_slice(bytes));
    let decoder = SliceCodec::<Connection, NetworkServiceRequest>::default().decoder();
    let mut stream = Streaming::new_request(decoder, body, None, Some(LARGEST));
    let mut decoded = 0;
    while let Some(Ok(Some(request))) = stream.message().now_or_never() {
        assert!(request.encoded_len() <= 2 * LARGEST);
        decoded += 1;
    }
    assert!(
        decoded * 5 <= bytes.len(),
        "a frame has a header of 5 bytes"
    );
}
