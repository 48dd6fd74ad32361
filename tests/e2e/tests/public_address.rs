//! Nodes behind 1:1 NAT whose operator wrote no IP map: a STUN server or a metadata service tells them their public addresses, tunnels
//! stand, and an address that moves is followed.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, UdpSocket},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{PATIENCE, Pair, close};
use nsm_world::{Agent, Cloud, Node, World, binary, wait_until};
use serde_json::Value;

/// Answers Binding requests (RFC 8489) on a node until the test's process ends; none while the flag that it returns is set.
fn stun_server(node: &Node) -> Result<Arc<AtomicBool>> {
    let socket = node.inside(|| UdpSocket::bind("0.0.0.0:3478"))??;
    let is_silent = Arc::new(AtomicBool::new(false));
    let silent = Arc::clone(&is_silent);
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            if silent.load(Ordering::SeqCst) {
                continue;
            }
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
    Ok(is_silent)
}

/// Where a node's metadata service listens on it, as Equinix Metal's but without TLS.
const METADATA: &str = "127.0.0.1:8080";

/// A metadata service that tells what is set here, on a node until the test's process ends.
struct Metadata(Arc<Mutex<String>>);

impl Metadata {
    fn on(node: &Node, address: &str) -> Result<Self> {
        let listener = node.inside(|| TcpListener::bind(METADATA))??;
        let told = Arc::new(Mutex::new(address.to_owned()));
        let shared = Arc::clone(&told);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let body = shared
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                let mut request = BufReader::new(&stream).lines().map_while(Result::ok);
                let is_whole = request.any(|line| line.is_empty());
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
                );
                // An agent that gave up is gone.
                let _ = is_whole && (&stream).write_all(answer.as_bytes()).is_ok();
            }
        });
        Ok(Self(told))
    }

    fn set(&self, address: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = address.to_owned();
    }
}

/// An agent on `node-1` that asks its node's metadata service, and has an empty IP map.
fn lone_agent(world: &World, adjust: impl FnOnce(&mut Command)) -> Result<Agent> {
    let node = world.node("node-1")?;
    let map = node.run_dir().join("own-map.yaml");
    std::fs::write(&map, "").context("write an empty IP map")?;
    let service = format!("equinix=http://{METADATA}");
    let agent = Agent::start(world, &node, &binary("proxy-nsmgr")?, |command| {
        command.args(["--public-address-metadata", &service, "--map-ip-file"]);
        command.arg(&map);
        adjust(command);
    })?;
    agent.wait_ready()?;
    Ok(agent)
}

/// What `status` says of the public address, once it is as `wanted` says.
fn told(agent: &Agent, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    let found = wait_until(what, PATIENCE, || {
        let status = agent.status().unwrap_or_default();
        last = status["public_address"].clone();
        wanted(&last)
    });
    found.with_context(|| format!("{last:#}\n{}", agent.process.stderr()))?;
    Ok(last)
}

/// What `status` says of a source.
fn source<'a>(told: &'a Value, name: &str) -> &'a Value {
    let sources = told["sources"].as_array().map_or(&[][..], Vec::as_slice);
    let is_it = |it: &&Value| {
        it["source"]
            .as_str()
            .is_some_and(|text| text.contains(name))
    };
    sources.iter().find(is_it).unwrap_or(&Value::Null)
}

fn is(value: &Value, text: &str) -> bool {
    value.as_str() == Some(text)
}

fn failed_for(source: &Value, words: &str) -> bool {
    let trouble = source["trouble"].as_str();
    trouble.is_some_and(|trouble| trouble.contains(words))
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn an_address_that_moves_is_found_at_the_next_round() -> Result<()> {
    let world = world("moves")?;
    let metadata = Metadata::on(&world.node("node-1")?, "203.0.113.50")?;
    let agent = lone_agent(&world, |command| {
        command.args(["--public-address-interval", "1s"]);
    })?;
    for address in ["203.0.113.50", "203.0.113.51", "203.0.113.52"] {
        metadata.set(address);
        told(&agent, address, |it| is(&it["address"], address))?;
    }
    // A fault of the service takes no address away, that it says there is none does.
    metadata.set("0.0.0.0");
    let kept = told(&agent, "the fault to be noticed", |it| {
        failed_for(source(it, "metadata"), "no address of a host")
    })?;
    ensure!(is(&kept["address"], "203.0.113.52"), "{kept:#}");
    metadata.set("");
    told(&agent, "that there is no address", |it| {
        is(&it["address"], "")
    })?;
    Ok(())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_change_of_the_nodes_addresses_asks_anew_and_nobody_waits_for_who_is_silent() -> Result<()> {
    let world = world("changes")?;
    let stun = world.node("stun-1")?;
    let is_silent = stun_server(&stun)?;
    let node = world.node("node-1")?;
    let public = node.public_ip().to_string();
    let metadata = Metadata::on(&node, &public)?;
    let server = stun.public_ip().to_string();
    let agent = lone_agent(&world, |command| {
        command.args(["--public-address-interval", "1h", "--public-address-stun"]);
        command.arg(&server);
    })?;
    let first = told(&agent, "all to agree", |it| {
        let stun = &source(it, "STUN")["address"];
        is(&it["address"], &public) && is(stun, &public)
    })?;
    ensure!(first["conflicts"] == serde_json::json!([]), "{first:#}");

    is_silent.store(true, Ordering::SeqCst);
    let change = |what: &str| {
        let device = node.interface();
        let mut command = node.command("ip")?;
        command.args(["addr", what, "198.51.100.7/32", "dev", device]);
        let status = command.status().context("start ip")?;
        ensure!(status.success(), "ip addr {what}: {status}");
        anyhow::Ok(())
    };
    metadata.set("203.0.113.51");
    change("add")?;
    let moved = told(&agent, "the address to be followed", |it| {
        is(&it["address"], "203.0.113.51")
    })?;
    // The STUN server is still waited for. What it said before the move is no conflict until it is known to say so after it.
    let stun = source(&moved, "STUN");
    ensure!(is(&stun["trouble"], ""), "{moved:#}");
    ensure!(moved["conflicts"] == serde_json::json!([]), "{moved:#}");
    let over = told(&agent, "the round to end", |it| {
        failed_for(source(it, "STUN"), "no answer")
    })?;
    ensure!(is(&over["address"], "203.0.113.51"), "{over:#}");
    ensure!(is(&over["conflicts"][0]["address"], &public), "{over:#}");

    is_silent.store(false, Ordering::SeqCst);
    metadata.set(&public);
    change("del")?;
    told(&agent, "all to agree again", |it| {
        is(&it["address"], &public) && it["conflicts"] == serde_json::json!([])
    })?;
    Ok(())
}

fn world(name: &str) -> Result<World> {
    let world = World::builder(name)
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
    let world = world("stun")?;
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
    pair.assert_pings(0, &connected, 5)?;
    let peer = &pair.near.status()?["connections"][0]["tunnel"]["remote"];
    ensure!(*peer == pair.far.node().public_ip().to_string(), "{peer}");
    close(&client)?;
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
