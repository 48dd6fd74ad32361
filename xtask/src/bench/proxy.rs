//! Request and Close through two agents.

use anyhow::Result;
use nsm_stats::p99_name;

use super::{
    Setting,
    processes::cpu_ms,
    report::{
        Bar::{AtLeast, AtMost},
        Row,
    },
    scene::Pair,
    sink::Sink,
};

/// How many pairs are at work at one time.
const IN_FLIGHT: [usize; 3] = [1, 8, 64];

/// Where the bars are.
const JUDGED: usize = 8;

const PAIRS_PER_SECOND: f64 = 3_000.0;
const P99_MS: f64 = 5.0;

/// Connections and caches stand after a few; allocators and the branch predictor take more.
const WARM_UP: u64 = 500;

pub(super) fn measure(setting: &Setting<'_>, sink: &Sink) -> Result<()> {
    let pairs = setting.size.pick(10_000, 500, 2_000);
    sink.step("two agents");
    let pair = Pair::start(&setting.built.world()?)?;
    for in_flight in IN_FLIGHT {
        sink.step(format!("{in_flight} in flight"));
        // One at a time takes longest and settles soonest.
        let pairs = if in_flight == 1 { pairs / 4 } else { pairs };
        sink.rows(load(&pair, pairs, in_flight)?);
    }
    sink.note(
        "two agents as processes on one loopback interface, forwarder off; client and endpoint share a process and the CPUs with them",
    );
    sink.note("CPU is user and system time of /proc/PID/stat, warm-up included in time and pairs");
    Ok(())
}

/// One load of both agents.
fn load(pair: &Pair, pairs: u64, in_flight: usize) -> Result<Vec<Row>> {
    let agents = [&pair.client_agent, &pair.endpoint_agent];
    let before = [cpu_ms(agents[0])?, cpu_ms(agents[1])?];
    let measured = pair.pairs(pairs, WARM_UP, in_flight)?;
    let run = measured.pairs + measured.warm_up;
    let n = measured.pairs - measured.failed;
    let row = |what: &str, value, unit, n| {
        Row::new(format!("{what}, {in_flight} in flight"), value, unit, n)
    };
    let p99 = format!("pair {}", p99_name(n));
    let mut rows = vec![
        row("pairs", measured.pairs_per_second, "/s", n),
        row("pair p50", measured.pair_p50_ms, "ms", n),
        row(&p99, measured.pair_p99_ms, "ms", n),
    ];
    if in_flight == JUDGED {
        rows[0] = rows[0].clone().bar(AtLeast(PAIRS_PER_SECOND));
        rows[2] = rows[2].clone().bar(AtMost(P99_MS));
    }
    for (agent, before) in agents.into_iter().zip(before) {
        let spent = (cpu_ms(agent)? - before) / run as f64;
        let what = format!("CPU a pair, {}", agent.name());
        rows.push(row(&what, spent, "ms", run));
    }
    let lost = measured.failed + measured.endpoint_holds;
    let lost = row("failed or left open", lost as f64, "", measured.pairs);
    rows.push(lost.bar(AtMost(0.0)));
    Ok(rows)
}
