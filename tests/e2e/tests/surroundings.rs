//! Nodes that lack something: a port that is taken, no BPF, no rights, a peer that is not there.

use std::{net::UdpSocket, process::Command};

use anyhow::{Result, ensure};
use nsm_e2e::{CIDR, PATIENCE, Pair, REMOTE_SERVICE, SERVICE, Served, close, health, started};
use nsm_world::{Agent, Cloud, Node, Pod, binary, wait_until};
use serde_json::Value;

/// The main job in short; returns the near agent's status while the connection stood.
fn connects(pair: &Pair) -> Result<Value> {
    let _endpoint = pair.endpoint()?;
    let (client, connected) = pair.connect(0)?;
    pair.assert_pings(0, &connected, 5)?;
    let status = pair.near.status()?;
    close(&client)?;
    Ok(status)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn the_tunnels_port_is_taken_by_another_program() -> Result<()> {
    let world = Pair::world("taken", Cloud::Packet, 1)?;
    // Before the agent, whose management link has the port from the start.
    let holder = world
        .node("node-1")?
        .inside(|| UdpSocket::bind("0.0.0.0:4789"))??;
    let mut pair = Served::by(Pair::start_in(world)?)?;
    // The holder is this process.
    let own = std::process::id().to_string();
    let degraded = pair.near.status()?["degraded"].to_string();
    for word in ["no probes", "4789", "in use", &own] {
        ensure!(degraded.contains(word), "{word:?} is not in: {degraded}");
    }
    let said = pair.refused(REMOTE_SERVICE, PATIENCE, |_| {})?;
    for word in ["4789", "in use", &own] {
        ensure!(said.contains(word), "{word:?} is not in: {said}");
    }
    pair.assert_as_before()?;
    drop(holder);
    // The health plane comes back by itself, whether a tunnel has the port first or not.
    let (meanwhile, _) = pair.connect(0)?;
    wait_until("the agent to probe", PATIENCE, || {
        let status = pair.near.status();
        status.is_ok_and(|it| !it["degraded"].to_string().contains("no probes"))
    })?;
    close(&meanwhile)?;
    // With what the health plane itself holds.
    pair.before = pair.footprint()?;
    let (client, _) = pair.connect(0)?;
    for agent in [&pair.near, &pair.far] {
        health(agent, "the path to be proved", |it| it["state"] == "up")?;
    }
    pair.close([client])?;
    pair.assert_nothing_left()
}

/// What each try makes, it takes away.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn an_agent_that_never_got_the_port_leaves_nothing() -> Result<()> {
    let world = Pair::world("never", Cloud::Packet, 1)?;
    let holder = world
        .node("node-1")?
        .inside(|| UdpSocket::bind("0.0.0.0:4789"))??;
    let pair = Pair::start_in(world)?;
    let degraded = pair.near.status()?["degraded"].to_string();
    ensure!(degraded.contains("no probes"), "{degraded}");
    pair.assert_nothing_left()?;
    drop(holder);
    Ok(())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn clsact_does_what_tcx_does() -> Result<()> {
    let world = Pair::world("clsact", Cloud::Packet, 1)?;
    let pair = Pair::start_with(world, |command| {
        command.args(["--bpf-hook", "clsact"]);
    })?;
    let status = connects(&pair)?;
    assert_eq!(status["bpf"]["hook"], "clsact");
    let counters = &status["connections"][0]["tunnel"]["counters"];
    ensure!(counters["rx_packets"].as_u64() >= Some(5), "{status}");
    pair.assert_quiet()?;
    pair.assert_nothing_left()
}

/// clsact finds an `ingress` qdisc in its place: connections work, sources are checked, and `status` says what is missing and what to
/// do about it. Once that is done, nothing is missing.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn an_ingress_qdisc_in_the_place_of_clsact_is_no_secret() -> Result<()> {
    let world = Pair::world("ingress-qdisc", Cloud::Packet, 1)?;
    let node = world.node("node-1")?;
    let interface = node.interface();
    let tc = |words: &str| -> Result<()> {
        let mut command = node.command("tc")?;
        let status = command.args(words.split(' ')).arg(interface).arg("ingress");
        ensure!(status.status()?.success(), "tc {words} {interface} ingress");
        Ok(())
    };
    tc("qdisc add dev")?;
    let program = binary("proxy-nsmgr")?;
    let start = |node: &str| {
        Agent::start(&world, &world.node(node)?, &program, |command| {
            command.args(["--bpf-hook", "clsact"]);
        })
    };
    let (near, far) = (start("node-1")?, start("node-2")?);
    near.wait_ready()?;
    far.wait_ready()?;
    let pair = Pair { near, far, world };
    let status = connects(&pair)?;
    let degraded = status["degraded"].to_string();
    let command = format!("tc qdisc del dev {interface} ingress");
    for word in ["not counted", &command] {
        ensure!(degraded.contains(word), "{word:?} is not in: {degraded}");
    }
    let counters = &status["connections"][0]["tunnel"]["counters"];
    ensure!(counters["rx_packets"].as_u64() >= Some(5), "{status}");

    tc("qdisc del dev")?;
    wait_until("clsact to be there", PATIENCE, || {
        let status = pair.near.status();
        status.is_ok_and(|it| !it["degraded"].to_string().contains("qdisc"))
    })?;
    let status = connects(&pair)?;
    let counters = &status["connections"][0]["tunnel"]["counters"];
    ensure!(counters["tx_packets"].as_u64() >= Some(5), "{status}");
    pair.assert_quiet()
}

#[test]
#[ignore = "needs root: namespaces, links"]
fn without_bpf_the_agent_says_so_and_connects_no_pod() -> Result<()> {
    let world = Pair::world("no-bpf", Cloud::Packet, 1)?;
    let pair = Pair::start_with(world, |command| {
        command.args(["--bpf-enabled", "false"]);
    })?;
    let degraded = pair.near.status()?["degraded"].to_string();
    ensure!(degraded.contains("bpf.enabled"), "{degraded}");
    let said = pair.refused(REMOTE_SERVICE, PATIENCE, |_| {})?;
    println!("{said}");
    ensure!(
        pair.client_pod(0)?
            .links()?
            .iter()
            .all(|link| link.name == "lo")
    );
    pair.assert_quiet()
}

#[test]
#[ignore = "needs root: namespaces"]
fn without_rights_the_missing_capability_is_named() -> Result<()> {
    let world = Pair::world("no-rights", Cloud::Packet, 1)?;
    let node = world.node("node-1")?;
    let agent = Agent::command(&node, &binary("proxy-nsmgr")?)?;
    let mut powerless = node.command("setpriv")?;
    powerless.args(["--bounding-set=-all", "--inh-caps=-all"]);
    powerless.arg(agent.get_program()).args(agent.get_args());
    let agent = world.spawn("agent", powerless)?;
    let said = agent.wait_for_line("CAP_", PATIENCE)?;
    ensure!(
        said.contains("CAP_NET_ADMIN") || said.contains("CAP_BPF"),
        "{said}"
    );
    Ok(())
}

/// In a pid namespace whose process 1 is in the network namespace of a pod, and has a right that the agent lacks: that pod's namespace is the
/// node's own, however it is named, and another one is not.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn an_agent_that_may_not_look_at_process_1_keeps_pods_out_of_its_namespace() -> Result<()> {
    let world = Pair::world("unseen-1", Cloud::Packet, 2)?;
    let (node, program) = (world.node("node-1")?, binary("proxy-nsmgr")?);
    let far = started(&world, "node-2", |_| {})?;
    let pod = world.pod("endpoint")?;
    let _endpoint = far.endpoint(&world, &pod, SERVICE, CIDR, |_| {})?;
    let words = |command: &Command| {
        let all = [command.get_program()]
            .into_iter()
            .chain(command.get_args());
        let words = all.map(|word| format!("'{}'", word.to_string_lossy()));
        words.collect::<Vec<_>>().join(" ")
    };
    let agent = words(&Agent::command(&node, &program)?);
    let [first, other] = ["client-0", "client-1"].map(|name| world.pod(name));
    let (first, other) = (first?, other?);
    let nsmgr = node.run_dir().join("nsm.sock");
    let connect = |pod: &Pod| {
        format!(
            "$less '{}' connect {REMOTE_SERVICE} --connect-to unix://{} --netns {}",
            program.display(),
            nsmgr.display(),
            pod.netns().display()
        )
    };
    let script = format!(
        "less='nsenter --net={net} setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace'\n\
         $less {agent} & agent=$!\n\
         until [ -S '{nsmgr}' ]; do sleep 0.05; done\n\
         timeout 20 {refused} && echo first granted\n\
         timeout 3 {granted}\n\
         kill $agent; wait",
        net = node.netns().display(),
        nsmgr = nsmgr.display(),
        refused = connect(&first),
        granted = connect(&other),
    );
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", first.netns().display()));
    command.args(["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["sh", "-c", &script]);
    let process = world.spawn("agent", command)?;
    process.wait(2 * PATIENCE)?;
    let said = process.stderr();
    ensure!(said.contains("the node's own network namespace"), "{said}");
    let written = process.stdout();
    ensure!(!written.contains("first granted"), "{written}{said}");
    ensure!(written.matches("connected").count() == 1, "{written}{said}");
    Ok(())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_peer_that_is_not_there_is_named_with_its_address() -> Result<()> {
    let pair = Pair::start("no-peer", Cloud::Packet, 1)?;
    let before = pair.footprint()?;
    pair.world
        .dns()
        .set_addresses("empty.example", &[pair.world.dns().address().into()])?;
    let said = pair.refused(&format!("{SERVICE}@empty.example"), PATIENCE, |_| {})?;
    ensure!(said.contains("192.0.2.53"), "the address is not in: {said}");
    pair.assert_clean(&before)
}

/// Runs `ip` on a node; its output.
fn ip(node: &Node, words: &str) -> Result<String> {
    let output = node
        .command("ip")?
        .args(words.split_whitespace())
        .output()?;
    ensure!(output.status.success(), "ip {words}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Nothing says where others reach the node, so nothing is registered that is reached through it. What is found later is advertised at once.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_node_without_an_address_registers_nothing_until_it_has_one() -> Result<()> {
    let world = Pair::world("no-address", Cloud::Packet, 1)?;
    let node = world.node("node-2")?;
    let default = ip(&node, "route show default")?;
    for family in ["-4", "-6"] {
        ip(&node, &format!("{family} route flush default"))?;
    }
    let program = binary("proxy-nsmgr")?;
    let near = Agent::start(&world, &world.node("node-1")?, &program, |_| {})?;
    let command = Agent::command(&node, &program)?;
    let file = node.run_dir().join("agent.yaml");
    let configured = std::fs::read_to_string(&file)?;
    let address = format!("  ip: \"{}\"\n", node.private_ip());
    ensure!(configured.contains(&address), "{configured}");
    std::fs::write(&file, configured.replace(&address, ""))?;
    let far = Agent::start_as(&world, &node, &program, command)?;
    let misses = |agent: &Agent| {
        let degraded = agent.status().unwrap_or_default()["degraded"].take();
        degraded.to_string().contains("advertise_url")
    };
    wait_until("the agent to miss an address", PATIENCE, || misses(&far))?;
    let pair = Pair { near, far, world };
    let said = pair.endpoint().expect_err("no address").to_string();
    ensure!(said.contains("no address at which others"), "{said}");
    ip(&node, &format!("route add {default}"))?;
    wait_until("the agent to find its address", PATIENCE, || {
        !misses(&pair.far)
    })?;
    pair.near.wait_ready()?;
    pair.far.wait_ready()?;
    connects(&pair)?;
    pair.assert_nothing_left()
}
