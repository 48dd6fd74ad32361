//! Mutual TLS between all processes of two trust domains.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{CIDR, PATIENCE, Pair, REMOTE_SERVICE, SERVICE, Served, metrics, trust::Trust};
use nsm_spiffe::{Authority, Wanted};
use nsm_world::{Agent, Client, Cloud, Node, binary};
use serde_json::Value;

/// The trust domains; what they are called has nothing to do with the names of the domains.
const DOMAINS: [&str; 2] = ["trust-1.example", "trust-2.example"];

/// The pods of the agents.
const AGENTS: [&str; 2] = ["proxy-nsmgr-1", "proxy-nsmgr-2"];

/// Two domains whose processes speak TLS.
struct Secured {
    trust: Trust,
    served: Served,
}

impl Secured {
    fn start(name: &str) -> Result<Self> {
        let world = Pair::world(name, Cloud::Packet, 1)?;
        let trust = Trust::of(&world, &DOMAINS)?;
        let program = binary("proxy-nsmgr")?;
        let start = |n: usize, node: &str, name: &str, other: &str| -> Result<Agent> {
            let node: Node = world.node(node)?;
            let mut outcome = Ok(());
            let agent = Agent::start(&world, &node, &program, |command| {
                outcome = trust.give_agent(command, n, name, (other, 1 - n));
            })?;
            outcome?;
            Ok(agent)
        };
        let near = start(0, "node-1", AGENTS[0], "cluster-2.example")?;
        let far = start(1, "node-2", AGENTS[1], "cluster-1.example")?;
        near.wait_ready()?;
        far.wait_ready()?;
        let pair = Pair { near, far, world };
        let pod = pair.world.pod("endpoint")?;
        let mut outcome = Ok(());
        let endpoint = pair
            .far
            .endpoint(&pair.world, &pod, SERVICE, CIDR, |command| {
                outcome = trust.give(command, 1, "nse");
            })?;
        outcome?;
        let before = pair.footprint()?;
        let served = Served {
            endpoint,
            before,
            pair,
        };
        Ok(Self { trust, served })
    }

    /// A client that shows what `adjust` gives it.
    fn client(&self, adjust: impl FnOnce(&mut Command) -> Result<()>) -> Result<Client> {
        let pair = &self.served.pair;
        let mut outcome = Ok(());
        let pod = pair.client_pod(0)?;
        let client = pair
            .near
            .connect(&pair.world, &pod, REMOTE_SERVICE, |command| {
                outcome = adjust(command);
            })?;
        outcome?;
        Ok(client)
    }

    /// What a client says that must be refused.
    fn refused(&self, adjust: impl FnOnce(&mut Command) -> Result<()>) -> Result<String> {
        let client = self.client(adjust)?;
        let status = client.process.wait(PATIENCE)?;
        let said = client.process.stderr();
        ensure!(!status.success(), "it was not refused: {said}");
        Ok(said)
    }
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn two_trust_domains_are_joined_in_mutual_tls() -> Result<()> {
    let secured = Secured::start("mtls")?;
    let pair = &secured.served.pair;
    let client = secured.client(|command| secured.trust.give(command, 0, "nsc"))?;
    let connected = client.wait_for_event("connected", PATIENCE)?;
    pair.assert_pings(0, &connected, 5)?;

    let status = pair.near.status()?;
    assert_eq!(
        status["identity"]["spiffe_id"],
        "spiffe://trust-1.example/ns/nsm-system/pod/proxy-nsmgr-1"
    );
    assert_eq!(status["identity"]["insecure"], false);
    let ids = |status: &Value| -> Vec<String> {
        let peers = status["peers"].as_array().into_iter().flatten();
        peers
            .filter_map(|peer| peer["spiffe_id"].as_str())
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(
        ids(&status),
        ["spiffe://trust-2.example/ns/nsm-system/pod/proxy-nsmgr-2"]
    );
    assert_eq!(
        ids(&pair.far.status()?),
        ["spiffe://trust-2.example/ns/nsm-system/pod/nse"]
    );
    secured.served.close([client])
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn certificates_that_are_not_to_be_believed_are_named_and_counted() -> Result<()> {
    let secured = Secured::start("strangers")?;
    let trust = &secured.trust;
    let id = trust.authorities[0].id("nsc");
    let stranger = Authority::of("trust-3.example");
    let wanted = |change: fn(&mut Wanted)| {
        let mut wanted = Wanted::of(&id);
        change(&mut wanted);
        trust.authorities[0].issue(&wanted)
    };
    let shown = [
        ("unknown_trust_domain", stranger.svid("nsc")),
        ("untrusted", Authority::of(DOMAINS[0]).svid("nsc")),
        (
            "expired",
            wanted(|it| {
                it.begins = -60;
                it.ends = -1;
            }),
        ),
    ];
    let near = &secured.served.pair.near;
    for (n, (reason, issued)) in shown.iter().enumerate() {
        let said = secured.refused(|command| trust.show(command, issued, &format!("bad-{n}")))?;
        ensure!(said.contains("certificate"), "{reason}: {said}");
        let labels = [
            "side=\"server\"".to_owned(),
            format!("outcome=\"{reason}\""),
        ];
        let page = metrics::page(near)?;
        let refusals = metrics::value(&page, "proxy_nsmgr_tls_handshakes_total", &labels)?;
        ensure!(refusals >= 1.0, "{reason}: {refusals}");
    }
    let said = secured.refused(|_| Ok(()))?;
    ensure!(said.contains("TLS"), "{said}");
    let log = near.process.stderr();
    let lines = log
        .lines()
        .filter(|line| line.contains("refused a connection"));
    // One peer, one minute.
    assert_eq!(lines.count(), 1, "{log}");
    secured.served.assert_as_before()
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn an_svid_is_renewed_under_a_connection() -> Result<()> {
    let secured = Secured::start("renewal")?;
    let pair = &secured.served.pair;
    let client = secured.client(|command| secured.trust.give(command, 0, "nsc"))?;
    let connected = client.wait_for_event("connected", PATIENCE)?;
    for (n, name) in AGENTS.into_iter().enumerate() {
        secured.trust.renew(n, name)?;
    }
    for agent in [&pair.near, &pair.far] {
        nsm_world::wait_until("the renewed SVID", PATIENCE, || {
            agent
                .status()
                .is_ok_and(|it| it["identity"]["generation"] == 2)
        })
        .context("renewal")?;
    }
    pair.assert_pings(0, &connected, 5)?;
    let second = secured.client(|command| {
        command.args(["--interface", "nsm-2"]);
        secured.trust.give(command, 0, "nsc")
    })?;
    second.wait_for_event("connected", PATIENCE)?;
    secured.served.close([second, client])
}
