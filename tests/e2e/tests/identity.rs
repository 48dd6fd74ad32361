//! Mutual TLS between all processes of two trust domains.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{CIDR, PATIENCE, Pair, REMOTE_SERVICE, SERVICE, Served, metrics, trust::Trust};
use nsm_spiffe::{Authority, Wanted};
use nsm_world::{Agent, Client, Cloud, Node, Process, Signal, World, binary};
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

/// What of a domain is hidden, and who does not speak for a domain: refused, counted, and what stood is closed.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_policy_that_is_read_again_decides_on_what_stands() -> Result<()> {
    let secured = Secured::start("policy")?;
    let pair = &secured.served.pair;
    let client = secured.client(|command| secured.trust.give(command, 0, "nsc"))?;
    client.wait_for_event("connected", PATIENCE)?;

    let write = |name: &str, text: &str| {
        let file = pair.world.run_dir().join(format!("{name}-policy.yaml"));
        nsm_spiffe::replace(&file, text)
    };
    let near = "domains: [{domain: cluster-1.example, trust_domain: trust-1.example}]\n";
    write(AGENTS[1], near)?;
    pair.far.process.signal(Signal::SIGHUP);
    let stands = |agent: &Agent| -> Result<usize> {
        let status = agent.status()?;
        Ok(status["connections"].as_array().map_or(0, Vec::len))
    };
    nsm_world::wait_until("the end of the connection", PATIENCE, || {
        stands(&pair.far).is_ok_and(|count| count == 0)
    })?;
    let said = secured.refused(|command| {
        command.args(["--interface", "nsm-2"]);
        secured.trust.give(command, 0, "nsc-2")
    })?;
    ensure!(said.contains("no network service"), "{said}");
    let counted = |agent: &Agent, rule: &str| {
        let labels = [format!("rule=\"{rule}\"")];
        metrics::value(
            &metrics::page(agent)?,
            "proxy_nsmgr_identity_refusals_total",
            &labels,
        )
    };
    ensure!(counted(&pair.far, "services")? >= 1.0);

    // Another trust domain is said to speak for the domain: its agent does not.
    let far = "domains: [{domain: cluster-2.example, trust_domain: trust-1.example}]\n";
    write(AGENTS[0], far)?;
    pair.near.process.signal(Signal::SIGHUP);
    let refused = nsm_world::wait_until("the new policy", PATIENCE, || {
        secured
            .refused(|command| {
                command.args(["--interface", "nsm-3"]);
                secured.trust.give(command, 0, "nsc-3")
            })
            .is_ok_and(|said| said.contains("speaks for cluster-2.example"))
    });
    refused?;
    ensure!(counted(&pair.near, "server")? >= 1.0);
    drop(client);
    Ok(())
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

/// Two domains, whose processes have their SVIDs from Workload APIs; all of them renew each second.
struct Renewed {
    pair: Pair,
    _endpoint: nsm_world::Endpoint,
    api: Process,
    start_api: StartApi,
}

/// Starts the Workload APIs of a world.
type StartApi = Box<dyn Fn(&World) -> Result<Process>>;

/// Clients at one time.
const CLIENTS: usize = 8;

impl Renewed {
    fn start(name: &str) -> Result<Self> {
        let world = Pair::world(name, Cloud::Packet, CLIENTS)?;
        let trust = Trust::of(&world, &DOMAINS)?;
        let workloads =
            [(0, AGENTS[0]), (1, AGENTS[1]), (0, "nsc"), (1, "nse")].map(|(n, name)| {
                format!(
                    "{name}={}",
                    trust.authorities[n].id(&format!("ns/nsm-system/pod/{name}"))
                )
            });
        let (folder, program) = (world.run_dir().to_owned(), binary("nsm-spiffe")?);
        let start_api = move |world: &World| -> Result<Process> {
            let mut command = Command::new(&program);
            command.arg(&folder).args(["20", "1000"]).args(&workloads);
            let api = world.spawn("workload-api", command)?;
            api.wait_for("its sockets", PATIENCE, |line| {
                (line == "serving").then_some(())
            })?;
            Ok(api)
        };
        let api = start_api(&world)?;
        let program = binary("proxy-nsmgr")?;
        let start = |n: usize, node: &str, other: &str| -> Result<Agent> {
            let mut outcome = Ok(());
            let agent = Agent::start(&world, &world.node(node)?, &program, |command| {
                outcome = trust.give_policy(command, AGENTS[n], (other, 1 - n));
                from_api(command, &world, AGENTS[n]);
            })?;
            outcome?;
            Ok(agent)
        };
        let near = start(0, "node-1", "cluster-2.example")?;
        let far = start(1, "node-2", "cluster-1.example")?;
        near.wait_ready()?;
        far.wait_ready()?;
        let pod = world.pod("endpoint")?;
        let endpoint = far.endpoint(&world, &pod, SERVICE, CIDR, |command| {
            from_api(command, &world, "nse");
        })?;
        Ok(Self {
            pair: Pair { near, far, world },
            _endpoint: endpoint,
            api,
            start_api: Box::new(start_api),
        })
    }

    fn client(&self, n: usize) -> Result<Client> {
        let Pair { near, world, .. } = &self.pair;
        let pod = self.pair.client_pod(n)?;
        Ok(near.connect(world, &pod, REMOTE_SERVICE, |command| {
            from_api(command, world, "nsc");
        })?)
    }

    fn generation(&self) -> Result<u64> {
        let status = self.pair.near.status()?;
        status["identity"]["generation"]
            .as_u64()
            .context("no generation")
    }
}

fn from_api(command: &mut Command, world: &World, name: &str) {
    let socket = world.run_dir().join(format!("{name}.sock"));
    command.args([
        "--identity-workload-api",
        &format!("unix://{}", socket.display()),
    ]);
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn svids_that_are_renewed_each_second_fail_no_request() -> Result<()> {
    let renewed = Renewed::start("each-second")?;
    let before = renewed.generation()?;
    let mut rounds = 0;
    // Eight at a time, until the SVID was renewed ten times under them.
    while renewed.generation()? < before + 10 {
        let clients = (0..CLIENTS)
            .map(|n| renewed.client(n))
            .collect::<Result<Vec<_>>>()?;
        for client in &clients {
            client.wait_for_event("connected", PATIENCE)?;
        }
        for client in &clients {
            nsm_e2e::close(client)?;
        }
        rounds += 1;
    }
    println!(
        "{rounds} rounds of {CLIENTS} Requests, {} renewals",
        renewed.generation()? - before
    );
    renewed.pair.assert_quiet()
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_workload_api_that_goes_and_comes_back_costs_no_connection() -> Result<()> {
    let renewed = Renewed::start("api-away")?;
    let pair = &renewed.pair;
    let client = renewed.client(0)?;
    let connected = client.wait_for_event("connected", PATIENCE)?;
    renewed.api.terminate(PATIENCE)?;
    let left = renewed.generation()?;
    // What the agents have is good meanwhile.
    let refreshed = nsm_e2e::nth_event(&client, "refreshed", 1);
    ensure!(refreshed.is_ok(), "{}", client.process.stdout());
    pair.assert_pings(0, &connected, 5)?;
    assert_eq!(renewed.generation()?, left);
    let _api = (renewed.start_api)(&pair.world)?;
    nsm_world::wait_until("another SVID", PATIENCE, || {
        renewed.generation().is_ok_and(|now| now > left)
    })?;
    Ok(())
}
