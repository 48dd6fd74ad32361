//! What the demo found: its JSON, how it is read from what programs print, and when it is good enough.

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) connection: Connection,
    /// From the client's Request to its Connection.
    pub(super) setup_ms: f64,
    pub(super) dns: Dns,
    pub(super) ping: Ping,
    pub(super) counters: Counters,
    pub(super) bpf: Bpf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fault: Option<FaultReport>,
    pub(super) leaked: Leaked,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Connection {
    pub(super) id: String,
    pub(super) network_service: String,
    pub(super) endpoint: String,
    pub(super) mechanism: String,
    pub(super) vni: u32,
    pub(super) mtu: u32,
    /// Names of the path's segments.
    pub(super) path: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Dns {
    pub(super) question: String,
    pub(super) answer: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Ping {
    pub(super) sent: u32,
    pub(super) received: u32,
    pub(super) rtt_us_p50: u32,
}

#[derive(Debug, Serialize)]
pub(super) struct Counters {
    pub(super) client_node: NodeCounters,
    pub(super) endpoint_node: NodeCounters,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct NodeCounters {
    pub(super) tx_packets: u64,
    pub(super) rx_packets: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Bpf {
    pub(super) hook: String,
    pub(super) object_sha256: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Leaked {
    pub(super) links: usize,
    pub(super) pins: usize,
    pub(super) netns: usize,
    pub(super) processes: usize,
}

/// What the fault did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct FaultReport {
    pub(super) kind: String,
    /// RFC 3339, UTC.
    pub(super) injected_at: String,
    /// From the fault to the first `status` of the client's agent that shows it.
    pub(super) detected_ms: f64,
    /// Of both directions together.
    pub(super) state: String,
    /// "in", "out" or "both", seen from the client's node.
    pub(super) direction: &'static str,
    pub(super) reason: String,
    /// From the end of the fault to a `status` with both directions up again.
    pub(super) recovered_ms: f64,
    pub(super) ping: Ping,
}

impl Report {
    /// Whether the demo shows what it claims.
    pub(super) fn check(&self, pings: u32) -> Result<()> {
        let Ping { sent, received, .. } = self.ping;
        ensure!(
            sent == pings && received == pings,
            "{received} of {sent} pings were answered, not all {pings}"
        );
        let Leaked {
            links,
            pins,
            netns,
            processes,
        } = self.leaked;
        ensure!(
            links + pins + netns + processes == 0,
            "left behind: {links} links, {pins} pins, {netns} namespaces, {processes} processes"
        );
        Ok(())
    }
}

impl Ping {
    /// Reads what `ping` of iputils prints.
    pub(super) fn parse(output: &str) -> Option<Self> {
        let summary = output
            .lines()
            .find(|line| line.contains("packets transmitted"))?;
        let number = |text: &str| text.split_whitespace().next()?.parse().ok();
        let mut parts = summary.split(", ");
        let (sent, received) = (number(parts.next()?)?, number(parts.next()?)?);
        let mut round_trips: Vec<u32> = output
            .lines()
            .filter_map(|line| {
                line.split_once("time=")?
                    .1
                    .strip_suffix(" ms")?
                    .parse::<f64>()
                    .ok()
            })
            .map(|ms| (ms * 1e3).round() as u32)
            .collect();
        round_trips.sort_unstable();
        let rtt_us_p50 = round_trips.get(round_trips.len() / 2).copied().unwrap_or(0);
        Some(Self {
            sent,
            received,
            rtt_us_p50,
        })
    }
}

impl NodeCounters {
    /// Whether they have at least the pings' packets in both directions.
    pub(super) fn cover(&self, ping: &Ping) -> bool {
        let pings = u64::from(ping.received);
        self.tx_packets >= pings && self.rx_packets >= pings
    }
}

/// The connection of the client's `connected` event.
pub(super) fn connection(connected: &Value) -> Result<Connection> {
    let reported = &connected["connection"];
    let connection: Connection = serde_json::from_value(reported.clone()).with_context(|| {
        format!("the client's connection is not what the demo expects: {reported}")
    })?;
    ensure!(
        connection.mechanism == "VXLAN",
        "the tunnel is {}, not VXLAN",
        connection.mechanism
    );
    Ok(connection)
}

/// The DNS answer that the client reports.
pub(super) fn dns(connected: &Value) -> Result<Dns> {
    let reported = &connected["dns"];
    serde_json::from_value(reported.clone())
        .with_context(|| format!("the client reports no question to DNS: {reported}"))
}

/// How long the client waited for its connection, by its own clock, in milliseconds.
pub(super) fn setup_ms(connected: &Value) -> Result<f64> {
    connected["setup_ms"]
        .as_f64()
        .context("the client does not report how long it waited")
}

/// The endpoint's address, without the prefix length.
pub(super) fn endpoint_address(connected: &Value) -> Result<String> {
    let addresses = connected["connection"]["dst_addresses"].as_array();
    let first = addresses.and_then(|addresses| addresses.first()?.as_str());
    let first = first.with_context(|| format!("no address of the endpoint in {connected}"))?;
    Ok(first.split('/').next().unwrap_or(first).to_owned())
}

fn vni(connection: &Value) -> Option<u32> {
    connection["tunnel"]["vni"].as_u64()?.try_into().ok()
}

/// The counters of the tunnel with that VNI.
pub(super) fn counters(status: &Value, vni: u32) -> Option<NodeCounters> {
    let connections = status["connections"].as_array()?;
    let connection = connections
        .iter()
        .find(|connection| self::vni(connection) == Some(vni))?;
    let counters = &connection["tunnel"]["counters"];
    Some(NodeCounters {
        tx_packets: counters["tx_packets"].as_u64()?,
        rx_packets: counters["rx_packets"].as_u64()?,
    })
}

/// The BPF programs that count.
pub(super) fn bpf(status: &Value) -> Result<Bpf> {
    let text = |name: &str| status["bpf"][name].as_str().unwrap_or_default().to_owned();
    let bpf = Bpf {
        hook: text("hook"),
        object_sha256: text("object_sha256"),
    };
    ensure!(
        bpf.hook != "none" && !bpf.hook.is_empty(),
        "no BPF program is attached: {}",
        status["degraded"]
    );
    Ok(bpf)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const PING: &str = "PING 172.16.1.0 (172.16.1.0) 56(84) bytes of data.
64 bytes from 172.16.1.0: icmp_seq=1 ttl=64 time=0.204 ms
64 bytes from 172.16.1.0: icmp_seq=2 ttl=64 time=0.060 ms
64 bytes from 172.16.1.0: icmp_seq=3 ttl=64 time=0.065 ms

--- 172.16.1.0 ping statistics ---
4 packets transmitted, 3 received, 25% packet loss, time 26ms
rtt min/avg/max/mdev = 0.060/0.442/1.201/0.536 ms
";

    #[test]
    fn ping_is_read() {
        assert_eq!(
            Ping::parse(PING),
            Some(Ping {
                sent: 4,
                received: 3,
                rtt_us_p50: 65
            })
        );
        assert_eq!(Ping::parse("ping: connect: Network is unreachable"), None);
    }

    #[test]
    fn loss_and_leaks_are_failures() {
        let leaked = |links| Leaked {
            links,
            pins: 0,
            netns: 0,
            processes: 0,
        };
        let report = |received, leaked| Report {
            connection: Connection {
                id: String::new(),
                network_service: String::new(),
                endpoint: String::new(),
                mechanism: String::new(),
                vni: 1,
                mtu: 1450,
                path: Vec::new(),
            },
            setup_ms: 1.0,
            dns: Dns {
                question: String::new(),
                answer: String::new(),
            },
            ping: Ping {
                sent: 20,
                received,
                rtt_us_p50: 50,
            },
            counters: Counters {
                client_node: NodeCounters {
                    tx_packets: 20,
                    rx_packets: 20,
                },
                endpoint_node: NodeCounters {
                    tx_packets: 20,
                    rx_packets: 20,
                },
            },
            bpf: Bpf {
                hook: "tcx".into(),
                object_sha256: String::new(),
            },
            fault: None,
            leaked,
        };
        report(20, leaked(0)).check(20).unwrap();
        assert!(report(19, leaked(0)).check(20).is_err());
        assert!(report(20, leaked(1)).check(20).is_err());
    }

    #[test]
    fn the_clients_words_are_read() {
        let connected = json!({"event": "connected", "connection": {
            "id": "nsc-id", "network_service": "icmp-responder@cluster-2.example",
            "endpoint": "nse@cluster-2.example", "mechanism": "VXLAN", "vni": 4242, "mtu": 1450,
            "path": ["nsc", "agent-1"], "src_addresses": ["172.16.1.1/32"],
            "dst_addresses": ["172.16.1.0/32"], "interface": "nsm-1"},
            "setup_ms": 2.5, "dns": {"question": "A cluster-2.example", "answer": "198.51.100.10"}});
        assert_eq!(connection(&connected).unwrap().vni, 4242);
        assert_eq!(endpoint_address(&connected).unwrap(), "172.16.1.0");
        assert_eq!(dns(&connected).unwrap().answer, "198.51.100.10");
        let without =
            json!({"event": "connected", "connection": {"mechanism": "KERNEL"}, "dns": null});
        assert!(connection(&without).is_err() && dns(&without).is_err());
        assert!(endpoint_address(&without).is_err() && setup_ms(&without).is_err());
    }

    #[test]
    fn counters_are_those_of_the_tunnel() {
        let status = json!({"connections": [
            {"tunnel": {"vni": 6, "counters": {"tx_packets": 1, "rx_packets": 2}}},
            {"tunnel": {"vni": 7, "counters": {"tx_packets": 20, "rx_packets": 19}}},
            {"tunnel": null}]});
        let found = counters(&status, 7).unwrap();
        assert_eq!(
            found,
            NodeCounters {
                tx_packets: 20,
                rx_packets: 19
            }
        );
        assert!(!found.cover(&Ping {
            sent: 20,
            received: 20,
            rtt_us_p50: 1
        }));
        assert_eq!(counters(&status, 8), None);
    }
}
