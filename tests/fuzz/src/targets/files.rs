//! Files: the configuration, and what other components of a cluster write.

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
