//! Whether the card's count can be believed: packets may leave by an interface where nothing counts.

use nsm_core::liveness::{Direction, sbfd::State};

use super::{
    fault::{becomes_reason, reason},
    support::{
        CLSACT, Node, TCX, World, end, eventually, ip, join, nft, sandbox, two_up, two_up_in,
        unhook, within,
    },
};

/// Node 1 reaches node 2 by `eth1` from now on, with the address that it had.
fn move_way(world: &World) {
    within(&world.nodes[0], || {
        ip("route add 10.2.0.1/32 via 10.3.0.254 dev eth1 src 10.1.0.1");
    });
}

fn drop_own_output(node: &Node) {
    within(&node.netns, || {
        nft("add table inet fw; \
             add chain inet fw output { type filter hook output priority 0; }; \
             add rule inet fw output udp dport 4789 drop");
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn a_loss_behind_an_interface_that_nothing_counts_on_is_not_our_own_output() {
    two_up_in(
        World::second_way,
        &[TCX, CLSACT],
        async |world, _by, mut nodes, peers| {
            // At the same moment: nobody can have noticed.
            move_way(&world);
            world.drop_between("ip saddr 10.1.0.1");
            nodes[0].becomes(State::Down).await;
            let told = reason(&peers[0], Direction::Out).await;
            assert_ne!(told, "OwnOutputDrops");
            world.mend();
            nodes[0].becomes(State::Up).await;
            end(nodes).await;
        },
    );
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn an_interface_that_a_route_moves_to_is_counted_on() {
    two_up_in(
        World::second_way,
        &[TCX, CLSACT],
        async |world, _by, mut nodes, peers| {
            move_way(&world);
            eventually("hooks on eth1", async || {
                let interfaces = nodes[0].bpf.interfaces();
                match interfaces == ["eth0", "eth1"] {
                    true => Ok(()),
                    false => Err(format!("{interfaces:?}")),
                }
            })
            .await;
            assert!(peers[0].is_up());
            eventually("a count", async || {
                let stages = peers[0].report().await.expect("report").stages;
                stages
                    .card_out
                    .map(drop)
                    .ok_or_else(|| format!("{stages:?}"))
            })
            .await;
            drop_own_output(&nodes[0]);
            nodes[0].becomes(State::Down).await;
            becomes_reason(&peers[0], Direction::Out, "OwnOutputDrops").await;
            end(nodes).await;
        },
    );
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn a_peer_that_never_was_up_is_counted_where_its_route_leads() {
    sandbox(|| async {
        let world = World::new();
        world.second_way();
        move_way(&world);
        world.drop_between("ip saddr 10.1.0.1");
        let mut nodes = [1, 2].map(|number| Node::start(&world, number, TCX));
        let peers = join(&nodes, 4).await;
        let _ = peers[0].prove().await.expect("proof");
        nodes[0].becomes(State::Down).await;
        assert_ne!(reason(&peers[0], Direction::Out).await, "OwnOutputDrops");
        // Once somebody counts there, the truth is told also without an answer ever.
        drop_own_output(&nodes[0]);
        becomes_reason(&peers[0], Direction::Out, "OwnOutputDrops").await;
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN, nftables"]
fn programs_that_somebody_took_off_the_card_hang_there_again() {
    two_up(&[TCX, CLSACT], async |_world, by, mut nodes, peers| {
        unhook(&nodes[0], by, "eth0");
        let before = peers[0].report().await.expect("report").stages;
        eventually("a count that goes on", async || {
            let stages = peers[0].report().await.expect("report").stages;
            let goes_on = stages.card_out > before.card_out && stages.card_in > before.card_in;
            goes_on.then_some(()).ok_or_else(|| format!("{stages:?}"))
        })
        .await;
        drop_own_output(&nodes[0]);
        nodes[0].becomes(State::Down).await;
        becomes_reason(&peers[0], Direction::Out, "OwnOutputDrops").await;
        end(nodes).await;
    });
}

#[test]
#[ignore = "needs root: BPF, namespaces, VXLAN"]
fn interfaces_that_the_operator_names_are_all_that_is_hooked_and_that_is_said() {
    sandbox(|| async {
        let world = World::new();
        world.second_way();
        move_way(&world);
        let nodes = [
            Node::start_on(&world, 1, TCX, &["eth0"], |_| {}),
            Node::start(&world, 2, TCX),
        ];
        let peers = join(&nodes, 4).await;
        let uncounted = eventually("a word", async || {
            let uncounted = nodes[0].health.uncounted();
            match uncounted.is_empty() {
                true => Err(format!("{:?}", peers[0].report().await)),
                false => Ok(uncounted),
            }
        })
        .await;
        let said: Vec<_> = uncounted.iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), 1);
        assert!(
            said[0].starts_with("packets to 10.2.0.1 leave by `eth1`, where nothing counts them"),
            "{said:?}"
        );
        assert_eq!(nodes[0].bpf.interfaces(), ["eth0"]);
        // Once packets have come back that the card did not count.
        eventually("no count", async || {
            let stages = peers[0].report().await.expect("report").stages;
            match stages.card_out {
                None => Ok(()),
                Some(_) => Err(format!("{stages:?}")),
            }
        })
        .await;
        // Nothing differs any more, so no look would come of the counts.
        within(&world.nodes[0], || ip("route del 10.2.0.1/32"));
        eventually("nothing to say any more", async || {
            let uncounted = nodes[0].health.uncounted();
            match uncounted.is_empty() {
                true => Ok(()),
                false => Err(format!("{uncounted:?}")),
            }
        })
        .await;
        end(nodes).await;
    });
}
