//! Tests of the rules that other crates call, one file a module.

mod card;
mod expiry;
mod heal;
mod health;
mod ipmap;
mod mechanism;
mod name;
mod path;
mod plpmtu;
mod policy;
mod prefix;
mod public_address;
mod registry;
mod sbfd;
mod select;
mod told;
mod vni_pool;

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

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
