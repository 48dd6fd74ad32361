//! Inside one domain: on one node, and on two nodes that share a registry.

use anyhow::{Result, ensure};
use nsm_e2e::{CIDR, MANAGEMENT_VNI, PATIENCE, SERVICE, endpoint_address, ping};
use nsm_world::{Agent, Cloud, World, binary};

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn on_one_node_by_its_bare_and_its_full_name() -> Result<()> {
    let world = World::builder("one-node")
        .domain("cluster-1.example", |domain| {
            domain.node("node-1").pod("client").pod("endpoint")
        })
        .build()?;
    let agent = Agent::start(
        &world,
        &world.node("node-1")?,
        &binary("proxy-nsmgr")?,
        |_| {},
    )?;
    agent.wait_ready()?;
    let (client_pod, endpoint_pod) = (world.pod("client")?, world.pod("endpoint")?);
    let _endpoint = agent.endpoint(&world, &endpoint_pod, SERVICE, CIDR, |_| {})?;
    let before = world.leaks()?.links;

    for name in [SERVICE.to_owned(), format!("{SERVICE}@cluster-1.example")] {
        let client = agent.connect(&world, &client_pod, &name, |_| {})?;
        let connected = client.wait_for_event("connected", PATIENCE)?;
        assert_eq!(
            ping(&client_pod, &endpoint_address(&connected)?, 5, &[])?,
            5,
            "{name}"
        );
        let kinds: Vec<_> = world
            .leaks()?
            .links
            .into_iter()
            .filter(|link| link.vni != Some(MANAGEMENT_VNI))
            .map(|link| link.kind)
            .collect();
        assert_eq!(kinds, ["veth", "veth"], "{name}: no tunnel on one node");
        ensure!(
            client.close(PATIENCE)?.success(),
            "{name}: the client did not end well"
        );
        assert_eq!(world.leaks()?.links, before, "{name}");
    }
    // Its own domain is nobody's business.
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
    let program = binary("proxy-nsmgr")?;
    let (first, second) = (world.node("node-1")?, world.node("node-2")?);
    let near = Agent::start(&world, &first, &program, |_| {})?;
    near.wait_ready()?;
    let registry = format!("tcp://{}:5005", first.private_ip());
    let far = Agent::start(&world, &second, &program, |command| {
        command.args(["--registry-url", &registry]);
    })?;
    far.wait_ready()?;
    let (client_pod, endpoint_pod) = (world.pod("client")?, world.pod("endpoint")?);
    let _endpoint = far.endpoint(&world, &endpoint_pod, SERVICE, CIDR, |_| {})?;
    let client = near.connect(&world, &client_pod, SERVICE, |_| {})?;
    let connected = client.wait_for_event("connected", PATIENCE)?;
    assert_eq!(
        ping(&client_pod, &endpoint_address(&connected)?, 5, &[])?,
        5
    );
    let kinds: Vec<_> = world
        .leaks()?
        .links
        .into_iter()
        .filter(|link| link.vni != Some(MANAGEMENT_VNI))
        .map(|link| link.kind)
        .collect();
    assert_eq!(kinds, ["vxlan", "vxlan"]);
    // Within the domain the way is the private one.
    let tunnel = &near.status()?["connections"][0]["tunnel"];
    assert_eq!(tunnel["remote"], second.private_ip().to_string());
    ensure!(
        client.close(PATIENCE)?.success(),
        "the client did not end well"
    );
    let left = world.leaks()?.links;
    ensure!(
        left.iter().all(|link| link.vni == Some(MANAGEMENT_VNI)),
        "{left:?}"
    );
    Ok(())
}
