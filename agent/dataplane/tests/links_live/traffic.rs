//! Packets through a pair of pods.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::mpsc,
    time::Duration,
};

use nsm_dataplane::{links::Links, netns::Netns};

use crate::support::{eventually, inside, link, netns};

/// Sends a datagram from one namespace to another and back. Retries, for a datagram may be lost.
pub(crate) fn echo(from: &Netns, to: &Netns, address: &str, size: usize) {
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
