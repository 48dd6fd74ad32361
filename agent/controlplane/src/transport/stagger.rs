//! Several ways to one place: tried in their order, each a little after the one before, and the first that leads there is taken (RFC 8305
//! section 5). One that is dead then costs that little, and not its whole timeout.

use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::time::timeout;

/// How long an attempt is waited for alone: RFC 8305's "Connection Attempt Delay" as it recommends it.
pub(crate) const DELAY: Duration = Duration::from_millis(250);

/// The outcome of the first attempt that succeeds; the others are dropped. Each begins [`DELAY`] after the one before, or when all before
/// have failed.
///
/// # Errors
/// All have failed: why, in the order in which they did.
pub(crate) async fn first<T, E>(
    attempts: impl IntoIterator<Item = impl Future<Output = Result<T, E>>>,
) -> Result<T, Vec<E>> {
    let mut waiting = attempts.into_iter().fuse();
    let mut running = FuturesUnordered::new();
    let mut failures = Vec::new();
    loop {
        let next = waiting.next();
        let is_last = next.is_none();
        running.extend(next);
        if running.is_empty() {
            return Err(failures);
        }
        let outcome = if is_last {
            running.next().await
        } else {
            timeout(DELAY, running.next()).await.ok().flatten()
        };
        match outcome {
            Some(Ok(reached)) => return Ok(reached),
            Some(Err(failure)) => failures.push(failure),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;

    async fn after(milliseconds: u64, outcome: Result<u8, u8>) -> Result<u8, u8> {
        sleep(Duration::from_millis(milliseconds)).await;
        outcome
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_one_costs_a_moment_and_a_failed_one_nothing() {
        const HANGS: u64 = 1_000_000;
        for (attempts, outcome, took) in [
            (vec![(1, Ok(1)), (1, Ok(2))], Ok(1), 1),
            (vec![(HANGS, Ok(1)), (1, Ok(2))], Ok(2), 251),
            (vec![(HANGS, Ok(1)), (HANGS, Ok(2)), (1, Ok(3))], Ok(3), 501),
            (vec![(1, Err(1)), (1, Ok(2))], Ok(2), 2),
            // The first is slow, and wins all the same.
            (vec![(300, Ok(1)), (100, Ok(2))], Ok(1), 300),
            (vec![(300, Err(1)), (1, Err(2))], Err(vec![2, 1]), 300),
            (vec![], Err(vec![]), 0),
        ] {
            let began = Instant::now();
            let attempts = attempts
                .into_iter()
                .map(|(time, outcome)| after(time, outcome));
            assert_eq!(first(attempts).await, outcome);
            assert_eq!(began.elapsed(), Duration::from_millis(took));
        }
    }
}
