//! The files that an agent reads, as functions of their text.
//!
//! Each reader gives what the file says, or an error for people that does not name the file: the caller has its path.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::Context as _;
use ipnet::IpNet;
use nsm_core::{address::ipmap::IpMap, identity::access::Rules};

use crate::config;

/// What a configuration file says, over the defaults.
#[derive(Debug, Clone)]
pub struct Configuration(config::Loaded);

impl Configuration {
    /// The configuration as a file that gives the same one, but for a secret, which is hidden.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        self.0.to_yaml()
    }
}

impl PartialEq for Configuration {
    /// Whether both have the same values, wherever those stand. That a file names the default of the IP map makes no difference here.
    fn eq(&self, other: &Self) -> bool {
        let named = |of: &Self| {
            let mut config = of.0.config.clone();
            config.map_ip_file.is_required = true;
            config
        };
        named(self) == named(other)
    }
}

/// Reads a configuration file.
///
/// # Errors
/// The text is no YAML, or has wrong keys or values: all of them, each with its line.
pub fn configuration(text: &str) -> anyhow::Result<Configuration> {
    Ok(Configuration(config::of_text(text)?))
}

/// Reads NSM's `excluded_prefixes.yaml`: the list below its only key, `prefixes` in any case.
///
/// # Errors
/// The text is no such list, or a prefix is none.
pub fn excluded_prefixes(text: &str) -> anyhow::Result<Vec<IpNet>> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let lists: BTreeMap<String, Option<Vec<String>>> = serde_saphyr::from_str(text)?;
    let is_meant = |key: &str| key.eq_ignore_ascii_case("prefixes");
    let lists = lists.into_iter().filter(|(key, _)| is_meant(key));
    lists
        .flat_map(|(_, list)| list.unwrap_or_default())
        .map(|text| {
            let net: IpNet = text
                .parse()
                .with_context(|| format!("`{text}` is no prefix"))?;
            Ok(net.trunc())
        })
        .collect()
}

/// Reads NSM's `map-ip.yaml`: a line `internal: external` for each node.
///
/// # Errors
/// The text is no such map, an address is none, or two nodes have one external address.
pub fn ip_map(text: &str) -> anyhow::Result<IpMap> {
    if text.trim().is_empty() {
        return Ok(IpMap::default());
    }
    let pairs: BTreeMap<String, String> =
        serde_saphyr::from_str(text).context("it is not a list of `internal: external`")?;
    let pairs = pairs
        .iter()
        .map(|(internal, external)| Ok((address(internal)?, address(external)?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok(IpMap::from_pairs(pairs)?)
}

/// Reads a policy: who may do what by the id in a certificate. An empty text has no rules.
///
/// # Errors
/// The text is no policy; the error has line and column.
pub fn policy(text: &str) -> anyhow::Result<Rules> {
    let rules: Option<Rules> = serde_saphyr::from_str(text)?;
    Ok(rules.unwrap_or_default())
}

fn address(text: &str) -> anyhow::Result<IpAddr> {
    text.parse()
        .with_context(|| format!("`{text}` is no IP address"))
}
