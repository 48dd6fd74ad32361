//! Input that is wrong: the client gets the cause quickly, and nothing is left behind.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nsm_e2e::{PATIENCE, REMOTE_SERVICE, SERVICE, Served};
use nsm_world::{Cloud, Fault, NameFault, patient};

/// Much less than a Request's own deadline: a cause that is known at once is answered at once.
const QUICKLY: Duration = Duration::from_secs(8);

/// The Request's deadline in these scenarios, and what ends with it.
const DEADLINE: &str = "2s";

fn assert_said(said: &str, words: &[&str]) -> Result<()> {
    let lower = said.to_lowercase();
    for word in words {
        ensure!(
            lower.contains(&word.to_lowercase()),
            "{word:?} is not in: {said}"
        );
    }
    Ok(())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn names_and_services_that_do_not_exist() -> Result<()> {
    let pair = Served::start("names", Cloud::Packet, 1)?;

    for name in ["@x", "a@", "a@b@c"] {
        assert_said(&pair.refused(name, QUICKLY, |_| {})?, &[name])?;
    }
    let label = format!("a@{}.example", "l".repeat(64));
    pair.refused(&label, QUICKLY, |_| {})?;
    assert_said(
        &pair.refused("icmp-responder@nowhere.example", QUICKLY, |_| {})?,
        &["nowhere.example"],
    )?;
    assert_said(
        &pair.refused("no-such-service@cluster-2.example", QUICKLY, |_| {})?,
        &["no-such-service"],
    )?;
    assert_said(
        &pair.refused("no-such-service", QUICKLY, |_| {})?,
        &["no-such-service"],
    )?;
    pair.assert_as_before()
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn dns_that_fails_is_named_with_question_and_server() -> Result<()> {
    let pair = Served::start("dns-fails", Cloud::Packet, 1)?;
    for (domain, fault) in [
        ("servfail.example", NameFault::ServFail),
        ("refused.example", NameFault::Refused),
        ("silent.example", NameFault::Silent),
    ] {
        pair.world.dns().fail(domain, fault)?;
        for prefix in ["registry", "nsmgr-proxy"] {
            pair.world
                .dns()
                .fail(&format!("{prefix}.nsm-system.{domain}"), fault)?;
        }
        let said = pair.refused(&format!("{SERVICE}@{domain}"), PATIENCE, |_| {})?;
        assert_said(&said, &[domain, "192.0.2.53"])?;
    }
    pair.assert_as_before()
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_silent_peer_is_bounded_by_the_deadline() -> Result<()> {
    let pair = Served::start("silent", Cloud::Packet, 1)?;
    let (near, far) = (pair.near.node(), pair.far.node());
    let silence = pair.world.inject(far, near, Fault::DropAll)?;
    let start = Instant::now();
    let said = pair.refused(REMOTE_SERVICE, PATIENCE, |command| {
        command.args(["--timeout", DEADLINE]);
    })?;
    ensure!(
        start.elapsed() < patient(QUICKLY),
        "took {:?}: {said}",
        start.elapsed()
    );
    silence.heal();
    // Once the peer is back, the same question has an answer.
    let (client, _) = pair.connect(0)?;
    pair.close([client])
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_namespace_that_is_none_and_an_interface_that_is_taken() -> Result<()> {
    let mut pair = Served::start("netns", Cloud::Packet, 1)?;
    let pod = pair.client_pod(0)?;
    let made = pod
        .command("ip")?
        .args([
            "link", "add", "taken", "type", "veth", "peer", "name", "spare",
        ])
        .status()?;
    ensure!(made.success(), "ip link add failed");
    pair.before = pair.footprint()?;

    let said = pair.refused(REMOTE_SERVICE, QUICKLY, |command| {
        command.args(["--interface", "taken"]);
    })?;
    assert_said(&said, &["taken"])?;
    let said = pair.refused(REMOTE_SERVICE, QUICKLY, |command| {
        command.args(["--interface", "much-too-long-a-name"]);
    })?;
    assert_said(&said, &["much-too-long-a-name"])?;

    let mut nowhere = pair
        .near
        .node()
        .command(nsm_world::binary("proxy-nsmgr")?)?;
    nowhere.args([
        "connect",
        REMOTE_SERVICE,
        "--connect-to",
        &pair.near.nsmgr_url(),
    ]);
    nowhere.args(["--netns", "/etc/hostname"]);
    let client = pair.world.spawn("nowhere", nowhere)?;
    ensure!(
        !client.wait(QUICKLY)?.success(),
        "a file was taken for a namespace"
    );
    assert_said(&client.stderr(), &["/etc/hostname"])?;
    pair.assert_as_before()
}
