//! Files: the configuration, and what other components of a cluster write.

use nsm_core::{
    identity::{
        SpiffeId,
        access::{Access, Ask},
    },
    nsm::name::Domain,
};
use proxy_nsmgr::files;

/// How a printed configuration shows a secret.
const HIDDEN: &str = "# hidden";

/// A configuration is printed as a file that gives the same configuration.
pub(super) fn configuration(bytes: &[u8]) {
    let Some(text) = super::text(bytes) else {
        return;
    };
    let Ok(read) = files::configuration(text) else {
        return;
    };
    let printed = read.to_yaml();
    let again = files::configuration(&printed);
    let again = again.unwrap_or_else(|error| panic!("{printed}\n{error:#}"));
    assert!(read == again || printed.contains(HIDDEN), "{printed}");
}

/// NSM's list of excluded prefixes.
pub(super) fn excluded_prefixes(bytes: &[u8]) {
    let Some(text) = super::text(bytes) else {
        return;
    };
    for net in files::excluded_prefixes(text).unwrap_or_default() {
        assert_eq!(net, net.trunc(), "a prefix without bits of a host");
    }
}

/// NSM's map of addresses. What is translated out is translated back.
pub(super) fn ip_map(bytes: &[u8]) {
    let Some(text) = super::text(bytes) else {
        return;
    };
    let Ok(map) = files::ip_map(text) else {
        return;
    };
    let addresses = text.split(|c: char| c.is_whitespace() || matches!(c, '"' | '\''));
    for ip in addresses.filter_map(|word| word.trim_end_matches(':').parse().ok()) {
        if let Some(external) = map.get(ip) {
            assert_eq!(map.internal(external), ip, "{ip} is {external} outside");
        }
    }
}

/// A policy. What is read holds together or is refused, and answers for any id.
pub(super) fn policy(bytes: &[u8]) {
    let Some(text) = super::text(bytes) else {
        return;
    };
    let Ok(rules) = files::policy(text) else {
        return;
    };
    let own: Domain = "one.example".parse().expect("a domain");
    let trust_domain = "td-1".parse().expect("a trust domain");
    let is_whole = rules.check(&own).is_ok();
    let access = Access::new(own, trust_domain, rules);
    assert_eq!(access.is_ok(), is_whole);
    let Ok(access) = access else {
        return;
    };
    for id in ["spiffe://td-1/ns/nsm-system/pod/nsmgr-x", "spiffe://td-2/a"] {
        let id: SpiffeId = id.parse().expect("an id");
        let _ = access.check_caller(&id, Ask::Follow);
        let _ = access.sees(&id, "service");
        assert_eq!(access.workload(&id, &id), access.workload(&id, &id));
    }
}
