//! What happens often and is worth a line of the log now and then.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;

use crate::sync::lock;

/// The least time between two lines of one kind: a flood of calls must not become a flood of lines.
const INTERVAL: Duration = Duration::from_secs(60);

/// One kind of line. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Occasional(Arc<Mutex<Option<Instant>>>);

impl Occasional {
    /// Whether the last line is long enough ago; if so, the next one is counted from now.
    pub(crate) fn is_due(&self) -> bool {
        let (mut last, now) = (lock(&self.0), Instant::now());
        let is_due = last.is_none_or(|last| now >= last + INTERVAL);
        if is_due {
            *last = Some(now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_line_comes_once_a_minute() {
        let line = Occasional::default();
        assert!(line.is_due() && !line.is_due());
        tokio::time::sleep(INTERVAL).await;
        assert!(line.is_due() && !line.is_due());
    }
}
