//! Nodes behind 1:1 NAT whose operator wrote no IP map: a STUN server tells them their public addresses, and tunnels stand.

use std::{net::UdpSocket, thread};

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{PATIENCE, Pair, endpoint_address, ping};
use nsm_world::{Agent, Cloud, Node, World, binary, wait_until};

/// Answers Binding requests (RFC 8489) on a node until the test's process ends.
fn stun_server(node: &Node) -> Result<()> {
    let socket = node.inside(|| UdpSocket::bind("0.0.0.0:3478"))??;
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let std::net::SocketAddr::V4(seen) = from else {
                continue;
            };
            if length < 20 {
                continue;
            }
            // Success, 12 bytes of attributes, the request's cookie and transaction; XOR-MAPPED-ADDRESS of IPv4.
            let answer = [
                &[1, 1, 0, 12][..],
                &buffer[4..20],
                &[0, 0x20, 0, 8, 0, 1],
                &(seen.port() ^ 0x2112).to_be_bytes(),
                &(seen.ip().to_bits() ^ 0x2112_a442).to_be_bytes(),
            ]
            .concat();
            if socket.send_to(&answer, from).is_err() {
                return;
            }
        }
    });
    Ok(())
}

fn world() -> Result<World> {
    let world = World::builder("stun")
        .cloud(Cloud::Aws)
        .domain("cluster-1.example", |domain| {
            domain.node("node-1").pod("client-0")
        })
        .domain("cluster-2.example", |domain| {
            domain.node("node-2").pod("endpoint")
        })
        .domain("stun.example", |domain| domain.node("stun-1"));
    Ok(world.build()?)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn nodes_behind_nat_find_their_public_addresses_by_stun() -> Result<()> {
    let world = world()?;
    let stun = world.node("stun-1")?;
    stun_server(&stun)?;
    let program = binary("proxy-nsmgr")?;
    let start = |node: &str| {
        let node = world.node(node)?;
        let map = node.run_dir().join("own-map.yaml");
        std::fs::write(&map, "").context("write an empty IP map")?;
        let server = stun.public_ip().to_string();
        let agent = Agent::start(&world, &node, &program, |command| {
            command.args(["--public-address-stun", &server, "--map-ip-file"]);
            command.arg(&map);
        })?;
        anyhow::Ok((agent, map))
    };
    let ((near, near_map), (far, _)) = (start("node-1")?, start("node-2")?);
    for agent in [&near, &far] {
        agent.wait_ready()?;
        let told = &agent.status()?["public_address"];
        let public = agent.node().public_ip().to_string();
        ensure!(told["address"] == public.as_str(), "{public} is not {told}");
        ensure!(told["source"].to_string().contains("STUN"), "{told}");
        ensure!(told["conflicts"] == serde_json::json!([]), "{told}");
    }
    let pair = Pair { near, far, world };
    let before = pair.footprint()?;
    let endpoint = pair.endpoint()?;
    let (client, connected) = pair.connect(0)?;
    let answered = ping(&pair.client_pod(0)?, &endpoint_address(&connected)?, 5, &[])?;
    ensure!(answered == 5, "{answered} of 5 pings were answered");
    let peer = &pair.near.status()?["connections"][0]["tunnel"]["remote"];
    ensure!(*peer == pair.far.node().public_ip().to_string(), "{peer}");
    ensure!(client.close(PATIENCE)?.success(), "the client did not end");
    ensure!(
        endpoint.stop(PATIENCE)?.success(),
        "the endpoint did not end"
    );

    // The operator says otherwise: that holds, and the difference is told with both values.
    let own = pair.near.node().private_ip();
    std::fs::write(&near_map, format!("{own}: 203.0.113.99\n"))?;
    let mut told = String::new();
    let conflict = wait_until("the conflict in `status`", PATIENCE, || {
        pair.near.status_table().is_ok_and(|text| {
            told = text;
            told.contains("public address: 203.0.113.99 (IP map)")
                && told.contains("conflict: 203.0.113.99 by IP map, but 203.0.113.10 by STUN")
        })
    });
    conflict.with_context(|| told.clone())?;
    let log = pair.near.process.stdout() + &pair.near.process.stderr();
    let warning = log.lines().find(|line| line.contains("two sources"));
    let warning = warning.context("the conflict is not in the log")?;
    ensure!(
        warning.contains("203.0.113.99") && warning.contains("203.0.113.10"),
        "{warning}"
    );
    pair.assert_clean(&before)
}
