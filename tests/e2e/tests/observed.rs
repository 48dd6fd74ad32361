//! What an operator sees of a connection: counters of each stage and the state of its path, in `status` and in the metrics.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use nsm_e2e::{
    PATIENCE, Pair, close,
    metrics::{self, value},
};
use nsm_world::{Agent, Cloud, Fault, wait_until};
use serde_json::Value;

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn each_stage_of_a_tunnel_is_counted() -> Result<()> {
    let pair = Pair::start("observed", Cloud::Packet, 1)?;
    let before = pair.footprint()?;
    let endpoint = pair.endpoint()?;
    let (client, connected) = pair.connect(0)?;
    pair.assert_pings(0, &connected, 10)?;

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

    close(&client)?;
    ensure!(
        endpoint.stop(PATIENCE)?.success(),
        "the endpoint did not end"
    );
    let page = metrics::page(&pair.near)?;
    ensure!(!page.contains(id), "a closed connection is still there");
    pair.assert_clean(&before)
}

/// The value of a series that may be absent.
fn maybe(page: &str, name: &str, labels: &[String]) -> Option<f64> {
    value(page, name, labels).ok()
}

/// What becomes of milliseconds that are written as seconds.
const ROUNDING: f64 = 1e-6;

/// What `status` says of the only connection's path, and the metrics from between two looks at it that say the same.
struct Looked {
    health: Value,
    page: String,
    after: Value,
    labels: Vec<String>,
}

impl Looked {
    fn at(agent: &Agent) -> Result<Self> {
        let health = |status: &Value| status["connections"][0]["health"].clone();
        let status = agent.status()?;
        let page = metrics::page(agent)?;
        let id = status["connections"][0]["id"].as_str().context("an id")?;
        let peer = status["connections"][0]["health"]["peer"].as_str();
        let peer = peer.with_context(|| format!("no peer in {status}"))?;
        Ok(Self {
            health: health(&status),
            page,
            after: health(&agent.status()?),
            labels: vec![format!("connection=\"{id}\""), format!("peer=\"{peer}\"")],
        })
    }

    /// A series of the connection, with one more label.
    fn with(&self, name: &str, label: &str, value: &str) -> Option<f64> {
        let label = format!("{label}=\"{value}\"");
        let labels: Vec<_> = self.labels.iter().cloned().chain([label]).collect();
        maybe(&self.page, name, &labels)
    }

    /// Where a series is not what `status` says, or between what it says before and after: the values.
    fn differs(&self, what: &str, metric: Option<f64>, status: [Option<f64>; 2]) -> Option<String> {
        let is_same = match (metric, status) {
            (Some(metric), [Some(before), Some(after)]) => {
                let rounding = 1e-9 * metric.abs();
                let (least, most) = (before.min(after), before.max(after));
                (least - rounding..=most + rounding).contains(&metric)
            }
            (None, [None, None]) => true,
            _ => false,
        };
        (!is_same).then(|| format!("{what}: {metric:?} in the metrics, {status:?} in `status`"))
    }

    /// What the metrics say otherwise than `status`.
    fn differences(&self) -> Vec<String> {
        let both = |read: &dyn Fn(&Value) -> Option<f64>| [read(&self.health), read(&self.after)];
        let mut found = Vec::new();
        for (quantile, field) in [("0.5", "round_trip_p50_ns"), ("0.99", "round_trip_p99_ns")] {
            let name = "proxy_nsmgr_path_round_trip_seconds";
            let status = both(&|it| Some(it[field].as_f64()? / 1e9));
            found.extend(self.differs(field, self.with(name, "quantile", quantile), status));
        }
        for (name, field) in [
            ("proxy_nsmgr_path_loss_ratio", "loss"),
            ("proxy_nsmgr_path_mtu_bytes", "path_mtu"),
        ] {
            let metric = maybe(&self.page, name, &self.labels);
            found.extend(self.differs(name, metric, both(&|it| it[field].as_f64())));
        }
        for way in ["in", "out"] {
            let up = self.with("proxy_nsmgr_path_up", "way", way);
            let status = both(&|it| match it[way]["state"].as_str()? {
                "up" => Some(1.0),
                "down" => Some(0.0),
                _ => None,
            });
            found.extend(self.differs(way, up, status));
        }
        found
    }

    /// Milliseconds since a way was proved: by `status`, by the metrics, and by `status` again.
    fn silence(&self, way: &str) -> Option<[f64; 3]> {
        let metric = self.with("proxy_nsmgr_path_silence_seconds", "way", way)?;
        let [before, after] =
            [&self.health, &self.after].map(|it| it[way]["last_heard_ms"].as_f64());
        Some([before?, metric * 1e3, after?])
    }
}

/// Looks at an agent until the states of the ways in and out are these, and metrics and `status` are of one mind.
fn agreed(agent: &Agent, states: [&str; 2], further: impl Fn(&Looked) -> bool) -> Result<Looked> {
    let mut last = String::new();
    let mut found = None;
    let agreed = wait_until("metrics as `status` has them", PATIENCE, || {
        let looked = match Looked::at(agent) {
            Ok(looked) => looked,
            Err(error) => {
                last = format!("{error:#}");
                return false;
            }
        };
        last = format!("{:?} of {:#}", looked.differences(), looked.health);
        let are = ["in", "out"].map(|way| looked.health[way]["state"].as_str().unwrap_or_default());
        let is_good = are == states && looked.differences().is_empty() && further(&looked);
        found = is_good.then_some(looked);
        is_good
    });
    agreed.with_context(|| format!("{}: {last}", agent.node().name()))?;
    found.context("it was found")
}

/// Probes sent, answers had and probes reflected, of an agent and its peer.
fn sessions(agent: &Agent, peer: &Agent) -> Result<[f64; 3]> {
    let page = metrics::page(agent)?;
    let labels = [format!("peer=\"{}\"", peer.node().public_ip())];
    let count = |name: &str| value(&page, &format!("proxy_nsmgr_sbfd_{name}_total"), &labels);
    Ok([count("probes")?, count("answers")?, count("reflected")?])
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn the_metrics_of_a_path_are_what_status_says_also_when_it_is_cut_one_way() -> Result<()> {
    let pair = Pair::start("observed-path", Cloud::Packet, 1)?;
    let before = pair.footprint()?;
    let endpoint = pair.endpoint()?;
    let (client, _connected) = pair.connect(0)?;
    for agent in [&pair.near, &pair.far] {
        let is_complete = |it: &Looked| {
            let there = |field: &str| it.health[field].is_number();
            ["round_trip_p50_ns", "round_trip_p99_ns", "loss", "path_mtu"].map(there) == [true; 4]
        };
        let looked = agreed(agent, ["up", "up"], is_complete)?;
        let [p50, p99] =
            ["round_trip_p50_ns", "round_trip_p99_ns"].map(|it| looked.health[it].as_f64());
        ensure!(p50 > Some(0.0) && p99 >= p50, "{:#}", looked.health);
        ensure!(
            looked.health["path_mtu"].as_f64() > Some(1200.0),
            "{:#}",
            looked.health
        );
        for way in ["in", "out"] {
            ensure!(
                looked.silence(way).is_some(),
                "no silence of {way}: {}",
                looked.page
            );
        }
        assert_conventions(&looked.page)?;
    }
    // Each is read after what it cannot exceed, or before what cannot exceed it.
    let [_, answers, _] = sessions(&pair.near, &pair.far)?;
    let [_, _, reflected] = sessions(&pair.far, &pair.near)?;
    let [probes, _, _] = sessions(&pair.near, &pair.far)?;
    ensure!(
        1.0 <= answers && answers <= reflected && reflected <= probes,
        "{answers} answers, {reflected} reflected, {probes} probes"
    );

    let (near, far) = (pair.near.node(), pair.far.node());
    let fault = pair
        .world
        .inject(near, far, Fault::BlockUdp { port: 4789 })?;
    let is_silent = |way: &'static str| {
        move |it: &Looked| {
            // Nothing proves the way any more: its silence only grows, and is the same clock's in both.
            it.silence(way).is_some_and(|[before, metric, after]| {
                before >= 500.0 && before <= metric + ROUNDING && metric <= after + ROUNDING
            })
        }
    };
    let lost = agreed(&pair.near, ["up", "down"], |it| {
        is_silent("out")(it) && it.health["loss"].as_f64() > Some(0.0)
    })?;
    let [_, heard, _] = lost
        .silence("in")
        .context("the peer's own probes come in")?;
    let [_, silent, _] = lost.silence("out").context("no silence")?;
    ensure!(heard < silent, "in {heard} ms, out {silent} ms");
    // The far side hears nothing at all, and cannot know of its way out.
    agreed(&pair.far, ["down", "unknown"], is_silent("in"))?;
    let (near_then, far_then) = (
        sessions(&pair.near, &pair.far)?,
        sessions(&pair.far, &pair.near)?,
    );
    wait_until(
        "probes to leave and the far side's to be reflected",
        PATIENCE,
        || {
            sessions(&pair.near, &pair.far).is_ok_and(|[probes, _, reflected]| {
                probes > near_then[0] && reflected > near_then[2]
            })
        },
    )?;
    let (near_now, far_now) = (
        sessions(&pair.near, &pair.far)?,
        sessions(&pair.far, &pair.near)?,
    );
    ensure!(
        near_now[1] == near_then[1],
        "answers to the near side: {near_then:?} {near_now:?}"
    );
    ensure!(
        far_now[1..] == far_then[1..],
        "answers to the far side: {far_then:?} {far_now:?}"
    );

    fault.heal();
    for agent in [&pair.near, &pair.far] {
        agreed(agent, ["up", "up"], |_| true)?;
    }
    close(&client)?;
    ensure!(
        endpoint.stop(PATIENCE)?.success(),
        "the endpoint did not end"
    );
    pair.assert_clean(&before)
}

/// Checks names and units of a page against the conventions of Prometheus and OpenMetrics.
fn assert_conventions(page: &str) -> Result<()> {
    let body = page.split_once("\r\n\r\n").context("no body")?.1;
    let described = |what: &str| -> BTreeMap<String, String> {
        let lines = body
            .lines()
            .filter_map(|line| line.strip_prefix(what)?.split_once(' '));
        lines
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .collect()
    };
    let [helps, types, units] = ["# HELP ", "# TYPE ", "# UNIT "].map(described);
    ensure!(types.len() > 15, "few metrics: {body}");
    for (name, kind) in &types {
        ensure!(
            name.starts_with("proxy_nsmgr_"),
            "{name} has another prefix"
        );
        let is_plain =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        ensure!(name.bytes().all(is_plain), "{name} has odd letters");
        ensure!(
            helps.get(name).is_some_and(|help| !help.is_empty()),
            "{name} has no help"
        );
        if let Some(unit) = units.get(name) {
            ensure!(
                ["seconds", "bytes", "ratio"].contains(&unit.as_str()),
                "{name} is in {unit}"
            );
            ensure!(
                name.ends_with(&format!("_{unit}")),
                "{name} does not end in its unit {unit}"
            );
        }
        let samples: Vec<&str> = body
            .lines()
            .filter_map(|line| line.split(['{', ' ']).next())
            .filter(|sample| {
                sample.strip_prefix(name.as_str()).is_some_and(|rest| {
                    [
                        "", "_total", "_bucket", "_sum", "_count", "_info", "_created",
                    ]
                    .contains(&rest)
                })
            })
            .collect();
        let suffixes: &[&str] = match kind.as_str() {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_sum", "_count"],
            "info" => &["_info"],
            _ => &[""],
        };
        for sample in samples {
            let suffix = sample.strip_prefix(name.as_str()).unwrap_or_default();
            // A counter's own name may begin another's.
            ensure!(
                suffixes.contains(&suffix) || types.contains_key(sample),
                "{sample} of the {kind} {name}"
            );
        }
        let parts: Vec<&str> = name.split('_').collect();
        for small in [
            "ms",
            "ns",
            "us",
            "millis",
            "nanos",
            "milliseconds",
            "nanoseconds",
            "percent",
            "total",
        ] {
            ensure!(
                !parts.contains(&small),
                "{name} is not in base units, or counts twice"
            );
        }
    }
    Ok(())
}
