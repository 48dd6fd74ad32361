//! Kinds of values that hold address prefixes.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use nsm_core::nsm::name::Domain;
use serde_json::Value;

use super::{
    node::{Bad, Node},
    table::{Kind, Shape},
};

/// A prefix, or an address as the prefix of one host.
pub(super) fn prefix() -> Kind<IpNet> {
    Kind::one("PREFIX", Shape::Text, parse_prefix, IpNet::to_string)
}

/// Each domain with its prefixes.
pub(super) fn domain_prefixes() -> Kind<BTreeMap<Domain, Vec<IpNet>>> {
    Kind::new("DOMAIN=PREFIX,…", Shape::Map, read, |domains| {
        let entry = |(domain, prefixes): (&Domain, &Vec<IpNet>)| {
            let prefixes: Vec<String> = prefixes.iter().map(IpNet::to_string).collect();
            (domain.to_string(), Value::from(prefixes))
        };
        Value::Object(domains.iter().map(entry).collect())
    })
}

fn parse_prefix(text: &str) -> Result<IpNet, &'static str> {
    let net = text.parse::<IpNet>().ok();
    let net = net.or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    net.map(|net| net.trunc())
        .ok_or("a prefix such as 10.0.0.0/8 or fd00::/8")
}

/// A domain that comes again adds a prefix.
fn read(node: &Node) -> Result<BTreeMap<Domain, Vec<IpNet>>, Bad> {
    let mut domains: BTreeMap<Domain, Vec<IpNet>> = BTreeMap::new();
    for (name, node) in node.pairs()? {
        let domain = Node::text(&name).at(node.line).parse(str::parse)?;
        let prefix = node.parse(parse_prefix)?;
        domains.entry(domain).or_default().push(prefix);
    }
    Ok(domains)
}
