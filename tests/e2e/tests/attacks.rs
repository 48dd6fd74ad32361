//! Root in a pod, a user of the node, and a neighbour against the tunnels of others: nothing reaches a pod but what its peer sends, and
//! nothing reaches a peer but what the pod may send.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
};

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{
    PATIENCE, Served, client_address, endpoint_address,
    forged::{self, Cut, Inner, TUNNEL_PORT},
    ping,
};
use nsm_world::{Agent, Cloud, Pod, wait_until};
use serde_json::Value;

/// Where the client of an attacked connection listens.
const PORT: u16 = 7_000;

/// Runs a program with these words in a pod; whether it succeeded.
fn tries(pod: &Pod, program: &str, words: &str) -> Result<bool> {
    let mut command = pod.command(program)?;
    let output = command.args(words.split_whitespace()).output()?;
    println!("{program} {words}: {output:?}");
    Ok(output.status.success())
}

/// As [`tries`], where it must succeed.
fn does(pod: &Pod, program: &str, words: &str) -> Result<()> {
    ensure!(tries(pod, program, words)?, "{program} {words}");
    Ok(())
}

/// How many pings have come to a pod (RFC 2013, `icmpInEchos`).
fn pings_at(pod: &Pod) -> Result<u64> {
    let table = pod.inside(|| fs::read_to_string("/proc/thread-self/net/snmp"))??;
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("Icmp: "));
    let (names, values) = (lines.next(), lines.next());
    let mut columns = names
        .unwrap_or_default()
        .split(' ')
        .zip(values.unwrap_or_default().split(' '));
    let (_, value) = columns
        .find(|(name, _)| *name == "InEchos")
        .with_context(|| format!("no InEchos in {table}"))?;
    Ok(value.parse()?)
}

/// How many packets an agent's node has dropped for one of these reasons.
fn dropped(agent: &Agent, reasons: &[&str]) -> Result<u64> {
    let drops = &agent.status()?["drops"];
    Ok(reasons
        .iter()
        .filter_map(|reason| drops[*reason].as_u64())
        .sum())
}

fn text<'a>(event: &'a Value, field: &str) -> Result<&'a str> {
    let text = event["connection"][field].as_str();
    text.with_context(|| format!("no {field} in {event}"))
}

fn vni(event: &Value) -> Result<u32> {
    let vni = event["connection"]["vni"].as_u64();
    Ok(vni
        .with_context(|| format!("no VNI in {event}"))?
        .try_into()?)
}

fn v4(text: &str) -> Result<Ipv4Addr> {
    text.parse()
        .with_context(|| format!("{text} is no address"))
}

/// The Ethernet address of a link, as text.
fn mac(pod: &Pod, interface: &str) -> Result<String> {
    shown(pod, &["link", "show", "dev", interface], "address")
}

/// The Ethernet address that a pod has for a neighbour.
fn neighbour(pod: &Pod, address: &str) -> Result<String> {
    shown(pod, &["neigh", "show", "to", address], "lladdr")
}

/// A field of the first entry that `ip` shows.
fn shown(pod: &Pod, words: &[&str], field: &str) -> Result<String> {
    let shown = pod.command("ip")?.arg("-json").args(words).output()?;
    let entries: Value = serde_json::from_slice(&shown.stdout)?;
    let text = entries[0][field].as_str();
    Ok(text
        .with_context(|| format!("ip {words:?} shows no {field}"))?
        .to_owned())
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Result<Vec<u8>, _> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect();
    let bytes = bytes.with_context(|| format!("{text} is no Ethernet address"))?;
    bytes
        .try_into()
        .ok()
        .with_context(|| format!("{text} is no Ethernet address"))
}

/// What a tenant tries leaves its pod and reaches nobody: `reason` counts it on its node or the other.
fn reaches_nobody(pair: &Served, address: &str, words: &[&str], reason: &str) -> Result<()> {
    let endpoint = pair.world.pod("endpoint")?;
    let (tenant, came) = (pair.client_pod(0)?, pings_at(&endpoint)?);
    let counted =
        || Ok::<_, anyhow::Error>(dropped(&pair.near, &[reason])? + dropped(&pair.far, &[reason])?);
    let before = counted()?;
    ensure!(
        ping(&tenant, address, 3, words)? == 0,
        "{words:?} was answered"
    );
    ensure!(
        pings_at(&endpoint)? == came,
        "{words:?} came to the endpoint"
    );
    wait_until("the attempts to be counted", PATIENCE, || {
        counted().is_ok_and(|now| now >= before + 3)
    })
    .with_context(|| format!("{reason} for {words:?}"))
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_tenant_speaks_by_no_other_address_than_its_own() -> Result<()> {
    let pair = Served::start("spoofing", Cloud::Packet, 1)?;
    let (client, connected) = pair.connect(0)?;
    let (tenant, address) = (pair.client_pod(0)?, endpoint_address(&connected)?);
    let interface = text(&connected, "interface")?;
    pair.assert_pings(0, &connected, 3)?;

    does(
        &tenant,
        "ip",
        &format!("addr add 10.99.0.1/32 dev {interface}"),
    )?;
    reaches_nobody(&pair, &address, &["-I", "10.99.0.1"], "pod_wrong_source")?;
    // Another address of the link itself is put right within half a second, so the frames are made by hand.
    forge_frames(&pair, interface, "02:00:00:00:00:99")?;
    pair.assert_pings(0, &connected, 3)?;
    pair.close([client])
}

/// Sends frames from the tenant to the endpoint's Ethernet address from an Ethernet address that is not the link's: none arrives, and each is
/// counted.
fn forge_frames(pair: &Served, interface: &str, from: &str) -> Result<()> {
    const SEND: &str = "\
import socket, sys
interface, to, source = sys.argv[1:]
station = lambda text: bytes.fromhex(text.replace(':', ''))
sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sender.bind((interface, 0))
for _ in range(3):
    sender.send(station(to) + station(source) + bytes.fromhex('0800') + bytes(60))
";
    let reason = &["pod_wrong_mac"];
    let before = dropped(&pair.near, reason)?;
    let mut python = pair.client_pod(0)?.command("python3")?;
    let to = neighbour_of(pair)?;
    let status = python.args(["-c", SEND, interface, &to, from]).status()?;
    ensure!(status.success(), "the frames were not sent");
    wait_until("the frames to be counted", PATIENCE, || {
        dropped(&pair.near, reason).is_ok_and(|now| now >= before + 3)
    })?;
    Ok(())
}

/// The Ethernet address of the endpoint's only link.
fn neighbour_of(pair: &Served) -> Result<String> {
    let endpoint = pair.world.pod("endpoint")?;
    let links = endpoint.links()?;
    let link = links
        .iter()
        .find(|link| link.is_of_connection())
        .context("a link")?;
    mac(&endpoint, &link.name)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_tenant_reaches_no_other_tunnel_by_editing_its_link() -> Result<()> {
    let pair = Served::start("editing", Cloud::Packet, 2)?;
    let (mine, my_event) = pair.connect(0)?;
    let (other, other_event) = pair.connect(1)?;
    let tenant = pair.client_pod(0)?;
    let interface = text(&my_event, "interface")?;
    let (target, far) = (endpoint_address(&other_event)?, pair.far.node().public_ip());
    let target_mac = neighbour(&pair.client_pod(1)?, &target)?;

    // The other tenant's endpoint is at the other end of the other tenant's tunnel.
    let entry = format!(
        "fdb replace {target_mac} dev {interface} dst {far} vni {} self",
        vni(&other_event)?
    );
    // Of a plain link the kernel may take such an entry, which then means nothing.
    tries(&tenant, "bridge", &entry)?;
    does(
        &tenant,
        "ip",
        &format!("route replace {target}/32 dev {interface}"),
    )?;
    does(
        &tenant,
        "ip",
        &format!("neigh replace {target} lladdr {target_mac} dev {interface}"),
    )?;
    reaches_nobody(&pair, &target, &[], "tunnel_wrong_mac")?;
    pair.assert_pings(1, &other_event, 3)?;
    pair.close([mine, other])
}

/// A connection of the first client, seen by somebody who knows all of it but is not its peer.
struct Target {
    pair: Served,
    /// Receives what comes to the client's port.
    heard: UdpSocket,
    client: Ipv4Addr,
    endpoint: Ipv4Addr,
    /// From the endpoint to the client.
    macs: [[u8; 6]; 2],
    vni: u32,
}

impl Target {
    fn connect(name: &str) -> Result<Self> {
        let pair = Served::start(name, Cloud::Packet, 2)?;
        let (client, connected) = pair.connect(0)?;
        // It ends with the world.
        std::mem::forget(client);
        let pod = pair.client_pod(0)?;
        let endpoint = endpoint_address(&connected)?;
        let interface = text(&connected, "interface")?;
        let macs = [
            parse_mac(&neighbour(&pod, &endpoint)?)?,
            parse_mac(&mac(&pod, interface)?)?,
        ];
        let heard = pod.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)))??;
        heard.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            heard,
            client: v4(&client_address(&connected)?)?,
            endpoint: v4(&endpoint)?,
            macs,
            vni: vni(&connected)?,
            pair,
        })
    }

    /// What the endpoint would send: the payload of the tunnel's UDP.
    fn payload(&self, text: &str) -> Vec<u8> {
        let inner = Inner {
            macs: self.macs,
            source: SocketAddrV4::new(self.endpoint, 9),
            destination: SocketAddrV4::new(self.client, PORT),
            text,
        };
        inner.in_vxlan(self.vni)
    }

    /// The address that the peer's packets come from.
    fn peer(&self) -> Ipv4Addr {
        self.pair.far.node().public_ip()
    }

    fn own(&self) -> Ipv4Addr {
        self.pair.near.node().private_ip()
    }

    /// `count` packets were dropped for one of these reasons since `before`, and the client has heard nothing but its endpoint.
    fn is_untouched(&self, before: u64, count: u64, reasons: &[&str]) -> Result<()> {
        self.hears_its_endpoint_only()?;
        wait_until("the attempts to be counted", PATIENCE, || {
            dropped(&self.pair.near, reasons).is_ok_and(|now| now >= before + count)
        })
        .with_context(|| format!("{:?}", self.pair.near.status()))?;
        self.hears_its_endpoint_only()
    }

    fn hears_its_endpoint_only(&self) -> Result<()> {
        let endpoint = self.pair.world.pod("endpoint")?;
        endpoint.inside(|| {
            let socket = UdpSocket::bind((self.endpoint, 0))?;
            socket.send_to(b"endpoint", (self.client, PORT))
        })??;
        let mut buffer = [0; 100];
        let length = self.heard.recv(&mut buffer)?;
        let said = String::from_utf8_lossy(&buffer[..length]);
        ensure!(said == "endpoint", "the client heard: {said}");
        Ok(())
    }
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_user_of_the_node_reaches_no_pod_by_the_tunnels_port() -> Result<()> {
    let target = Target::connect("local-user")?;
    let node = target.pair.near.node();
    let reasons = ["tunnel_unknown", "fence_foreign_sender"];
    let before = dropped(&target.pair.near, &reasons)?;
    for address in [Ipv4Addr::LOCALHOST, target.own()] {
        let payload = target.payload(&format!("to {address}"));
        node.inside(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            // Refused or not, it must not arrive.
            let _ = socket.send_to(&payload, (address, TUNNEL_PORT));
            Ok::<_, std::io::Error>(())
        })??;
    }
    target.is_untouched(before, 2, &reasons)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_neighbour_reaches_no_pod_by_the_nodes_address() -> Result<()> {
    let target = Target::connect("neighbour")?;
    let neighbour = target.pair.client_pod(1)?;
    let (inside, outside) = (Ipv4Addr::new(198, 19, 7, 2), Ipv4Addr::new(198, 19, 7, 1));
    wire(&target, &neighbour, inside, outside)?;
    let reasons = ["tunnel_unknown", "fence_astray", "tiny_fragment"];
    let before = dropped(&target.pair.near, &reasons)?;
    let sources = [inside, target.peer()];
    for source in sources {
        for cut in [Cut::Whole, Cut::BeforeVxlan] {
            let payload = target.payload(&format!("{cut:?} from {source}"));
            neighbour.inside(|| forged::send(source, target.own(), &payload, cut))??;
        }
    }
    target.is_untouched(before, 4, &reasons)
}

/// Gives a pod a link to its node, as a CNI does.
fn wire(target: &Target, pod: &Pod, inside: Ipv4Addr, outside: Ipv4Addr) -> Result<()> {
    let node = target.pair.near.node();
    let on_node = |words: &str| {
        let done = node
            .command("ip")?
            .args(words.split_whitespace())
            .status()?;
        ensure!(done.success(), "ip {words}");
        Ok(())
    };
    let netns = pod.netns();
    let netns = netns.display();
    on_node(&format!(
        "link add cni0 type veth peer name eth0 netns {netns}"
    ))?;
    on_node(&format!("addr add {outside}/30 dev cni0"))?;
    on_node("link set cni0 up")?;
    does(pod, "ip", &format!("addr add {inside}/30 dev eth0"))?;
    does(pod, "ip", "link set eth0 up")?;
    does(pod, "ip", &format!("route add default via {outside}"))
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_stranger_reaches_no_pod_by_fragments_that_hide_the_tunnel() -> Result<()> {
    let target = Target::connect("fragments")?;
    let reasons = ["tunnel_unknown", "wrong_source", "tiny_fragment"];
    let before = dropped(&target.pair.near, &reasons)?;
    let stranger = Ipv4Addr::new(192, 0, 2, 99);
    for cut in [Cut::Whole, Cut::BeforeVxlan] {
        let payload = target.payload(&format!("{cut:?} from {stranger}"));
        target
            .pair
            .world
            .in_internet(|| forged::send(stranger, target.own(), &payload, cut))??;
    }
    target.is_untouched(before, 2, &reasons)
}
