//! Beginning, end, and what comes between two agents.

use std::{net::IpAddr, sync::Arc, time::Duration};

use nsm_core::liveness::{
    PathId, Reflector,
    sbfd::{Proof, State},
};
use nsm_dataplane::{
    bpf::{Bpf, BpfConfig},
    forward::TunnelDevices,
    liveness::{Health, HealthError},
};

use super::support::{
    By, CLSACT, Node, TCX, World, addr, discriminator, end, eventually, ip, join, link_names, pair,
    pin_dir, probed, sandbox, two_up, unhook, up, within,
};

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn an_end_in_order_leaves_nothing() {
    sandbox(|| async {
        for by in [TCX] {
            let world = World::new();
            let (nodes, peers) = pair(&world, by, 4).await;
            let _six = join(&nodes, 6).await;
            assert_eq!(
                link_names(&world.nodes[0]),
                [
                    "eth0",
                    "nsm-ext-4789",
                    "nsm-mgmt4-4789",
                    "nsm-mgmt6-4789",
                    "nsm-mgmx4-4789",
                    "nsm-mgmx6-4789"
                ]
            );
            let [one, two] = nodes;
            let health = one.health.clone();
            one.end().await;
            two.end().await;
            for netns in &world.nodes {
                assert_eq!(link_names(netns), ["eth0"]);
            }
            assert!(matches!(peers[0].prove().await, Err(HealthError::Closed)));
            health.close().await.expect("closed already");
            // The kernel's own files are always there.
            let mut left: Vec<_> = std::fs::read_dir("/sys/fs/bpf")
                .expect("bpffs")
                .map(|entry| {
                    entry
                        .expect("entry")
                        .file_name()
                        .into_string()
                        .expect("UTF-8")
                })
                .collect();
            left.retain(|name| !name.ends_with(".debug"));
            assert!(left.is_empty(), "{left:?}");
        }
    });
}

async fn next_one_goes_on(by: By) {
    let world = World::new();
    let (nodes, peers) = up(&world, by, 4).await;
    let [mut one, two] = nodes;
    let [to_two, to_one] = peers;
    let spec = two.spec(4);

    // As after kill -9: nothing is closed in order.
    let discriminator = two.health.discriminator();
    let Node {
        bpf,
        devices,
        health,
        events,
        netns,
        ..
    } = two;
    drop((to_one, health, events, devices));
    // The threads end by themselves and let go of the pins' lock.
    eventually("the old agent's end", async || {
        match Arc::strong_count(&bpf) {
            1 => Ok(()),
            count => Err(format!("{count} users")),
        }
    })
    .await;
    drop(bpf);

    let answers = to_two.report().await.expect("report").answers;
    eventually("answers of nobody", async || {
        let report = to_two.report().await.expect("report");
        if report.answers >= answers + 20 {
            Ok(())
        } else {
            Err(format!("{report:?}"))
        }
    })
    .await;
    assert!(to_two.is_up());

    let two = Node::start(&world, 2, by);
    assert_eq!(two.health.discriminator(), discriminator);
    assert_eq!(two.spec(4), spec);
    let to_one = two.health.join(one.spec(4)).await.expect("joined");
    assert_eq!(to_one.prove().await.expect("proof"), Proof::Reached);
    let report = to_one.report().await.expect("report");
    assert!(report.reflected > 20, "counters go on: {report:?}");
    assert!(to_two.is_up());
    while let Ok(event) = one.events.try_recv() {
        if let nsm_dataplane::liveness::Event::Session { change, .. } = &event {
            let down = nsm_core::liveness::sbfd::Change::State {
                at: Default::default(),
                from: State::Up,
                to: State::Down,
                cause: nsm_core::liveness::sbfd::Cause::AdminDown,
            };
            assert_ne!(
                std::mem::discriminant(change),
                std::mem::discriminant(&down),
                "{event:?}"
            );
        }
    }
    drop(netns);
    one.end().await;
    two.end().await;
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn the_reflector_answers_while_no_agent_runs_and_the_next_one_goes_on() {
    sandbox(|| next_one_goes_on(TCX));
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn the_reflector_answers_while_no_agent_runs_and_the_next_one_goes_on_with_clsact() {
    sandbox(|| next_one_goes_on(CLSACT));
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn what_nobody_comes_back_for_is_let_go() {
    two_up(&[TCX], async |world, _by, nodes, peers| {
        let [one, two] = nodes;
        drop(peers);
        let bpf = one.bpf.clone();
        drop((one.health, one.events, one.bpf, one.devices));
        eventually("the old agent's end", async || {
            match Arc::strong_count(&bpf) {
                1 => Ok(()),
                count => Err(format!("{count} users")),
            }
        })
        .await;
        drop(bpf);
        assert_eq!(probed(1), [addr("10.2.0.1")]);
        let one = Node::start_with(&world, 1, TCX, |config| {
            config.orphan_grace = Duration::from_millis(1);
        });
        eventually("no entry", async || match probed(1) {
            none if none.is_empty() => Ok(()),
            some => Err(format!("{some:?}")),
        })
        .await;
        assert_eq!(one.bpf.tunnels(), []);
        one.end().await;
        two.end().await;
    });
}

/// Ends an agent as `kill -9` does: nothing is closed in order.
async fn kill(node: Node) {
    let bpf = node.bpf.clone();
    drop(node);
    eventually("the old agent's end", async || {
        match Arc::strong_count(&bpf) {
            1 => Ok(()),
            count => Err(format!("{count} users")),
        }
    })
    .await;
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn entries_of_peers_whose_sessions_are_lost_are_removed_at_the_start() {
    sandbox(|| async {
        let world = World::new();
        let (nodes, peers) = pair(&world, TCX, 4).await;
        let [one, two] = nodes;
        drop(peers);
        kill(one).await;
        assert_eq!(probed(1), [addr("10.2.0.1")]);
        // What is known of them stays, while it is.
        let one = Node::start(&world, 1, TCX);
        assert_eq!(probed(1), [addr("10.2.0.1")]);
        kill(one).await;
        // Then all maps are made anew, as with another layout.
        std::fs::remove_file(pin_dir(1).join("LAYOUT")).expect("a pin");
        let one = Node::start(&world, 1, TCX);
        assert_eq!(probed(1), [] as [IpAddr; 0]);
        one.end().await;
        two.end().await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn where_paths_are_not_watched_any_more_nothing_is_left_that_answers() {
    sandbox(|| async {
        for by in [TCX, CLSACT] {
            let world = World::new();
            let (nodes, peers) = pair(&world, by, 4).await;
            let six = join(&nodes, 6).await;
            let [one, two] = nodes;
            drop((peers, six));
            let netns = one.netns.clone();
            kill(one).await;
            let config = BpfConfig {
                pin_dir: pin_dir(1),
                mount_bpffs: false,
                ..BpfConfig::default()
            };
            let bpf = within(&netns, || Bpf::load(&config)).expect("BPF");
            let config = super::support::health_config(&netns);
            Health::remove_left(&config, &bpf).expect("removed");
            assert_eq!(link_names(&netns), ["eth0", "nsm-ext-4789"], "data has it");
            let pins = std::fs::read_dir(pin_dir(1)).expect("pins");
            let left: Vec<_> = pins
                .map(|pin| pin.expect("a pin").file_name())
                .filter(|name| name.as_encoded_bytes().starts_with(b"probe_"))
                .collect();
            assert!(left.is_empty(), "{left:?}");
            Health::remove_left(&config, &bpf).expect("nothing is fine");
            within(&netns, || bpf.detach_and_unpin()).expect("unpinned");
            two.end().await;
        }
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_peer_is_shared_and_lingers() {
    two_up(&[TCX], async |_world, _by, nodes, peers| {
        let again = nodes[0]
            .health
            .join(nodes[1].spec(4))
            .await
            .expect("joined");
        assert!(again.is_up(), "the same session");
        let users = async || {
            let reports = nodes[0].health.reports().await.expect("reports");
            assert_eq!(reports.len(), 1);
            reports[0].users
        };
        assert_eq!(users().await, 2);
        drop(again);
        let [to_two, to_one] = peers;
        drop(to_two);
        assert_eq!(users().await, 0);
        let again = nodes[0]
            .health
            .join(nodes[1].spec(4))
            .await
            .expect("joined");
        assert!(again.is_up(), "it was still there");

        drop((again, to_one));
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_proof_that_nobody_waits_for_is_counted_as_such() {
    sandbox(|| async {
        let world = World::new();
        let node = Node::start(&world, 1, TCX);
        let nobody = PathId {
            address: addr("10.2.0.1"),
            reflector: Reflector {
                discriminator: discriminator(7),
                vni: nsm_core::net::Vni::MANAGEMENT,
            },
            ..node.spec(4)
        };
        let peer = node.health.join(nobody).await.expect("joined");
        tokio::select! {
            biased;
            proof = peer.prove() => panic!("{proof:?} of nobody, at once"),
            () = std::future::ready(()) => {}
        }
        let count = node.health.preflights();
        assert_eq!((count.cut, count.silent), (1, 0));
        drop(peer);
        node.end().await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn what_cannot_be_watched_is_refused() {
    sandbox(|| async {
        let world = World::new();
        let nodes = [1, 2].map(|number| Node::start(&world, number, TCX));
        let spec = nodes[1].spec(4);
        let one = &nodes[0].health;
        for address in ["0.0.0.0", "224.0.0.1", "::"] {
            let nobody = PathId {
                address: addr(address),
                ..spec
            };
            let refused = one.join(nobody).await;
            assert!(
                matches!(refused, Err(HealthError::NotAPeer(_))),
                "{refused:?}"
            );
        }
        let ourselves = PathId {
            reflector: Reflector {
                discriminator: one.discriminator(),
                ..spec.reflector
            },
            ..spec
        };
        let refused = one.join(ourselves).await;
        assert!(
            matches!(refused, Err(HealthError::DiscriminatorTaken { .. })),
            "{refused:?}"
        );
        let second = Health::start(
            super::support::health_config(&world.nodes[0]),
            nodes[0].devices.clone(),
        );
        assert!(matches!(second, Err(HealthError::InUse)));
        end(nodes).await;
    });
}

/// What somebody does to a probe link of node 1, and whether there is another afterwards.
async fn is_mended(by: By, harm: impl Fn(&Node), makes_another: bool) {
    let world = World::new();
    let (nodes, peers) = up(&world, by, 4).await;
    let index = || {
        within(&world.nodes[0], || {
            nix::net::if_::if_nametoindex("nsm-mgmt4-4789").ok()
        })
    };
    let before = index().expect("the link");
    harm(&nodes[0]);
    if makes_another {
        eventually("another link", async || match index() {
            Some(index) if index != before => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    }
    // Our probes leave and are answered again, and so are the peer's.
    for peer in &peers {
        let answers = peer.report().await.expect("report").answers;
        eventually("answers", async || {
            let report = peer.report().await.expect("report");
            let is_well = peer.is_up() && report.answers >= answers + 20;
            is_well.then_some(()).ok_or_else(|| format!("{report:?}"))
        })
        .await;
    }
    assert_eq!(index() != Some(before), makes_another);
    end(nodes).await;
    assert_eq!(link_names(&world.nodes[0]), ["eth0"]);
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_probe_link_that_is_taken_away_is_made_again() {
    sandbox(|| async {
        for by in [TCX, CLSACT] {
            let harm = |node: &Node| within(&node.netns, || ip("link del nsm-mgmt4-4789"));
            is_mended(by, harm, true).await;
        }
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_probe_link_that_is_taken_down_is_taken_up_again() {
    sandbox(|| async {
        for by in [TCX, CLSACT] {
            let harm = |node: &Node| within(&node.netns, || ip("link set nsm-mgmt4-4789 down"));
            is_mended(by, harm, false).await;
        }
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_probe_link_without_its_programs_gets_them_again() {
    sandbox(|| async {
        for by in [TCX, CLSACT] {
            is_mended(by, |node| unhook(node, by, "nsm-mgmt4-4789"), false).await;
        }
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_peer_that_cannot_be_entered_is_as_before() {
    sandbox(|| async {
        let world = World::new();
        let node = Node::start(&world, 1, TCX);
        let spec = |number: u32| PathId {
            address: std::net::Ipv4Addr::from(0x0a02_0000 + number).into(),
            port: 4789,
            reflector: Reflector {
                discriminator: discriminator(0x5000_0000 + number),
                vni: nsm_core::net::Vni::MANAGEMENT,
            },
        };
        let mut peers = Vec::new();
        for number in 1..=1024 {
            peers.push(node.health.join(spec(number)).await.expect("joined"));
        }
        // Twice: what failed does not look joined.
        for _ in 0..2 {
            let refused = node.health.join(spec(1025)).await;
            assert!(
                matches!(refused, Err(HealthError::TooManyPeers { .. })),
                "{refused:?}"
            );
            assert!(!probed(1).contains(&addr("10.2.4.1")));
        }
        // One that nobody uses any more makes room.
        drop(peers.pop());
        peers.push(node.health.join(spec(1025)).await.expect("joined"));
        assert_eq!(node.health.reports().await.expect("reports").len(), 1024);
        drop(peers);
        node.end().await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_node_that_drains_asks_its_peers_to_back_off() {
    two_up(&[TCX], async |_world, _by, mut nodes, _peers| {
        nodes[1].health.set_admin_down(true).await.expect("set");
        nodes[0].becomes(State::AdminDown).await;
        nodes[1].health.set_admin_down(false).await.expect("set");
        nodes[0].becomes(State::Up).await;
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn a_link_in_the_way_is_an_error_that_leaves_nothing() {
    sandbox(|| async {
        let world = World::new();
        let netns = &world.nodes[0];
        within(netns, || {
            ip("link add other type vxlan id 1 dstport 4789");
            ip("link set other up");
        });
        let config = BpfConfig {
            pin_dir: pin_dir(1),
            interfaces: vec!["eth0".to_owned()],
            mount_bpffs: false,
            ..BpfConfig::default()
        };
        let bpf = Arc::new(within(netns, || Bpf::load(&config)).expect("BPF"));
        let config = || super::support::health_config(netns);
        let devices = Arc::new(TunnelDevices::new(bpf.clone(), "test.example"));
        let error = Health::start(config(), devices.clone()).expect_err("taken");
        assert!(error.to_string().contains("4789"), "{error}");
        assert_eq!(link_names(netns), ["eth0", "other"]);
        within(netns, || ip("link del other"));
        let (health, _events) = Health::start(config(), devices.clone()).expect("health");
        health.close().await.expect("closed");
        devices.close(netns).expect("removed");
        assert_eq!(link_names(netns), ["eth0"]);
        within(netns, || bpf.detach_and_unpin()).expect("unpinned");
    });
}

#[test]
#[ignore = "needs root: namespaces, VXLAN, packet sockets"]
fn agents_of_one_domain_in_one_namespace_have_a_link_each() {
    sandbox(|| async {
        let world = World::new();
        let netns = &world.nodes[0];
        let start = |port: u16| {
            let config = BpfConfig {
                pin_dir: pin_dir(port.into()),
                mount_bpffs: false,
                ports: vec![port],
                ..BpfConfig::default()
            };
            let bpf = Arc::new(within(netns, || Bpf::load(&config)).expect("BPF"));
            let devices = Arc::new(TunnelDevices::new(bpf, "test.example"));
            let mut config = super::support::health_config(netns);
            config.port = port;
            let (health, _events) = Health::start(config, devices.clone()).expect("health");
            (health, devices)
        };
        let of = |port: u16| ["ext", "mgmt4", "mgmx4"].map(|kind| format!("nsm-{kind}-{port}"));
        let names = |ports: &[u16]| {
            let mut names: Vec<String> = ports.iter().flat_map(|port| of(*port)).collect();
            names.push("eth0".to_owned());
            names.sort();
            names
        };
        let both = [start(4789), start(4790)];
        assert_eq!(link_names(netns), names(&[4789, 4790]));
        for ((health, devices), left) in both.into_iter().zip([&[4790][..], &[]]) {
            health.close().await.expect("closed");
            devices.close(netns).expect("removed");
            assert_eq!(link_names(netns), names(left), "another's stays");
            let unpinned = within(netns, || devices.bpf().detach_and_unpin());
            unpinned.expect("unpinned");
        }
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn an_agent_that_may_not_probe_leaves_the_reflector_of_an_earlier_one() {
    two_up(&[TCX], async |_world, _by, nodes, peers| {
        let [one, two] = nodes;
        let [to_two, to_one] = peers;
        let bpf = two.bpf.clone();
        drop((to_one, two.health, two.events, two.bpf, two.devices));
        eventually("the old agent's end", async || {
            match Arc::strong_count(&bpf) {
                1 => Ok(()),
                count => Err(format!("{count} users")),
            }
        })
        .await;
        let config = super::support::health_config(&two.netns);
        let devices = Arc::new(TunnelDevices::new(bpf.clone(), "test.example"));
        let refused = std::thread::scope(|scope| {
            let start = || {
                without_packet_sockets();
                Health::start(config, devices.clone())
            };
            scope.spawn(start).join().expect("no panic")
        });
        let refused = refused.expect_err("no packet socket");
        assert!(matches!(refused, HealthError::Socket { .. }), "{refused}");
        let answers = to_two.report().await.expect("report").answers;
        eventually("answers of nobody", async || {
            let report = to_two.report().await.expect("report");
            let goes_on = to_two.is_up() && report.answers >= answers + 20;
            goes_on.then_some(()).ok_or_else(|| format!("{report:?}"))
        })
        .await;
        one.end().await;
        // Whoever may takes it over, and away.
        let (health, _events) =
            Health::start(super::support::health_config(&two.netns), devices.clone())
                .expect("health");
        health.close().await.expect("closed");
        devices.close(&two.netns).expect("removed");
        within(&two.netns, || bpf.detach_and_unpin()).expect("unpinned");
        assert_eq!(link_names(&two.netns), ["eth0"]);
    });
}

/// Takes CAP_NET_RAW from the calling thread for good.
fn without_packet_sockets() {
    use nix::libc;
    const VERSION_3: u32 = 0x2008_0522;
    const NET_RAW: u32 = 1 << 13;
    // linux/capability.h: version and thread; effective, permitted, inheritable, twice 32 bits each.
    let header = [VERSION_3, 0];
    let mut sets = [0_u32; 6];
    // SAFETY: reads the header and writes the sets, both as long as the version says.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
    assert_eq!(got, 0, "{}", std::io::Error::last_os_error());
    for set in &mut sets[..3] {
        *set &= !NET_RAW;
    }
    // SAFETY: reads both.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}
