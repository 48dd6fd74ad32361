//! Real NSM proxies and ours under the same load, side by side: the Go tests in `tests/interop/sidebyside` measure, this starts
//! them and shows what they found.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::{
    Setting, Size,
    memory::BYTES_A_PAIR,
    report::{
        Bar::{AtLeast, AtMost},
        Row, SideBySide,
    },
    sink::Sink,
};

/// Bars of the ratios, ours over the real one's.
const REQUESTS_PER_CPU_SECOND: f64 = 8.0;
const P99: f64 = 0.2;
const MEMORY: f64 = 0.05;
const DOWN: f64 = 0.05;

/// Opening thousands of connections through the real proxies takes most of it.
const TIMEOUT: &str = "30m";

/// What the Go side writes.
#[derive(Debug, Deserialize)]
struct Measured {
    real: Side,
    ours: Side,
    ratios: Ratios,
}

#[derive(Debug, Deserialize)]
struct Side {
    /// Null until it was measured, as `resident`.
    request_close: Option<Vec<Rate>>,
    refresh: Rate,
    find: Rate,
    requests_per_cpu_second: f64,
    resident: Option<Vec<Resident>>,
    memory_per_connection_kib: f64,
    down_fanout: Down,
    growth: Growth,
}

#[derive(Debug, Deserialize)]
struct Rate {
    /// Of which the numbers are medians.
    rounds: u64,
    in_flight: u32,
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    cpu_ms_per_call: Cpu,
}

#[derive(Debug, Deserialize)]
struct Cpu {
    one: f64,
    two: f64,
}

#[derive(Debug, Deserialize)]
struct Resident {
    connections: u32,
    monitors: bool,
    one_kib: f64,
    two_kib: f64,
}

#[derive(Debug, Deserialize)]
struct Down {
    connections: u32,
    p50_ms: f64,
    p99_ms: f64,
}

#[derive(Debug, Deserialize)]
struct Growth {
    pairs: u64,
    bytes_per_pair: f64,
}

#[derive(Debug, Deserialize)]
struct Ratios {
    requests_per_cpu_second: f64,
    p99: f64,
    memory_per_connection: f64,
    down_fanout: f64,
}

/// Measures; `keep` gets what was found as the Go side wrote it.
pub(super) fn measure(
    setting: &Setting<'_>,
    sink: &Sink,
    keep: impl FnOnce(SideBySide),
) -> Result<()> {
    let go = setting.go.context("Go was not looked for")?;
    let directory = tempfile::tempdir().context("make a directory for the result")?;
    let out = directory.path().join("side-by-side.json");
    let arguments = ["test", "-count=1", "-v", "-timeout", TIMEOUT];
    let mut command =
        go.command(&[&arguments[..], &["-run", "SideBySide", "./sidebyside"]].concat());
    command
        .env("PROXY_NSMGR_BIN", setting.built.world()?.agent)
        .env("SIDE_BY_SIDE_OUT", &out)
        // Our own output is the report.
        .stdout(std::io::stderr());
    if setting.size == Size::Quick {
        command.env("SIDE_BY_SIDE_QUICK", "1");
    }
    sink.step("the Go tests that measure");
    let status = command.status().context("cannot start go test")?;
    // What was measured before a failure is written, too.
    if let Ok(text) = fs::read_to_string(&out) {
        let measured: Measured = serde_json::from_str(&text).context("read what was measured")?;
        sink.rows(rows(&measured));
        notes(&measured)
            .into_iter()
            .for_each(|note| sink.note(note));
        keep(serde_json::from_str(&text)?);
    }
    ensure!(
        status.success() && out.exists(),
        "the measurement failed ({status}): see above"
    );
    Ok(())
}

/// What was measured; a row that stands on nothing is left out.
fn rows(measured: &Measured) -> Vec<Row> {
    let mut rows = ratio_rows(measured);
    rows.extend(side_rows("real", &measured.real));
    let mut ours = side_rows("ours", &measured.ours);
    // Of both agents together, and no more than one may: what one of them leaves behind must not hide in the other's share.
    if let Some(growth) = ours.pop() {
        ours.push(growth.bar(AtMost(BYTES_A_PAIR)));
    }
    rows.extend(ours);
    rows.retain(|row| row.n > 0);
    rows
}

fn ratio_rows(measured: &Measured) -> Vec<Row> {
    let (real, ours, ratios) = (&measured.real, &measured.ours, &measured.ratios);
    let row = |what: &str, value, bar, n: [u64; 2]| {
        let n = n[0].min(n[1]);
        Row::new(format!("{what}, ours to real"), value, "", n).bar(bar)
    };
    let rounds = [real.rounds(), ours.rounds()];
    let monitored = [real.monitored(), ours.monitored()];
    let subscribed = [&real.down_fanout, &ours.down_fanout].map(|down| down.connections.into());
    vec![
        row(
            "requests a CPU second",
            ratios.requests_per_cpu_second,
            AtLeast(REQUESTS_PER_CPU_SECOND),
            rounds,
        ),
        row("p99", ratios.p99, AtMost(P99), rounds),
        row(
            "memory a connection",
            ratios.memory_per_connection,
            AtMost(MEMORY),
            monitored,
        ),
        row(
            "time until all DOWNs arrived",
            ratios.down_fanout,
            AtMost(DOWN),
            subscribed,
        ),
    ]
}

/// The rows of one kind of proxy; the last is its growth.
fn side_rows(name: &str, side: &Side) -> Vec<Row> {
    let row = |what: String, value, unit, n| Row::new(format!("{name}: {what}"), value, unit, n);
    let mut rows = Vec::new();
    let pairs = side.request_close.iter().flatten();
    let loads = pairs
        .clone()
        .map(|pairs| ("Request and Close", pairs))
        .chain([("refresh", &side.refresh), ("Find", &side.find)]);
    for (what, rate) in loads {
        let (what, n) = (format!("{what}, {} in flight", rate.in_flight), rate.rounds);
        rows.push(row(what.clone(), rate.per_second, "/s", n));
        rows.push(row(format!("{what}, p50"), rate.p50_ms, "ms", n));
        rows.push(row(format!("{what}, p99"), rate.p99_ms, "ms", n));
    }
    for pairs in pairs {
        for (proxy, cpu) in [
            ("the client's proxy", pairs.cpu_ms_per_call.one),
            ("the endpoint's proxy", pairs.cpu_ms_per_call.two),
        ] {
            let what = format!("CPU a pair, {} in flight, {proxy}", pairs.in_flight);
            rows.push(row(what, cpu, "ms", pairs.rounds));
        }
    }
    rows.push(row(
        "requests a CPU second".to_owned(),
        side.requests_per_cpu_second,
        "/s",
        side.rounds(),
    ));
    for resident in side.resident.iter().flatten() {
        let monitors = if resident.monitors { ", monitored" } else { "" };
        let what = format!("resident, {} connections{monitors}", resident.connections);
        rows.push(row(what, resident.one_kib + resident.two_kib, "KiB", 1));
    }
    rows.push(row(
        "memory a connection".to_owned(),
        side.memory_per_connection_kib,
        "KiB",
        side.monitored(),
    ));
    let down = &side.down_fanout;
    let (what, n) = (
        format!("DOWN to {} connections", down.connections),
        down.connections.into(),
    );
    rows.push(row(format!("{what}, p50"), down.p50_ms, "ms", n));
    rows.push(row(format!("{what}, p99"), down.p99_ms, "ms", n));
    let growth = &side.growth;
    rows.push(row(
        format!("growth a closed pair of {}", growth.pairs),
        growth.bytes_per_pair,
        "B",
        growth.pairs,
    ));
    rows
}

impl Side {
    /// Of its loads.
    fn rounds(&self) -> u64 {
        self.refresh.rounds
    }

    /// Connections of which the memory of one was taken.
    fn monitored(&self) -> u64 {
        let resident = self.resident.iter().flatten();
        let monitored = resident.filter(|resident| resident.monitors && resident.connections > 0);
        monitored
            .map(|resident| resident.connections.into())
            .min()
            .unwrap_or_default()
    }
}

fn notes(measured: &Measured) -> Vec<String> {
    vec![
        "each proxy is a process of its own on loopback, plain HTTP/2; client, endpoint, registries and DNS are bare and the same for \
         both; calls are measured in turn in one run, medians of the rounds"
            .to_owned(),
        format!(
            "ratios: CPU and p99 with 8 in flight, memory of both proxies with {} connections and a monitor stream for each, DOWN by its \
             p99",
            measured.ours.down_fanout.connections
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratios_come_first_and_have_bars() {
        let rate = |n: u32| {
            format!(
                r#"{{"rounds":5,"in_flight":{n},"per_second":1,"p50_ms":2,"p99_ms":3,"cpu_ms_per_call":{{"one":1,"two":2}}}}"#
            )
        };
        let side = format!(
            r#"{{"request_close":[{}],"refresh":{},"find":{},"requests_per_cpu_second":5,
                "resident":[{{"connections":10,"monitors":true,"one_kib":1,"two_kib":2}}],
                "memory_per_connection_kib":7,"down_fanout":{{"connections":10,"p50_ms":1,"p99_ms":2}},
                "growth":{{"pairs":10,"bytes_per_pair":200}}}}"#,
            rate(8),
            rate(8),
            rate(8)
        );
        let text = format!(
            r#"{{"real":{side},"ours":{side},"ratios":{{"requests_per_cpu_second":9,"p99":0.1,
                "memory_per_connection":0.01,"down_fanout":0.5}}}}"#
        );
        let rows = rows(&serde_json::from_str(&text).unwrap());
        let held: Vec<_> = rows.iter().map(Row::holds).collect();
        assert_eq!(held[..4], [Some(true), Some(true), Some(true), Some(false)]);
        // Our own growth has a bar too; what the real ones do has none.
        assert_eq!(held[4..].iter().flatten().collect::<Vec<_>>(), [&false]);
    }

    #[test]
    fn what_was_not_measured_any_more_has_no_row() {
        let rate = r#"{"rounds":0,"in_flight":0,"per_second":0,"p50_ms":0,"p99_ms":0,"cpu_ms_per_call":{"one":0,"two":0}}"#;
        let nothing = format!(
            r#"{{"request_close":null,"refresh":{rate},"find":{rate},"requests_per_cpu_second":0,
                "resident":null,"memory_per_connection_kib":0,
                "down_fanout":{{"connections":0,"p50_ms":0,"p99_ms":0}},"growth":{{"pairs":0,"bytes_per_pair":0}}}}"#
        );
        let measured = rate.replace(r#""rounds":0"#, r#""rounds":5"#);
        let some = nothing.replacen("null", &format!("[{measured}]"), 1);
        let text = format!(
            r#"{{"real":{some},"ours":{nothing},"ratios":{{"requests_per_cpu_second":0,"p99":0,
                "memory_per_connection":0,"down_fanout":0}}}}"#
        );
        let rows = rows(&serde_json::from_str(&text).unwrap());
        assert_eq!(rows.len(), 5, "{rows:?}");
        assert!(rows.iter().all(|row| row.what.starts_with("real: ")));
    }
}
