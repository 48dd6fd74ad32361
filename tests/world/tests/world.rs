//! The world itself: what it promises to the tests that stand on it.

use std::{
    error::Error,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nsm_world::{Cloud, Fault, Leaks, NameFault, Node, World, WorldError, registry_name};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Long enough for a loaded machine; nothing here takes it when all is well.
const PATIENCE: Duration = Duration::from_secs(10);

fn two_domains(name: &str, cloud: Cloud) -> std::result::Result<World, WorldError> {
    World::builder(name)
        .cloud(cloud)
        .domain("cluster-1.example", |domain| {
            domain.node("node-1").pod("client").srv(5005, 5006)
        })
        .domain("cluster-2.example", |domain| {
            domain.node("node-2").pod("endpoint").node("node-3")
        })
        .build()
}

fn ping(from: &Node, address: &str) -> Result<bool> {
    let output = from
        .command("ping")?
        .args(["-c", "2", "-i", "0.01", "-W", "1", address])
        .output()?;
    Ok(output.status.success())
}

fn is_up(world: &World) -> bool {
    world.leaks().is_ok_and(|leaks| !leaks.netns.is_empty())
}

fn assert_gone(world_id: &str) {
    for dir in ["/run/netns", nsm_world::RUN_DIR, nsm_world::PIN_DIR] {
        let Ok(entries) = std::fs::read_dir(dir) else {
            continue;
        };
        let left: Vec<_> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name == world_id || name.starts_with(&format!("{world_id}-")))
            .collect();
        assert!(left.is_empty(), "left in {dir}: {left:?}");
    }
}

#[test]
#[ignore = "needs root: network namespaces"]
fn packet_nodes_reach_each_other_over_both_families() -> Result {
    let world = two_domains("packet", Cloud::Packet)?;
    let (one, two) = (world.node("node-1")?, world.node("node-2")?);
    assert_eq!(one.private_ip(), one.public_ip());
    assert!(one.ip_map().is_empty());
    assert!(ping(&one, &two.public_ip().to_string())?);
    assert!(ping(&two, &one.public_ip().to_string())?);
    let ip6 = two.public_ip6().ok_or("no IPv6 address")?;
    assert!(ping(&one, &ip6.to_string())?);
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn aws_nodes_reach_each_other_by_public_addresses_that_none_of_them_has() -> Result {
    let world = two_domains("aws", Cloud::Aws)?;
    let nodes = world.nodes();
    for from in &nodes {
        for to in &nodes {
            assert!(
                ping(from, &to.public_ip().to_string())?,
                "{} → {}",
                from.name(),
                to.name()
            );
        }
        let addresses = from.command("ip")?.args(["-o", "addr"]).output()?;
        let addresses = String::from_utf8(addresses.stdout)?;
        assert!(
            addresses.contains(&from.private_ip().to_string()),
            "{addresses}"
        );
        for to in &nodes {
            assert!(
                !addresses.contains(&to.public_ip().to_string()),
                "{addresses}"
            );
        }
    }
    let (one, two, three) = (&nodes[0], &nodes[1], &nodes[2]);
    assert_eq!(
        one.private_ip(),
        two.private_ip(),
        "two domains use one private range"
    );
    assert_eq!(two.ip_map().len(), 2, "all nodes of the domain are mapped");
    assert!(
        two.ip_map()
            .contains(&(three.private_ip().into(), three.public_ip().into()))
    );
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn the_peer_sees_the_public_source_address_behind_nat() -> Result {
    let world = two_domains("source", Cloud::Aws)?;
    // Across domains, and turned round by the gateway of one domain.
    for (from, to) in [("node-1", "node-2"), ("node-3", "node-2")] {
        let (from, to) = (world.node(from)?, world.node(to)?);
        let receiver = to.inside(|| UdpSocket::bind("0.0.0.0:4789"))??;
        receiver.set_read_timeout(Some(PATIENCE))?;
        let sender = from.inside(|| UdpSocket::bind("0.0.0.0:0"))??;
        sender.send_to(b"hello", SocketAddr::from((to.public_ip(), 4789)))?;
        let (_, source) = receiver.recv_from(&mut [0; 16])?;
        assert_eq!(source.ip(), from.public_ip());
    }
    Ok(())
}

/// A DNS query for `name`, as RFC 1035 section 4.1 has it.
fn query(name: &str, kind: u16) -> Vec<u8> {
    let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    message
}

const A: u16 = 1;
const SRV: u16 = 33;

/// Response code, truncation bit and number of answers.
fn summary(answer: &[u8]) -> (u8, bool, u16) {
    (
        answer[3] & 0xf,
        answer[2] & 2 != 0,
        u16::from_be_bytes([answer[6], answer[7]]),
    )
}

fn ask_udp(
    world: &World,
    node: &Node,
    name: &str,
    kind: u16,
    patience: Duration,
) -> Result<(u8, bool, u16)> {
    let socket = node.inside(|| UdpSocket::bind("0.0.0.0:0"))??;
    socket.set_read_timeout(Some(patience))?;
    socket.send_to(&query(name, kind), (world.dns().address(), 53))?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer)?;
    Ok(summary(&buffer[..length]))
}

fn ask_tcp(world: &World, node: &Node, name: &str, kind: u16) -> Result<(u8, bool, u16)> {
    let mut stream = node.inside(|| TcpStream::connect((world.dns().address(), 53)))??;
    stream.set_read_timeout(Some(PATIENCE))?;
    let message = query(name, kind);
    stream.write_all(&(message.len() as u16).to_be_bytes())?;
    stream.write_all(&message)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer)?;
    Ok(summary(&answer))
}

#[test]
#[ignore = "needs root: network namespaces"]
fn dns_answers_fails_and_counts_over_udp_and_tcp() -> Result {
    let world = two_domains("dns", Cloud::Aws)?;
    let node = world.node("node-2")?;
    let dns = world.dns();
    let udp = |name: &str, kind| ask_udp(&world, &node, name, kind, PATIENCE);

    assert_eq!(udp("cluster-1.example", A)?, (0, false, 1));
    assert_eq!(
        ask_tcp(&world, &node, "cluster-1.example", A)?,
        (0, false, 1)
    );
    assert_eq!(
        udp(&registry_name("cluster-1.example"), SRV)?,
        (0, false, 1)
    );
    assert_eq!(
        udp(&registry_name("cluster-2.example"), SRV)?,
        (3, false, 0),
        "NXDOMAIN where there is no SRV"
    );
    assert_eq!(dns.asked("cluster-1.example", "A")?, 2);
    let second = &dns.queries()?[1];
    assert_eq!(second.transport, "tcp");
    assert_eq!(
        second.answer,
        [world.node("node-1")?.public_ip().to_string()]
    );

    dns.fail("cluster-1.example", NameFault::ServFail)?;
    assert_eq!(udp("cluster-1.example", A)?, (2, false, 0));
    dns.fail("cluster-1.example", NameFault::Truncate)?;
    assert_eq!(udp("cluster-1.example", A)?, (0, true, 0));
    assert_eq!(
        ask_tcp(&world, &node, "cluster-1.example", A)?,
        (0, false, 1)
    );
    dns.fail("*", NameFault::Silent)?;
    assert!(
        ask_udp(
            &world,
            &node,
            "cluster-2.example",
            A,
            Duration::from_millis(100)
        )
        .is_err()
    );
    let silent = dns.queries()?;
    assert_eq!(
        silent.last().map(|query| query.outcome.as_str()),
        Some("SILENT")
    );
    dns.heal("*")?;
    dns.remove("cluster-1.example")?;
    // Its SRV names are still below it.
    assert_eq!(udp("cluster-1.example", A)?, (0, false, 0));
    dns.set_addresses(
        "new.example",
        &["203.0.113.77".parse()?, "203.0.113.78".parse()?],
    )?;
    dns.set_ttl("new.example", 1)?;
    dns.set_srv(&registry_name("new.example"), 7005, "new.example")?;
    assert_eq!(udp("new.example", A)?, (0, false, 2));
    Ok(())
}

/// The length of the next datagram, however long a busy machine takes to bring it.
fn received(at: &UdpSocket, buffer: &mut [u8]) -> Result<usize> {
    at.set_read_timeout(Some(PATIENCE))?;
    Ok(at.recv(buffer)?)
}

/// Whether nothing comes for a while.
fn is_silent(at: &UdpSocket) -> Result<bool> {
    at.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(at.recv(&mut [0; 2000]).is_err())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn faults_hold_in_one_direction_until_healed() -> Result {
    let world = two_domains("faults", Cloud::Packet)?;
    let (one, two) = (world.node("node-1")?, world.node("node-2")?);
    let receive = |node: &Node, port| -> Result<UdpSocket> {
        Ok(node.inside(|| UdpSocket::bind(("0.0.0.0", port)))??)
    };
    let (at_one, at_two, other_port) = (
        receive(&one, 4789)?,
        receive(&two, 4789)?,
        receive(&two, 4790)?,
    );
    let send = |from: &UdpSocket, at: &UdpSocket, node: &Node, length: usize| -> Result {
        let to = (node.public_ip(), at.local_addr()?.port());
        from.send_to(&vec![0; length], to)?;
        Ok(())
    };
    let arrives = |from: &UdpSocket, at: &UdpSocket, node: &Node, length: usize| -> Result<bool> {
        send(from, at, node, length)?;
        Ok(received(at, &mut [0; 2000])? == length)
    };
    let is_lost = |from: &UdpSocket, at: &UdpSocket, node: &Node, length: usize| -> Result<bool> {
        send(from, at, node, length)?;
        is_silent(at)
    };
    assert!(arrives(&at_one, &at_two, &two, 10)?);

    let block = world.inject(&one, &two, Fault::BlockUdp { port: 4789 })?;
    assert!(is_lost(&at_one, &at_two, &two, 10)?);
    assert!(arrives(&at_one, &other_port, &two, 10)?, "another port");
    assert!(arrives(&at_two, &at_one, &one, 10)?, "the other direction");
    block.heal();
    assert!(arrives(&at_one, &at_two, &two, 10)?);

    let hole = world.inject(&one, &two, Fault::MtuBlackHole { max: 1400 })?;
    assert!(
        arrives(&at_one, &at_two, &two, 1372)?,
        "1400 with the headers"
    );
    assert!(is_lost(&at_one, &at_two, &two, 1373)?);
    drop(hole);

    let _all = world.inject(&one, &two, Fault::DropAll)?;
    let _loss = world.inject(&two, &one, Fault::Loss { per_mille: 1000 })?;
    assert!(is_lost(&at_one, &other_port, &two, 10)?);
    assert!(is_lost(&at_two, &at_one, &one, 10)?);
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn replies_pass_where_new_flows_do_not() -> Result {
    let world = two_domains("replies", Cloud::Packet)?;
    let (one, two) = (world.node("node-1")?, world.node("node-2")?);
    let socket = |node: &Node, port| -> Result<UdpSocket> {
        Ok(node.inside(|| UdpSocket::bind(("0.0.0.0", port)))??)
    };
    let (asker, one_4789) = (socket(&one, 50_000)?, socket(&one, 4789)?);
    let two_4789 = socket(&two, 4789)?;
    let to = |node: &Node, port| SocketAddr::from((node.public_ip(), port));
    let mut buffer = [0; 16];

    let _fault = world.inject(&two, &one, Fault::RepliesOnly { port: 4789 })?;
    asker.send_to(b"ask", to(&two, 4789))?;
    two_4789.set_read_timeout(Some(PATIENCE))?;
    let (_, from) = two_4789.recv_from(&mut buffer)?;
    two_4789.send_to(b"reply", from)?;
    assert_eq!(received(&asker, &mut buffer)?, 5, "a reply passes");
    two_4789.send_to(b"new", to(&one, 4789))?;
    assert!(is_silent(&one_4789)?, "a new flow does not");
    one_4789.send_to(b"other", to(&two, 4789))?;
    let other = received(&two_4789, &mut buffer)?;
    assert_eq!(other, 5, "nor is the other way hurt");
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn one_vni_is_changed_and_others_pass() -> Result {
    let world = two_domains("vni", Cloud::Packet)?;
    let (one, two) = (world.node("node-1")?, world.node("node-2")?);
    let from = one.inside(|| UdpSocket::bind("0.0.0.0:4790"))??;
    let at = two.inside(|| UdpSocket::bind("0.0.0.0:4789"))??;
    at.set_read_timeout(Some(PATIENCE))?;
    let to = SocketAddr::from((two.public_ip(), 4789));
    let _fault = world.inject(
        &one,
        &two,
        Fault::RewriteVni {
            port: 4789,
            from: 0x01_02_03,
            to: 0x0a_0b_0c,
        },
    )?;
    for (sent, arrives) in [([1, 2, 3], [10, 11, 12]), ([0, 0, 1], [0, 0, 1])] {
        let packet = [&[8, 0, 0, 0][..], &sent, &[0], b"frame"].concat();
        from.send_to(&packet, to)?;
        let mut buffer = [0; 32];
        let length = at.recv(&mut buffer)?;
        assert_eq!(buffer[4..7], arrives);
        assert_eq!(&buffer[8..length], b"frame", "the rest is untouched");
    }
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_closed_port_drops_what_the_card_has_got() -> Result {
    let world = two_domains("closed", Cloud::Packet)?;
    let (one, two) = (world.node("node-1")?, world.node("node-2")?);
    let at = two.inside(|| UdpSocket::bind("0.0.0.0:4789"))??;
    let from = one.inside(|| UdpSocket::bind("0.0.0.0:0"))??;
    let to = SocketAddr::from((two.public_ip(), 4789));
    let closed = world.close_port(&two, 4789)?;
    from.send_to(b"x", to)?;
    assert!(is_silent(&at)?);
    closed.heal();
    from.send_to(b"x", to)?;
    assert_eq!(received(&at, &mut [0; 8])?, 1);
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn worlds_stand_side_by_side_and_leave_nothing() -> Result {
    let (left, right) = (
        two_domains("side", Cloud::Aws)?,
        two_domains("side", Cloud::Aws)?,
    );
    assert_ne!(left.id(), right.id());
    let client = left.pod("client")?;
    let sleeper = left.spawn("sleeper", client.command("sleep")?)?;
    drop(sleeper);
    let mut sleep = client.command("sleep")?;
    sleep.arg("1000");
    let sleeper = left.spawn("sleeper", sleep)?;
    // A link and a pin as an agent would make them.
    let link = "link add nsm-1 type vxlan id 77 dstport 4789 remote 203.0.113.9";
    for arguments in [
        link,
        "link set nsm-1 alias proxy-nsmgr/cluster-1.example/c1",
    ] {
        assert!(
            client
                .command("ip")?
                .args(arguments.split(' '))
                .status()?
                .success()
        );
    }
    let node = left.node("node-1")?;
    std::fs::create_dir_all(node.pin_dir())?;
    let pin = node.pin_dir().join("a-map");
    let arguments = [
        "map",
        "create",
        &pin.display().to_string(),
        "type",
        "array",
        "key",
        "4",
        "value",
        "4",
    ];
    let pinned = Command::new("bpftool")
        .args(arguments)
        .args(["entries", "1", "name", "a_map"])
        .status()?;
    assert!(pinned.success());

    let before = left.leaks()?;
    assert_eq!(before.links.len(), 1, "{before:?}");
    assert_eq!(
        (before.links[0].vni, before.links[0].kind.as_str()),
        (Some(77), "vxlan")
    );
    assert_eq!(before.pins, [pin]);
    assert!(before.processes.contains(&sleeper.pid()));
    assert!(
        right.leaks()?.links.is_empty(),
        "another world's link counted"
    );

    left.tear_down();
    assert_eq!(left.leaks()?, Leaks::default());
    assert!(sleeper.exited().is_some());
    assert!(left.spawn("late", Command::new("true")).is_err());
    assert_gone(left.id());
    assert!(is_up(&right), "tearing down one world touched the other");
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_panic_leaves_nothing() -> Result {
    let mut id = String::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let world = two_domains("panic", Cloud::Packet).unwrap();
        id = world.id().to_owned();
        assert!(is_up(&world));
        panic!("as a failing test does");
    }));
    assert!(panicked.is_err());
    assert_gone(&id);
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_failed_build_leaves_nothing() {
    let builder = World::builder("failed")
        .mtu(10)
        .domain("x.example", |domain| domain.node("node-1"));
    let error = builder.without_dns().build().unwrap_err();
    assert!(
        error.to_string().contains("mtu 10"),
        "the line that failed is named: {error}"
    );
    assert_gone(&format!("failed-{}-0", std::process::id()));
}

/// Runs this test's child (below) in a process of its own, which prints its world's id and waits.
fn child() -> Result<(nsm_world::Process, World, String)> {
    let nest = World::builder("nest").without_dns().build()?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args([
            "--exact",
            "the_world_of_a_child",
            "--ignored",
            "--nocapture",
        ])
        .env("NSM_WORLD_CHILD", "1");
    let process = nest.spawn("child", command)?;
    let line = process.wait_for_line("standing ", PATIENCE)?;
    let id = line
        .split("standing ")
        .last()
        .unwrap_or_default()
        .to_owned();
    assert!(Path::new(nsm_world::RUN_DIR).join(&id).exists());
    Ok((process, nest, id))
}

#[test]
#[ignore = "needs root: network namespaces (a child of other tests; alone it does nothing)"]
fn the_world_of_a_child() -> Result {
    if std::env::var_os("NSM_WORLD_CHILD").is_none() {
        return Ok(());
    }
    let world = two_domains("child", Cloud::Aws)?;
    println!("standing {}", world.id());
    nsm_world::wait_until("the parent's signal", Duration::from_secs(60), || false)?;
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn ctrl_c_leaves_nothing() -> Result {
    let (process, _nest, id) = child()?;
    process.signal(nix::sys::signal::Signal::SIGINT);
    let status = process.wait(PATIENCE)?;
    assert!(!status.success());
    assert_gone(&id);
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn the_world_of_a_killed_process_is_swept_up_by_the_next() -> Result {
    let (process, _nest, id) = child()?;
    process.kill9();
    assert!(
        Path::new(nsm_world::RUN_DIR).join(&id).exists(),
        "nobody could clean up"
    );
    let next = World::builder("next").without_dns().build()?;
    assert_gone(&id);
    assert!(is_up(&next));
    Ok(())
}

#[test]
#[ignore = "needs root: network namespaces"]
fn building_takes_well_below_a_second() -> Result {
    // Programs are built outside of what is measured.
    nsm_world::binary("nsm-world-dns")?;
    let mut times = Vec::new();
    for _ in 0..3 {
        let start = Instant::now();
        let _world = two_domains("quick", Cloud::Aws)?;
        times.push(start.elapsed());
    }
    times.sort();
    assert!(times[0] < Duration::from_millis(500), "{times:?}");
    Ok(())
}
