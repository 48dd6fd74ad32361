//! Mechanisms and contexts, of a client on the node and of another node.

use nsm_proto::{
    connectioncontext::{ConnectionContext, EthernetContext, IpContext, Route},
    networkservice::NetworkServiceRequest,
};
use tonic::Code;

use super::{SERVICE, all_are_refused, connection, context, parameter, service};
use crate::support::{Client, World, mechanism};

#[tokio::test]
async fn mechanisms_and_contexts_of_a_client() {
    let world = World::two().await;
    let [a, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::on_node(a).await;
    all_are_refused(
        &client,
        &[
            (
                "nothing offered",
                |it| it.mechanism_preferences.clear(),
                Code::InvalidArgument,
                &["offers no mechanism", "LOCAL/KERNEL"],
            ),
            (
                "seventeen offered",
                |it| {
                    let first = it.mechanism_preferences[0].clone();
                    it.mechanism_preferences = vec![first; 17];
                },
                Code::InvalidArgument,
                &["17 mechanism preferences", "more than the 16"],
            ),
            (
                "nothing in common",
                |it| {
                    it.mechanism_preferences = vec![
                        mechanism("LOCAL", "MEMIF", &[]),
                        mechanism("REMOTE", "VXLAN", &[]),
                    ]
                },
                Code::InvalidArgument,
                &[
                    "no common mechanism",
                    "LOCAL/MEMIF, REMOTE/VXLAN offered",
                    "LOCAL/KERNEL supported",
                ],
            ),
            (
                "no namespace",
                |it| parameter(it, "inodeURL", ""),
                Code::InvalidArgument,
                &["inodeURL"],
            ),
            (
                "a namespace that is none",
                |it| parameter(it, "inodeURL", "pid://1"),
                Code::InvalidArgument,
                &["pid://1", "inode://"],
            ),
            (
                "a relative path",
                |it| parameter(it, "inodeURL", "file://run/netns/a"),
                Code::InvalidArgument,
                &["absolute path"],
            ),
            (
                "a long interface",
                |it| parameter(it, "name", "sixteen-letters-"),
                Code::InvalidArgument,
                &["sixteen-letters-", "16 bytes", "15"],
            ),
            (
                "a bad interface",
                |it| parameter(it, "name", "a/b"),
                Code::InvalidArgument,
                &["a/b"],
            ),
            (
                "a bad address",
                |it| {
                    context(
                        it,
                        IpContext {
                            src_ip_addrs: vec!["10.0.0.0.1".into()],
                            ..IpContext::default()
                        },
                    )
                },
                Code::InvalidArgument,
                &["src_ip_addrs `10.0.0.0.1`"],
            ),
            (
                "a bad route",
                |it| {
                    context(
                        it,
                        IpContext {
                            src_routes: vec![Route {
                                prefix: "10/8".into(),
                                next_hop: String::new(),
                            }],
                            ..IpContext::default()
                        },
                    )
                },
                Code::InvalidArgument,
                &["src_routes `10/8`"],
            ),
            (
                "a bad next hop",
                |it| {
                    context(
                        it,
                        IpContext {
                            dst_routes: vec![Route {
                                prefix: "10.0.0.0/8".into(),
                                next_hop: "gateway".into(),
                            }],
                            ..IpContext::default()
                        },
                    )
                },
                Code::InvalidArgument,
                &["dst_routes `gateway`"],
            ),
            (
                "a bad MAC",
                |it| {
                    connection(it).context = Some(ConnectionContext {
                        ethernet_context: Some(EthernetContext {
                            dst_mac: "02:00".into(),
                            ..EthernetContext::default()
                        }),
                        ..ConnectionContext::default()
                    })
                },
                Code::InvalidArgument,
                &["dst_mac `02:00`"],
            ),
        ],
    )
    .await;
    assert!(endpoint.requests().is_empty(), "the endpoint need not know");
    world.settles(&before).await;
}

#[tokio::test]
async fn tunnels_that_another_node_offers() {
    fn vxlan(it: &mut NetworkServiceRequest, key: &str, value: &str) {
        it.mechanism_preferences = vec![mechanism(
            "REMOTE",
            "VXLAN",
            &[("src_ip", "192.0.2.77"), ("src_port", "4789")],
        )];
        parameter(it, key, value);
        service(it, "icmp-responder@anything.example");
    }
    let world = World::two().await;
    let [_, b] = world.agents();
    let endpoint = world.endpoint(b, "nse-1", "icmp-responder").await;
    let before = world.held();
    let client = Client::over_network(b).await;
    all_are_refused(
        &client,
        &[
            (
                "VNI 0",
                |it| vxlan(it, "vni", "0"),
                Code::InvalidArgument,
                &["vni = `0`", "16777215"],
            ),
            (
                "VNI of 25 bits",
                |it| vxlan(it, "vni", "16777216"),
                Code::InvalidArgument,
                &["vni = `16777216`"],
            ),
            (
                "VNI in words",
                |it| vxlan(it, "vni", "seven"),
                Code::InvalidArgument,
                &["vni = `seven`"],
            ),
            (
                "no address",
                |it| vxlan(it, "src_ip", ""),
                Code::InvalidArgument,
                &["src_ip"],
            ),
            (
                "a bad address",
                |it| vxlan(it, "src_ip", "192.0.2"),
                Code::InvalidArgument,
                &["src_ip = `192.0.2`"],
            ),
            (
                "a group's address",
                |it| vxlan(it, "src_ip", "224.0.0.1"),
                Code::InvalidArgument,
                &["224.0.0.1", "one host"],
            ),
            (
                "any address",
                |it| vxlan(it, "src_ip", "0.0.0.0"),
                Code::InvalidArgument,
                &["0.0.0.0"],
            ),
            (
                "port 0",
                |it| vxlan(it, "src_port", "0"),
                Code::InvalidArgument,
                &["src_port = `0`"],
            ),
            (
                "port 65536",
                |it| vxlan(it, "src_port", "65536"),
                Code::InvalidArgument,
                &["src_port = `65536`"],
            ),
            (
                "a bad MTU",
                |it| vxlan(it, "MTU", "12"),
                Code::InvalidArgument,
                &["MTU = `12`"],
            ),
            (
                "a namespace over the network",
                |it| service(it, SERVICE),
                Code::InvalidArgument,
                &[
                    "no common mechanism",
                    "LOCAL/KERNEL offered",
                    "REMOTE/VXLAN supported",
                ],
            ),
            (
                "no such service",
                |it| {
                    vxlan(it, "MTU", "1400");
                    service(it, "other@x.example");
                },
                Code::NotFound,
                &["`other`", "cluster-2.example"],
            ),
        ],
    )
    .await;
    assert!(endpoint.requests().is_empty());
    world.settles(&before).await;
    // The same client, with all of it right.
    let mut request = client.request_for(SERVICE);
    vxlan(&mut request, "MTU", "1300");
    let granted = client.send(request).await.expect("granted");
    assert_eq!(granted.connection.context.clone().expect("one").mtu, 1300);
    client.close(&granted.connection).await.expect("closed");
    world.settles(&before).await;
}
