//! The moment in which one agent ends and the next one begins.
//!
//! The next one may be started while the first still has its sockets and its programs: it stops, or was killed and is not reaped yet.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// How long is waited for what another process has: longer than a stopped agent takes to end its listeners.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often is tried meanwhile.
const INTERVAL: Duration = Duration::from_millis(50);

/// Opens what may be taken by an agent that ends: a port or socket, the programs.
///
/// # Errors
///
/// It cannot be opened, or is still taken after some seconds.
pub(super) async fn when_free<T, E>(
    what: impl fmt::Display,
    is_taken: impl Fn(&E) -> bool,
    open: impl AsyncFn() -> Result<T, E>,
) -> Result<T, E> {
    let until = Instant::now() + PATIENCE;
    let mut is_said = false;
    loop {
        match open().await {
            Err(error) if is_taken(&error) && Instant::now() < until => {}
            opened => return opened,
        }
        if !std::mem::replace(&mut is_said, true) {
            tracing::info!(%what, "taken by another process: waiting for its end");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn what_is_taken_is_waited_for_and_nothing_else() {
        let tries = Cell::new(0);
        let opened = when_free(
            "a port",
            |taken: &bool| *taken,
            async || {
                tries.set(tries.get() + 1);
                match tries.get() {
                    3 => Ok("open"),
                    _ => Err(true),
                }
            },
        );
        assert_eq!((opened.await, tries.get()), (Ok("open"), 3));
        let broken = when_free(
            "a port",
            |taken: &bool| *taken,
            async || Err::<(), _>(false),
        );
        assert_eq!(broken.await, Err(false));
    }
}
