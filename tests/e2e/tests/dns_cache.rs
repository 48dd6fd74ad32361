//! A domain's addresses are asked for once per TTL, and a changed address is noticed.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::Result;
use nsm_e2e::{PATIENCE, Pair, Served, close};
use nsm_world::{Cloud, wait_until};

/// How often each question was asked.
fn questions(pair: &Pair) -> Result<BTreeMap<(String, String), usize>> {
    let mut count = BTreeMap::new();
    for query in pair.world.dns().queries()? {
        *count.entry((query.name, query.kind)).or_default() += 1;
    }
    Ok(count)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_second_client_asks_nothing_until_the_ttl_has_passed() -> Result<()> {
    let pair = Pair::start("cache", Cloud::Packet, 3)?;
    let dns = pair.world.dns();
    dns.set_srv(
        &nsm_world::registry_name("cluster-2.example"),
        5005,
        "target.example",
    )?;
    dns.set_srv(
        &nsm_world::proxy_name("cluster-2.example"),
        5006,
        "target.example",
    )?;
    dns.set_addresses("target.example", &[pair.far.node().public_ip().into()])?;
    // Two clients connect within it, on an emulated processor as well.
    let ttl = Duration::from_secs(5);
    for name in [
        "target.example",
        "cluster-2.example",
        &nsm_world::registry_name("cluster-2.example"),
        &nsm_world::proxy_name("cluster-2.example"),
    ] {
        dns.set_ttl(name, ttl.as_secs() as u32)?;
    }
    let pair = Served::by(pair)?;

    let before_first = Instant::now();
    let (first, _) = pair.connect(0)?;
    let after_first = questions(&pair)?;
    let (second, connected) = pair.connect(1)?;
    assert_eq!(
        questions(&pair)?,
        after_first,
        "the second client's questions were cached"
    );
    pair.assert_pings(1, &connected, 1)?;

    // Close and connect again until the cache has aged.
    let srv = (
        nsm_world::registry_name("cluster-2.example"),
        "SRV".to_owned(),
    );
    wait_until("the question to be asked again", PATIENCE, || {
        let asked = |pair: &Pair| questions(pair).map(|count| count.get(&srv).copied());
        pair.connect(2)
            .is_ok_and(|(client, _)| close(&client).is_ok())
            && asked(&pair).is_ok_and(|count| count > after_first.get(&srv).copied())
    })?;
    // The first question came after this, so that the time since is never less than the age of its answer.
    let since = before_first.elapsed();
    assert!(
        since >= ttl,
        "asked again {since:?} after the first question, whose answer held for {ttl:?}"
    );

    pair.close([first, second])
}
