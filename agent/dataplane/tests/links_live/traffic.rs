//! Packets through what was made: two nodes on a wire, a pod on each.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::mpsc,
    time::Duration,
};

use nsm_core::link::{Traffic, VxlanSpec};
use nsm_dataplane::{links::Links, netns::Netns};

use crate::support::{add_address, eventually, inside, ip, link, net, netns, two_nodes, vxlan};

/// Sends a datagram from one namespace to another and back. Retries, for a datagram may be lost.
fn echo(from: &Netns, to: &Netns, address: &str, size: usize) {
    let address: SocketAddr = address.parse().unwrap();
    let (server, client) = (
        inside(to, || UdpSocket::bind(address).unwrap()),
        inside(from, || {
            UdpSocket::bind(if address.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            })
            .unwrap()
        }),
    );
    for socket in [&server, &client] {
        socket
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
    }
    client.connect(address).unwrap();
    let sent: Vec<u8> = (0..size).map(|at| at.to_le_bytes()[0]).collect();
    let (stop, stopped) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut buffer = vec![0; 65536];
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                if let Ok((length, peer)) = server.recv_from(&mut buffer) {
                    server.send_to(&buffer[..length], peer).unwrap();
                }
            }
        });
        eventually(&format!("the echo of {size} bytes from {address}"), || {
            client.send(&sent).map_err(|error| error.to_string())?;
            let mut buffer = vec![0; 65536];
            let length = client
                .recv(&mut buffer)
                .map_err(|error| error.to_string())?;
            if buffer[..length] == sent {
                Ok(())
            } else {
                Err("another datagram came back".to_owned())
            }
        });
        drop(stop);
    });
}

type Side = (Links, Netns, VxlanSpec);

async fn tunnel(nodes: (&Netns, &Netns), vni: u32, local: [&str; 2]) -> (Side, Side) {
    let side = async |node: &Netns, local: &str, remote: &str, own: u8, other: u8| {
        let (links, pod) = (Links::in_namespace(node.clone()), netns());
        let spec = VxlanSpec {
            link: link(own, other),
            local: ip(local),
            remote: ip(remote),
            ..vxlan(vni)
        };
        links.up_vxlan(&pod, &spec).await.unwrap();
        (links, pod, spec)
    };
    (
        side(nodes.0, local[0], local[1], 1, 2).await,
        side(nodes.1, local[1], local[0], 2, 1).await,
    )
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn pods_talk_through_vxlan() {
    let nodes = two_nodes().await;
    for local in [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]] {
        let ((links, pod, spec), (links_b, pod_b, spec_b)) =
            tunnel((&nodes.0, &nodes.1), 77, local).await;
        echo(&pod, &pod_b, "172.16.1.2:7000", 100);
        echo(&pod_b, &pod, "[fd00:1::1]:7000", 100);

        let reading = &links.readings(&pod).await.unwrap()[&spec.link.alias];
        let Traffic { sent, received } = reading.traffic;
        for count in [sent, received] {
            assert!(count.packets >= 2 && count.bytes >= 2 * 128, "{count:?}");
        }
        assert_eq!((reading.rx_dropped, reading.tx_errors), (0, 0));
        assert!(reading.link.up, "{reading:?}");
        assert_eq!(reading.link.mtu, spec.link.mtu);
        let mtu = links.underlay_mtu(spec.remote).await.unwrap()
            - nsm_core::link::vxlan_overhead(spec.remote);
        assert_eq!(mtu, if spec.remote.is_ipv4() { 1450 } else { 1430 });
        // A full packet fits, don't fragment set.
        for (links, pod, mut spec) in [
            (&links, &pod, spec.clone()),
            (&links_b, &pod_b, spec_b.clone()),
        ] {
            spec.link.mtu = mtu;
            links.up_vxlan(pod, &spec).await.unwrap();
        }
        echo(&pod, &pod_b, "172.16.1.2:7001", mtu as usize - 28);

        assert!(links.down(&pod, &spec.link.alias).await.unwrap());
        assert!(links.readings(&pod).await.unwrap().is_empty());
    }
}

/// The peer's node comes back with another address: the tunnel follows without being made anew.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn a_tunnel_follows_its_peer() {
    let (node_a, node_b) = two_nodes().await;
    let ((links, pod, mut spec), (links_b, pod_b, mut spec_b)) =
        tunnel((&node_a, &node_b), 78, ["192.0.2.1", "192.0.2.2"]).await;
    echo(&pod, &pod_b, "172.16.1.2:7000", 100);
    let before = links
        .observe(&pod, &spec.link.alias)
        .await
        .unwrap()
        .unwrap()
        .index;
    let eth0 = inside(&node_b, || nix::net::if_::if_nametoindex("eth0").unwrap());
    add_address(&node_b, eth0, net("192.0.2.22/24"));
    spec.remote = ip("192.0.2.22");
    spec_b.local = ip("192.0.2.22");
    assert_eq!(links.up_vxlan(&pod, &spec).await.unwrap().index, before);
    links_b.up_vxlan(&pod_b, &spec_b).await.unwrap();
    echo(&pod, &pod_b, "172.16.1.2:7000", 100);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: makes network namespaces and links"]
async fn pods_talk_through_veth() {
    let (pod_a, pod_b) = (netns(), netns());
    let (a, b) = (link(1, 2), link(2, 1));
    Links::in_namespace(netns())
        .up_veth((&pod_a, &a), (&pod_b, &b))
        .await
        .unwrap();
    echo(&pod_a, &pod_b, "172.16.1.2:7000", 100);
    echo(&pod_b, &pod_a, "[fd00:1::1]:7000", 1000);
}
