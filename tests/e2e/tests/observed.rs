//! What an operator sees of a connection: counters of each stage, in `status` and in the metrics.

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{
    PATIENCE, Pair, endpoint_address,
    metrics::{self, value},
    ping,
};
use nsm_world::Cloud;

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn each_stage_of_a_tunnel_is_counted() -> Result<()> {
    let pair = Pair::start("observed", Cloud::Packet, 1)?;
    let before = pair.footprint()?;
    let endpoint = pair.endpoint()?;
    let (client, connected) = pair.connect(0)?;
    let answered = ping(
        &pair.client_pod(0)?,
        &endpoint_address(&connected)?,
        10,
        &[],
    )?;
    ensure!(answered == 10, "{answered} of 10 pings were answered");

    let status = pair.near.status()?;
    let connection = &status["connections"][0];
    let id = connection["id"].as_str().context("an id")?;
    let labels = [
        format!("connection=\"{id}\""),
        format!("peer=\"{}\"", pair.far.node().public_ip()),
        "domain=\"cluster-2.example\"".to_owned(),
    ];
    let page = metrics::page(&pair.near)?;
    for (stage, link, direction) in [
        ("link_transmit", "link", "tx"),
        ("underlay_transmit", "counters", "tx"),
        ("underlay_receive", "counters", "rx"),
        ("link_receive", "link", "rx"),
    ] {
        for what in ["packets", "bytes"] {
            let shown = connection["tunnel"][link][format!("{direction}_{what}")].as_f64();
            let shown = shown.with_context(|| status.to_string())?;
            let name = format!("proxy_nsmgr_tunnel_{stage}_{what}_total");
            let metric = value(&page, &name, &labels)?;
            let least = if what == "packets" { 10.0 } else { 840.0 };
            ensure!(
                shown >= least && metric >= shown,
                "{name}: {shown}, {metric}"
            );
        }
    }
    let up = value(
        &page,
        "proxy_nsmgr_connections",
        &["state=\"UP\"".to_owned()],
    )?;
    ensure!(up == 1.0, "{up} connections are UP");
    let ok = ["code=\"OK\"".to_owned()];
    let requests = value(&page, "proxy_nsmgr_request_duration_seconds_count", &ok)?;
    ensure!(requests >= 1.0, "{requests} Requests went well");
    let asked = ["by=\"question\"".to_owned()];
    ensure!(value(&page, "proxy_nsmgr_dns_lookups_total", &asked)? >= 1.0);

    ensure!(client.close(PATIENCE)?.success(), "the client did not end");
    ensure!(
        endpoint.stop(PATIENCE)?.success(),
        "the endpoint did not end"
    );
    let page = metrics::page(&pair.near)?;
    ensure!(!page.contains(id), "a closed connection is still there");
    pair.assert_clean(&before)
}
