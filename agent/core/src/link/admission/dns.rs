//! DNS of a context: servers that the pod would ask, and names that it would ask them for.

use std::net::IpAddr;

use super::{Inadmissible, Part, Rules, Side, Surroundings, check_count};

/// DNS servers and search domains of a connection. Each costs the pod's resolver a question.
const MAX_DNS: usize = 16;

/// What a context has of DNS, as it stands there.
#[derive(Debug, Clone, Copy)]
pub struct Dns<'a> {
    /// Addresses of servers.
    pub servers: &'a [&'a str],
    /// Search domains.
    pub search: &'a [&'a str],
}

impl Rules {
    /// Decides on the DNS that a client would get.
    ///
    /// # Errors
    /// The first rule that refuses it.
    pub fn admit_dns(&self, dns: Dns<'_>, around: &Surroundings<'_>) -> Result<(), Inadmissible> {
        check_count("DNS servers", dns.servers.len(), MAX_DNS)?;
        check_count("DNS search domains", dns.search.len(), MAX_DNS)?;
        for &server in dns.servers {
            let ip = server
                .parse::<IpAddr>()
                .map_err(|_| Inadmissible::NotAnAddress {
                    field: "dns_server_ips",
                    value: server.to_owned(),
                })?;
            self.check(Part::DnsServer(ip), Side::Client, around)?;
        }
        for &name in dns.search {
            self.check_search(name)?;
        }
        Ok(())
    }

    fn check_search(&self, name: &str) -> Result<(), Inadmissible> {
        let bare = name.trim_matches('.').to_ascii_lowercase();
        let takes = |domain: &str| {
            // The root, and what holds the domain, takes its names too.
            bare.is_empty() || is_within(&bare, domain) || is_within(domain, &bare)
        };
        let taken = self
            .dns_domains
            .iter()
            .find(|domain| takes(domain.as_str().trim_matches('.')));
        // A resolver's file separates names by blanks and entries by lines.
        if name.chars().any(|it| it.is_whitespace() || it.is_control()) {
            return Err(Inadmissible::DnsName {
                name: name.to_owned(),
            });
        }
        match taken {
            Some(domain) => Err(Inadmissible::DnsDomain {
                name: name.to_owned(),
                domain: domain.clone(),
            }),
            None => Ok(()),
        }
    }
}

/// Whether a name is `domain` or ends with it.
fn is_within(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}
