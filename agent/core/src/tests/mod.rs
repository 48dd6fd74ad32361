//! Tests of the rules that other crates call, one file a module.

mod access;
mod admission;
mod card;
mod chain;
mod expiry;
mod heal;
mod health;
mod ipmap;
mod mechanism;
mod name;
mod path;
mod peer_report;
mod peer_url;
mod plpmtu;
mod policy;
mod prefix;
mod public_address;
mod registry;
mod relay;
mod sbfd;
mod select;
mod share;
mod spiffe_id;
mod users;
mod vni_pool;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    clock::Monotonic,
    liveness::{Evidence, Health, PathId, Reflector, judge, sbfd::Discriminator},
    net::Vni,
};

fn path_id() -> PathId {
    PathId {
        address: [203, 0, 113, 2].into(),
        port: 4789,
        reflector: Reflector {
            discriminator: Discriminator::new(7).expect("not 0"),
            vni: Vni::MANAGEMENT,
        },
    }
}

/// The health that evidence shows when it is collected at `now`.
fn judge_at(evidence: &Evidence, now: Monotonic) -> Health {
    judge(&Evidence {
        at: now,
        ..*evidence
    })
}

/// A moment to count from: no test reads the clock.
fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}
