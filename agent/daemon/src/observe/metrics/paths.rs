//! Metrics of the ways to the peers of tunnels.

use std::sync::atomic::AtomicU64;

use nsm_core::{
    clock::Monotonic,
    liveness::{Direction, Verdict},
};
use nsm_dataplane::liveness::Preflights;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use super::now::OfConnection;
use crate::observe::evidence::{ConnectionEvidence, Evidence, PathEvidence};

type Number = Gauge<f64, AtomicU64>;

/// One direction of a connection's path, "in" or "out" as seen from this node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfWay {
    connection: String,
    peer: String,
    domain: String,
    way: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfQuantile {
    connection: String,
    peer: String,
    domain: String,
    quantile: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOutcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPeer {
    peer: String,
}

/// Adds the paths of all connections and the sessions with all peers; nothing where this agent makes no links.
pub(super) fn register(evidence: &Evidence, registry: &mut Registry) {
    if evidence.programs.is_none() {
        return;
    }
    let paths = Paths::of(evidence.at);
    for connection in &evidence.connections {
        if let Some(labels) = OfConnection::of(connection) {
            paths.add(&labels, connection);
        }
    }
    paths.register(registry);
    if let Some(count) = evidence.preflights {
        preflights(count, registry);
    }

    let [probes, answers, reflected] = [(); 3].map(|()| Family::<OfPeer, Counter>::default());
    for report in &evidence.sessions {
        let of = OfPeer {
            peer: report.path.address.to_string(),
        };
        for (family, count) in [
            (&probes, report.probes),
            (&answers, report.answers),
            (&reflected, report.reflected),
        ] {
            family.get_or_create(&of).inc_by(count);
        }
    }
    for (name, help, family) in [
        ("sbfd_probes", "S-BFD probes to a peer that left", probes),
        ("sbfd_answers", "Answers of a peer to our probes", answers),
        (
            "sbfd_reflected",
            "Probes of a peer that were answered",
            reflected,
        ),
    ] {
        registry.register(name, help, family);
    }
}

/// Requests that needed a path, by what its proof took.
fn preflights(count: Preflights, registry: &mut Registry) {
    let by_outcome = Family::<OfOutcome, Counter>::default();
    for (outcome, count) in [
        ("standing", count.standing),
        ("answered", count.answered),
        ("silent", count.silent),
        ("switched_off", count.switched_off),
        ("cut", count.cut),
    ] {
        by_outcome
            .get_or_create(&OfOutcome { outcome })
            .inc_by(count);
    }
    registry.register(
        "preflights",
        "Proofs of a path before a connection was granted: its session was standing, its probes were answered, or were not, or the caller did not wait for the end",
        by_outcome,
    );
    let answers = Counter::<u64>::default();
    answers.inc_by(count.answers);
    registry.register(
        "preflight_answers",
        "Answers to probes that the answered preflights waited for",
        answers,
    );
}

struct Paths {
    /// When the evidence was gathered.
    at: Monotonic,
    up: Family<OfWay, Gauge>,
    silence: Family<OfWay, Number>,
    round_trip: Family<OfQuantile, Number>,
    loss: Family<OfConnection, Number>,
    mtu: Family<OfConnection, Gauge>,
}

impl Paths {
    fn of(at: Monotonic) -> Self {
        Self {
            at,
            up: Family::default(),
            silence: Family::default(),
            round_trip: Family::default(),
            loss: Family::default(),
            mtu: Family::default(),
        }
    }

    fn add(&self, of: &OfConnection, evidence: &ConnectionEvidence) {
        let Some(PathEvidence { health, measured }) = &evidence.path else {
            return;
        };
        for (way, direction, known) in [
            ("in", Direction::In, &evidence.inward),
            ("out", Direction::Out, &evidence.outward),
        ] {
            let of = OfWay {
                connection: of.connection.clone(),
                peer: of.peer.clone(),
                domain: of.domain.clone(),
                way,
            };
            match health.finding(direction).verdict {
                Verdict::Up => drop(self.up.get_or_create(&of).set(1)),
                Verdict::Down => drop(self.up.get_or_create(&of).set(0)),
                Verdict::Unknown | Verdict::Unverified => {}
            }
            if let Some(proved) = known.proved {
                let silence = self.at.since(proved).as_secs_f64();
                self.silence.get_or_create(&of).set(silence);
            }
        }
        let measured = measured.unwrap_or_default();
        for (quantile, time) in [("0.5", measured.rtt_p50), ("0.99", measured.rtt_p99)] {
            let of = OfQuantile {
                connection: of.connection.clone(),
                peer: of.peer.clone(),
                domain: of.domain.clone(),
                quantile,
            };
            if let Some(time) = time {
                self.round_trip.get_or_create(&of).set(time.as_secs_f64());
            }
        }
        if let Some(loss) = measured.loss() {
            self.loss.get_or_create(of).set(loss);
        }
        if let Some(mtu) = health.path_mtu {
            self.mtu.get_or_create(of).set(mtu.into());
        }
    }

    fn register(self, registry: &mut Registry) {
        registry.register(
            "path_up",
            "Whether packets pass on a way between this node and a tunnel's peer: 1 or 0; absent where that is not known",
            self.up,
        );
        registry.register_with_unit(
            "path_silence",
            "Since a way was last proved: in, something of the peer came; out, a probe was answered",
            Unit::Seconds,
            self.silence,
        );
        registry.register_with_unit(
            "path_round_trip",
            "Round trips of the last minute",
            Unit::Seconds,
            self.round_trip,
        );
        registry.register_with_unit(
            "path_loss",
            "Share of the last minute's probes that stayed unanswered",
            Unit::Other("ratio".to_owned()),
            self.loss,
        );
        registry.register_with_unit(
            "path_mtu",
            "Largest inner IP packet that the path is known to carry",
            Unit::Bytes,
            self.mtu,
        );
    }
}
