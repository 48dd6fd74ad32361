//! What a connection brings into a pod that has addresses of its own: others are chosen, or it is refused with both named.

use anyhow::{Result, ensure};
use nsm_e2e::{CIDR, PATIENCE, Pair, REMOTE_SERVICE, Served, endpoint_address, ping};
use nsm_world::{Cloud, Pod, World};

const OTHER_SERVICE: &str = "other-service";

/// Runs `ip` in the pod.
fn ip(pod: &Pod, words: &str) -> Result<String> {
    let output = pod.command("ip")?.args(words.split_whitespace()).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {words}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Gives the pod an address on a link that is no connection's.
fn own_address(pod: &Pod, address: &str) -> Result<()> {
    ip(pod, "link add own0 type veth peer name own1")?;
    ip(pod, &format!("address add {address} dev own0"))?;
    ip(pod, "link set own1 up")?;
    ip(pod, "link set own0 up")?;
    Ok(())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn an_endpoint_leaves_out_what_the_pod_has() -> Result<()> {
    let pair = Served::start("leaves-out", Cloud::Packet, 1)?;
    own_address(&pair.client_pod(0)?, "172.16.1.2/32")?;
    let (client, connected) = pair.connect(0)?;
    let given = &connected["connection"]["src_addresses"];
    pair.assert_pings(0, &connected, 3)?;
    let addresses = ip(&pair.client_pod(0)?, "-o -4 address show dev nsm-1")?;
    ensure!(!addresses.contains("172.16.1.2/"), "{given}: {addresses}");
    pair.close([client])
}

/// A node's own addresses are nobody's either: the endpoint has no others, and the client is told so.
#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_service_without_other_addresses_is_refused() -> Result<()> {
    let pair = Pair::start("no-others", Cloud::Packet, 1)?;
    let pod = pair.world.pod("endpoint")?;
    let _endpoint =
        pair.far
            .endpoint(&pair.world, &pod, "icmp-responder", "172.16.1.2/31", |_| {})?;
    let before = pair.footprint()?;
    own_address(&pair.client_pod(0)?, "172.16.1.2/32")?;
    let refused = pair.refused(REMOTE_SERVICE, PATIENCE, |_| {})?;
    ensure!(
        refused.contains("172.16.1.2/31") && refused.contains("excluded"),
        "{refused}"
    );
    pair.assert_clean(&before)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_pod_uses_two_services_of_the_same_prefix() -> Result<()> {
    let world = World::builder("two-services")
        .domain("cluster-1.example", |domain| {
            domain.node("node-1").pod("client-0")
        })
        .domain("cluster-2.example", |domain| {
            domain.node("node-2").pod("endpoint").pod("other")
        });
    let pair = Served::by(Pair::start_in(world.build()?)?)?;
    let pod = pair.world.pod("other")?;
    let _other = pair
        .far
        .endpoint(&pair.world, &pod, OTHER_SERVICE, CIDR, |_| {})?;
    let (first, connected) = pair.connect(0)?;
    let client_pod = pair.client_pod(0)?;
    let name = format!("{OTHER_SERVICE}@cluster-2.example");
    let second = pair
        .near
        .connect(&pair.world, &client_pod, &name, |command| {
            command.args(["--interface", "nsm-2"]);
        })?;
    let also = second.wait_for_event("connected", PATIENCE)?;
    for connected in [&connected, &also] {
        let address = endpoint_address(connected)?;
        ensure!(ping(&client_pod, &address, 3, &[])? == 3, "{address}");
    }
    ensure!(endpoint_address(&connected)? != endpoint_address(&also)?);
    pair.close([first, second])
}
