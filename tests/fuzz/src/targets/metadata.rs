//! The bodies of HTTP answers about the public address.

use nsm_core::address::public::{
    Provider, kubernetes::external_ip, metadata::front_of_load_balancer,
};

/// An error that a person reads, however long the answer is.
const LONGEST_ERROR: usize = 600;

/// The first byte chooses the service and its status.
pub(super) fn answer(bytes: &[u8]) {
    let Some((choice, body)) = super::choice(bytes) else {
        return;
    };
    let Some(body) = super::text(body) else {
        return;
    };
    let status = [200, 400, 404, 403][usize::from(choice >> 6)];
    let error = match usize::from(choice % 8) {
        cloud @ 0..4 => {
            let header = |_: &str| Some("Google");
            let read = Provider::ALL[cloud].read(status, header, body);
            read.err().map(|error| error.to_string())
        }
        4 => front_of_load_balancer(status, body)
            .err()
            .map(|error| error.to_string()),
        local => {
            let local = (local == 5).then_some(std::net::Ipv4Addr::LOCALHOST.into());
            match external_ip(status, body, "node-1", local) {
                Ok(found) => {
                    let is_v4 = found.map(|ip| ip.is_ipv4());
                    assert!(
                        local.is_none() || is_v4 != Some(false),
                        "of the other family"
                    );
                    None
                }
                Err(error) => Some(error.to_string()),
            }
        }
    };
    if let Some(error) = error {
        assert!(
            error.len() < LONGEST_ERROR,
            "{} bytes: {error}",
            error.len()
        );
    }
}
