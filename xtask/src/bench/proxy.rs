//! Request and Close through two agents.

use anyhow::Result;

use super::{
    Found,
    processes::cpu_ms,
    programs::Programs,
    report::{
        Bar::{AtLeast, AtMost},
        Row,
    },
    scene::Pair,
};

/// How many pairs are at work at one time.
const IN_FLIGHT: [usize; 3] = [1, 8, 64];

/// Where the bars are.
const JUDGED: usize = 8;

const PAIRS_PER_SECOND: f64 = 3_000.0;
const P99_MS: f64 = 5.0;

/// Connections and caches stand after a few; allocators and the branch predictor take more.
const WARM_UP: u64 = 500;

pub(super) fn measure(programs: &Programs, quick: bool) -> Result<Found> {
    let pairs = if quick { 500 } else { 10_000 };
    let pair = Pair::start(programs)?;
    let mut rows = Vec::new();
    for in_flight in IN_FLIGHT {
        // One at a time takes longest and settles soonest.
        let pairs = if in_flight == 1 { pairs / 4 } else { pairs };
        let agents = [&pair.client_agent, &pair.endpoint_agent];
        let before = [cpu_ms(agents[0])?, cpu_ms(agents[1])?];
        let measured = pair.pairs(pairs, WARM_UP, in_flight)?;
        let run = (measured.pairs + measured.warm_up) as f64;
        let row = |what: &str, value, unit| {
            Row::new(format!("{what}, {in_flight} in flight"), value, unit)
        };
        let mut found = [
            row("pairs", measured.pairs_per_second, "/s"),
            row("pair p50", measured.pair_p50_ms, "ms"),
            row("pair p99", measured.pair_p99_ms, "ms"),
        ];
        if in_flight == JUDGED {
            let [rate, p50, p99] = found;
            found = [
                rate.bar(AtLeast(PAIRS_PER_SECOND)),
                p50,
                p99.bar(AtMost(P99_MS)),
            ];
        }
        rows.extend(found);
        for (agent, before) in agents.into_iter().zip(before) {
            let spent = (cpu_ms(agent)? - before) / run;
            rows.push(row(&format!("CPU a pair, {}", agent.name()), spent, "ms"));
        }
        let lost = measured.failed + measured.endpoint_holds;
        rows.push(row("failed or left open", lost as f64, "").bar(AtMost(0.0)));
    }
    Ok(Found {
        rows,
        notes: vec![
            "two agents as processes on one loopback interface, forwarder off; client and endpoint share a process and the CPUs with them"
                .to_owned(),
            "CPU is user and system time of /proc/PID/stat, warm-up included in time and pairs".to_owned(),
        ],
    })
}
