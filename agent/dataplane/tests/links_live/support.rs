//! Network namespaces for one test: without names, so that nothing is left of them however the test ends.

use std::{
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{
        InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    },
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteProtocol, RouteType},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sched::{CloneFlags, setns, unshare};
use nsm_core::{
    link::{LinkAlias, LinkSpec, RouteSpec},
    net::{IfName, MacAddr},
};
use nsm_dataplane::netns::Netns;

/// Longer than anything takes on a busy machine; nothing waits it out unless it fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// A new namespace, which lives as long as its handles and what is in it. Its loopback is up, as a pod's is: without any IPv4 address
/// the kernel has no table of local ones, and takes no next hop.
pub(crate) fn netns() -> Netns {
    const LOOPBACK: u32 = 1;
    let netns = in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace takes root");
        Netns::current().unwrap()
    });
    set_up(&netns, LOOPBACK, true);
    netns
}

/// Runs a job in a namespace.
pub(crate) fn inside<T: Send>(netns: &Netns, job: impl FnOnce() -> T + Send) -> T {
    in_thread(|| {
        setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
        job()
    })
}

pub(crate) fn in_thread<T: Send>(job: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(job).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The names of a namespace's links, but for the loopback, as /proc shows them: what the code under test reads by netlink.
pub(crate) fn link_names(netns: &Netns) -> Vec<String> {
    let table = inside(netns, || {
        std::fs::read_to_string("/proc/thread-self/net/dev").unwrap()
    });
    let names = table
        .lines()
        .skip(2)
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    names.filter(|name| name != "lo").collect()
}

/// Runs `ip` in a namespace, as a person would.
pub(crate) fn ip_tool(netns: &Netns, arguments: &[&str]) {
    run_tool(netns, "ip", arguments);
}

/// Runs a program with these words in a namespace, and gives back what it wrote.
pub(crate) fn tool(netns: &Netns, program: &str, words: &str) -> String {
    run_tool(netns, program, &words.split(' ').collect::<Vec<_>>())
}

fn run_tool(netns: &Netns, program: &str, arguments: &[&str]) -> String {
    let output = inside(netns, || {
        std::process::Command::new(program)
            .args(arguments)
            .output()
            .unwrap()
    });
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Waits for a condition; the last thing seen tells why it never came.
pub(crate) fn eventually<T: std::fmt::Debug>(
    what: &str,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) => assert!(start.elapsed() < PATIENCE, "{what} did not come: {seen}"),
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// An alias that no other test has.
pub(crate) fn alias() -> LinkAlias {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    LinkAlias::new(domain(), format!("connection-{id}")).unwrap()
}

/// The domain of this test binary's links.
pub(crate) fn domain() -> String {
    format!("test-{}.example", std::process::id())
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(crate) fn mac(last: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, last])
}

pub(crate) fn route(prefix: &str, via: Option<&str>) -> RouteSpec {
    RouteSpec {
        prefix: net(prefix),
        via: via.map(ip),
    }
}

pub(crate) fn name(text: &str) -> IfName {
    IfName::try_from(text).unwrap()
}

/// One side of a connection as NSM gives it: host addresses and a route to the other.
pub(crate) fn link(own: u8, other: u8) -> LinkSpec {
    LinkSpec {
        alias: alias(),
        name: name("nsm-1"),
        mac: Some(mac(own)),
        mtu: 1450,
        addresses: vec![
            net(&format!("172.16.1.{own}/32")),
            net(&format!("fd00:1::{own}/128")),
        ],
        routes: vec![
            route(&format!("172.16.1.{other}/32"), None),
            route(&format!("fd00:1::{other}/128"), None),
        ],
        neighbours: vec![
            (ip(&format!("172.16.1.{other}")), mac(other)),
            (ip(&format!("fd00:1::{other}")), mac(other)),
        ],
    }
}

/// Says something to the kernel in a namespace, as somebody else than the agent would.
pub(crate) fn meddle(netns: &Netns, message: RouteNetlinkMessage, flags: u16) {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let answer = inside(netns, || {
        let socket = Socket::new(NETLINK_ROUTE).unwrap();
        socket.send_to(&bytes, &SocketAddr::new(0, 0), 0).unwrap();
        socket.recv_from_full().unwrap().0
    });
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).unwrap();
    match answer.payload {
        NetlinkPayload::Error(error) => assert_eq!(error.code, None, "{message:?}: {error}"),
        other => panic!("{other:?}"),
    }
}

/// A link that is not ours.
pub(crate) fn add_foreign_link(netns: &Netns, name: &str) {
    let mut link = LinkMessage::default();
    let peer = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    meddle(
        netns,
        RouteNetlinkMessage::NewLink(link),
        NLM_F_CREATE | NLM_F_EXCL,
    );
}

/// A VXLAN device in a namespace, whose socket is in another one: as a pod with CAP_NET_ADMIN makes it, or another program of the node.
/// Its packets go to the first port, from a socket that is bound to the second.
pub(crate) fn add_foreign_vxlan(socket: &Netns, device: &Netns, (to, from): (u16, u16)) {
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::IfName("vxlan0".to_owned()),
        LinkAttribute::NetNsFd(device.as_fd().as_raw_fd()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::Id(100),
                InfoVxlan::Port(from),
            ])),
        ]),
    ];
    meddle(
        socket,
        RouteNetlinkMessage::NewLink(link),
        NLM_F_CREATE | NLM_F_EXCL,
    );
    ip_tool(
        device,
        &[
            "link",
            "set",
            "vxlan0",
            "up",
            "address",
            "02:00:00:00:00:01",
        ],
    );
    let entry = format!("fdb append 00:00:00:00:00:00 dev vxlan0 dst 192.0.2.2 port {to} self");
    let output = inside(device, || {
        std::process::Command::new("bridge")
            .args(entry.split(' '))
            .output()
            .unwrap()
    });
    assert!(output.status.success(), "bridge {entry}: {output:?}");
}

/// Takes a link up or down.
pub(crate) fn set_up(netns: &Netns, index: u32, up: bool) {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = if up {
        LinkFlags::Up
    } else {
        LinkFlags::empty()
    };
    link.header.change_mask = LinkFlags::Up;
    meddle(netns, RouteNetlinkMessage::SetLink(link), 0);
}

pub(crate) fn delete_link(netns: &Netns, index: u32) {
    let mut link = LinkMessage::default();
    link.header.index = index;
    meddle(netns, RouteNetlinkMessage::DelLink(link), 0);
}

/// Adds an address that nobody asked the agent for.
pub(crate) fn add_address(netns: &Netns, index: u32, address: IpNet) {
    let mut message = AddressMessage::default();
    message.header.family = if address.addr().is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address.addr()),
        AddressAttribute::Address(address.addr()),
    ];
    meddle(
        netns,
        RouteNetlinkMessage::NewAddress(message),
        NLM_F_CREATE,
    );
}

/// Adds a route over a link, as a person with `ip route add` would.
pub(crate) fn add_route(netns: &Netns, index: u32, prefix: IpNet, via: Option<IpAddr>) {
    let ways = [RouteAttribute::Oif(index)]
        .into_iter()
        .chain(via.map(|via| RouteAttribute::Gateway(via.into())));
    put_route(netns, prefix, ways);
}

/// A route of several ways: interface and gateway of each.
pub(crate) fn add_multipath_route(netns: &Netns, prefix: IpNet, ways: &[(u32, IpAddr)]) {
    let hop = |&(index, gateway): &(u32, IpAddr)| {
        let mut hop = RouteNextHop::default();
        hop.interface_index = index;
        hop.attributes = vec![RouteAttribute::Gateway(gateway.into())];
        hop
    };
    let ways = ways.iter().map(hop).collect();
    put_route(netns, prefix, [RouteAttribute::MultiPath(ways)]);
}

fn put_route(netns: &Netns, prefix: IpNet, ways: impl IntoIterator<Item = RouteAttribute>) {
    let mut message = RouteMessage::default();
    message.header.address_family = if prefix.addr().is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    message.header.destination_prefix_length = prefix.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![RouteAttribute::Destination(prefix.addr().into())];
    message.attributes.extend(ways);
    meddle(
        netns,
        RouteNetlinkMessage::NewRoute(message),
        NLM_F_CREATE | NLM_F_REPLACE,
    );
}

/// A veth pair as a person makes it, each end in its namespace by its name, and up. The second is in a namespace of its own.
pub(crate) fn veth(one: (&Netns, &str), two: (&Netns, &str)) {
    let place = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        two.0.as_fd().as_raw_fd()
    );
    let words = format!(
        "link add {} type veth peer name {} netns {place}",
        one.1, two.1
    );
    ip_tool(one.0, &words.split(' ').collect::<Vec<_>>());
    for (netns, name) in [one, two] {
        ip_tool(netns, &["link", "set", name, "up"]);
    }
    for (netns, name) in [one, two] {
        eventually("the carrier", || {
            let output = inside(netns, || {
                std::process::Command::new("ip")
                    .args(["-o", "link", "show", name])
                    .output()
            });
            let shown = String::from_utf8(output.unwrap().stdout).unwrap();
            if shown.contains("state UP") {
                Ok(())
            } else {
                Err(shown)
            }
        });
    }
}

/// Two nodes on one wire, 192.0.2.1 and 192.0.2.2.
pub(crate) fn two_nodes() -> (Netns, Netns) {
    let (one, two) = (netns(), netns());
    veth((&one, "eth0"), (&two, "eth0"));
    for (node, number) in [(&one, 1), (&two, 2)] {
        for address in [
            format!("192.0.2.{number}/24"),
            format!("2001:db8::{number}/64"),
        ] {
            ip_tool(node, &["address", "add", &address, "dev", "eth0", "nodad"]);
        }
    }
    (one, two)
}
