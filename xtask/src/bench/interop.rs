//! Real NSM proxies and ours under the same load, side by side: the Go tests in `tests/interop/sidebyside` measure, this starts
//! them and shows what they found.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::{
    Found,
    memory::BYTES_A_PAIR,
    programs::Programs,
    report::{
        Bar::{AtLeast, AtMost},
        Row, SideBySide,
    },
};
use crate::interop::Go;

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
    request_close: Vec<Rate>,
    refresh: Rate,
    find: Rate,
    requests_per_cpu_second: f64,
    resident: Vec<Resident>,
    memory_per_connection_kib: f64,
    down_fanout: Down,
    growth: Growth,
}

#[derive(Debug, Deserialize)]
struct Rate {
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

/// What was found, and the same as the Go side wrote it.
pub(super) fn measure(quick: bool) -> Result<(Found, SideBySide)> {
    let go = Go::find()?;
    let programs = Programs::build()?;
    let directory = tempfile::tempdir().context("make a directory for the result")?;
    let out = directory.path().join("side-by-side.json");
    let arguments = ["test", "-count=1", "-v", "-timeout", TIMEOUT];
    let mut command =
        go.command(&[&arguments[..], &["-run", "SideBySide", "./sidebyside"]].concat());
    command
        .env("PROXY_NSMGR_BIN", &programs.agent)
        .env("SIDE_BY_SIDE_OUT", &out)
        // Our own output is the report.
        .stdout(std::io::stderr());
    if quick {
        command.env("SIDE_BY_SIDE_QUICK", "1");
    }
    let status = command.status().context("cannot start go test")?;
    ensure!(
        status.success(),
        "the measurement failed ({status}): see above"
    );
    let text = fs::read_to_string(&out).with_context(|| format!("read {}", out.display()))?;
    let measured: Measured = serde_json::from_str(&text).context("read what was measured")?;
    let found = Found {
        rows: rows(&measured),
        notes: notes(&measured),
    };
    Ok((found, serde_json::from_str(&text)?))
}

fn rows(measured: &Measured) -> Vec<Row> {
    let ratios = &measured.ratios;
    let ratio =
        |what: &str, value, bar| Row::new(format!("{what}, ours to real"), value, "").bar(bar);
    let mut rows = vec![
        ratio(
            "requests a CPU second",
            ratios.requests_per_cpu_second,
            AtLeast(REQUESTS_PER_CPU_SECOND),
        ),
        ratio("p99", ratios.p99, AtMost(P99)),
        ratio(
            "memory a connection",
            ratios.memory_per_connection,
            AtMost(MEMORY),
        ),
        ratio("time to tell all DOWN", ratios.down_fanout, AtMost(DOWN)),
    ];
    for (name, side, is_ours) in [
        ("real", &measured.real, false),
        ("ours", &measured.ours, true),
    ] {
        let of = |what: String| format!("{name}: {what}");
        let mut rate = |what: &str, rate: &Rate| {
            let what = format!("{what}, {} in flight", rate.in_flight);
            rows.push(Row::new(of(what.clone()), rate.per_second, "/s"));
            rows.push(Row::new(of(format!("{what}, p50")), rate.p50_ms, "ms"));
            rows.push(Row::new(of(format!("{what}, p99")), rate.p99_ms, "ms"));
        };
        for pairs in &side.request_close {
            rate("Request and Close", pairs);
        }
        rate("refresh", &side.refresh);
        rate("Find", &side.find);
        for pairs in &side.request_close {
            for (proxy, cpu) in [
                ("the client's proxy", pairs.cpu_ms_per_call.one),
                ("the endpoint's proxy", pairs.cpu_ms_per_call.two),
            ] {
                let what = format!("CPU a pair, {} in flight, {proxy}", pairs.in_flight);
                rows.push(Row::new(of(what), cpu, "ms"));
            }
        }
        rows.push(Row::new(
            of("requests a CPU second".to_owned()),
            side.requests_per_cpu_second,
            "/s",
        ));
        for resident in &side.resident {
            let monitors = if resident.monitors { ", monitored" } else { "" };
            let what = format!("resident, {} connections{monitors}", resident.connections);
            rows.push(Row::new(
                of(what),
                resident.one_kib + resident.two_kib,
                "KiB",
            ));
        }
        rows.push(Row::new(
            of("memory a connection".to_owned()),
            side.memory_per_connection_kib,
            "KiB",
        ));
        let down = &side.down_fanout;
        let what = format!("DOWN to {} connections", down.connections);
        rows.push(Row::new(of(format!("{what}, p50")), down.p50_ms, "ms"));
        rows.push(Row::new(of(format!("{what}, p99")), down.p99_ms, "ms"));
        let growth = Row::new(
            of(format!("growth a closed pair of {}", side.growth.pairs)),
            side.growth.bytes_per_pair,
            "B",
        );
        rows.push(if is_ours {
            // Of both agents together, and no more than one may: what one of them leaves behind must not hide in the other's share.
            growth.bar(AtMost(BYTES_A_PAIR))
        } else {
            growth
        });
    }
    rows
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
                r#"{{"in_flight":{n},"per_second":1,"p50_ms":2,"p99_ms":3,"cpu_ms_per_call":{{"one":1,"two":2}}}}"#
            )
        };
        let side = format!(
            r#"{{"request_close":[{}],"refresh":{},"find":{},"requests_per_cpu_second":5,
                "resident":[{{"connections":0,"monitors":true,"one_kib":1,"two_kib":2}}],
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
}
