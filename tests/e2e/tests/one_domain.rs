//! Inside one domain: on one node, and on two nodes that share a registry.

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{CIDR, PATIENCE, SERVICE, close, endpoint_address, links_go, ping, started};
use nsm_world::{Cloud, World};

/// The kinds of the links that agents made for connections.
fn kinds(world: &World) -> Result<Vec<String>> {
    let links = world.leaks()?.links.into_iter();
    let of_connections = links.filter(|link| link.is_of_connection());
    Ok(of_connections.map(|link| link.kind).collect())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn on_one_node_by_its_bare_and_its_full_name() -> Result<()> {
    let world = World::builder("one-node")
        .domain("cluster-1.example", |domain| {
            domain.node("node-1").pod("client").pod("endpoint")
        })
        .build()?;
    let agent = started(&world, "node-1", |_| {})?;
    let (client_pod, endpoint_pod) = (world.pod("client")?, world.pod("endpoint")?);
    let _endpoint = agent.endpoint(&world, &endpoint_pod, SERVICE, CIDR, |_| {})?;

    for name in [SERVICE.to_owned(), format!("{SERVICE}@cluster-1.example")] {
        let client = agent.connect(&world, &client_pod, &name, |_| {})?;
        let connected = client.wait_for_event("connected", PATIENCE)?;
        assert_eq!(
            ping(&client_pod, &endpoint_address(&connected)?, 5, &[])?,
            5,
            "{name}"
        );
        assert_eq!(
            kinds(&world)?,
            ["veth"; 4],
            "{name}: two pod links, and no tunnel on one node"
        );
        let pair = &agent.status()?["connections"][0]["pair"];
        for (end, counted) in [(0, "tx_packets"), (1, "rx_packets")] {
            let packets = pair[end]["counters"][counted].as_u64();
            ensure!(packets >= Some(5), "{name}: {pair}");
        }
        close(&client)?;
        links_go(&world).with_context(|| name.clone())?;
    }
    // No other party is asked about its own domain.
    assert_eq!(world.dns().queries()?, []);
    Ok(())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn on_two_nodes_that_share_a_registry() -> Result<()> {
    let world = World::builder("two-nodes")
        .cloud(Cloud::Aws)
        .domain("cluster-1.example", |domain| {
            domain
                .node("node-1")
                .pod("client")
                .node("node-2")
                .pod("endpoint")
        })
        .build()?;
    let near = started(&world, "node-1", |_| {})?;
    let registry = format!("tcp://{}:5005", near.node().private_ip());
    let far = started(&world, "node-2", |command| {
        command.args(["--registry-url", &registry]);
    })?;
    let (client_pod, endpoint_pod) = (world.pod("client")?, world.pod("endpoint")?);
    let _endpoint = far.endpoint(&world, &endpoint_pod, SERVICE, CIDR, |_| {})?;
    let client = near.connect(&world, &client_pod, SERVICE, |_| {})?;
    let connected = client.wait_for_event("connected", PATIENCE)?;
    assert_eq!(
        ping(&client_pod, &endpoint_address(&connected)?, 5, &[])?,
        5
    );
    assert_eq!(kinds(&world)?, ["veth"; 4]);
    // Within the domain the way is the private one.
    let tunnel = &near.status()?["connections"][0]["tunnel"];
    assert_eq!(tunnel["remote"], far.node().private_ip().to_string());
    close(&client)?;
    links_go(&world)
}
