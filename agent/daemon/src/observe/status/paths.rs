//! The ways to the peers of tunnels, one line a connection and direction.

use comfy_table::Table;
use nsm_proto::admin::{ConnectionStatus, Counters, PathHealth, Status, Tunnel, WayHealth};

use super::{add, short, table as new_table};

/// What stands where nothing is known.
const NOTHING: &str = "-";

/// The table; none where no path is watched.
pub(super) fn table(status: &Status) -> Option<Table> {
    // Without BPF the counters of the underlay are those of the link: no second stage.
    let has_underlay = status
        .bpf
        .as_ref()
        .is_some_and(|bpf| !matches!(bpf.hook.as_str(), "" | "none"));
    let mut table = new_table(
        &[
            "ID",
            "PEER",
            "WAY",
            "STATE",
            "RTT P50",
            "RTT P99",
            "LOSS",
            "MTU",
            "HEARD",
            "LINK PACKETS",
            "UNDERLAY PACKETS",
            "REASON",
        ],
        &[4, 5, 6, 7, 8, 9, 10],
    );
    for connection in &status.connections {
        let Some(health) = &connection.health else {
            continue;
        };
        let stages = Stages::of(connection.tunnel.as_ref(), has_underlay);
        let ways = [
            ("out", &health.out, stages.link_tx, stages.underlay_out),
            ("in", &health.r#in, stages.link_rx, stages.underlay_in),
        ];
        for (direction, way, link, underlay) in ways {
            let way = way.clone().unwrap_or_default();
            let cells = row(connection, health, direction, &way, link, underlay);
            add(&mut table, cells);
        }
    }
    (!table.is_empty()).then_some(table)
}

/// Packets that passed each stage, in the order of a packet that leaves and of one that comes.
#[derive(Default)]
struct Stages {
    link_tx: Option<u64>,
    underlay_out: Option<u64>,
    underlay_in: Option<u64>,
    link_rx: Option<u64>,
}

impl Stages {
    fn of(tunnel: Option<&Tunnel>, has_underlay: bool) -> Self {
        let Some(tunnel) = tunnel else {
            return Self::default();
        };
        let link = tunnel.link.as_ref();
        let underlay = tunnel.counters.as_ref().filter(|_| has_underlay);
        let tx = |counters: Option<&Counters>| counters.map(|counters| counters.tx_packets);
        let rx = |counters: Option<&Counters>| counters.map(|counters| counters.rx_packets);
        Self {
            link_tx: tx(link),
            underlay_out: tx(underlay),
            underlay_in: rx(underlay),
            link_rx: rx(link),
        }
    }
}

fn row(
    connection: &ConnectionStatus,
    health: &PathHealth,
    direction: &str,
    way: &WayHealth,
    link: Option<u64>,
    underlay: Option<u64>,
) -> [String; 12] {
    [
        short(&connection.id),
        health.peer.clone(),
        direction.to_owned(),
        way.state.clone(),
        or_nothing(health.round_trip_p50_ns.map(millis)),
        or_nothing(health.round_trip_p99_ns.map(millis)),
        or_nothing(health.loss.map(|loss| format!("{:.1} %", loss * 100.0))),
        or_nothing(health.path_mtu),
        or_nothing(way.last_heard_ms.map(ago)),
        or_nothing(link),
        or_nothing(underlay),
        way.reason.clone(),
    ]
}

fn or_nothing(value: Option<impl ToString>) -> String {
    value.map_or_else(|| NOTHING.to_owned(), |value| value.to_string())
}

/// Nanoseconds as milliseconds, to a microsecond below ten.
fn millis(nanos: u64) -> String {
    let micros = nanos / 1000;
    let (whole, rest) = (micros / 1000, micros % 1000);
    match whole {
        0..10 => format!("{whole}.{rest:03} ms"),
        _ => format!("{whole}.{} ms", rest / 100),
    }
}

fn ago(millis: u64) -> String {
    match millis {
        0..1000 => format!("{millis} ms"),
        _ => format!("{}.{} s", millis / 1000, millis % 1000 / 100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short_and_not_rounded_away() {
        assert_eq!(millis(22_400), "0.022 ms");
        assert_eq!(millis(9_999_999), "9.999 ms");
        assert_eq!(millis(20_150_000), "20.1 ms");
        assert_eq!(ago(0), "0 ms");
        assert_eq!(ago(1249), "1.2 s");
    }
}
