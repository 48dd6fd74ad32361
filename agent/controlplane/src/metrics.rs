//! How Requests and Closes go: how many, with what outcome, how long.

use std::{
    fmt,
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use tonic::{Code, Status};

/// Calls by outcome.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    code: GrpcCode,
}

/// A gRPC status code under the name that gRPC's own metrics give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct GrpcCode(Code);

impl EncodeLabelValue for GrpcCode {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        use fmt::Write as _;
        match self.0 {
            Code::Ok => encoder.write_str("OK"),
            code => write!(encoder, "{code:?}"),
        }
    }
}

type Durations = Family<Labels, Histogram, fn() -> Histogram>;

/// From half a millisecond, what a refresh takes, to 16 s, beyond which a Request's deadline lies.
fn durations() -> Durations {
    Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.0005, 2.0, 16)))
}

/// What listeners count. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub(crate) struct CallMetrics {
    requests: Durations,
    closes: Durations,
}

impl Default for CallMetrics {
    fn default() -> Self {
        Self {
            requests: durations(),
            closes: durations(),
        }
    }
}

impl CallMetrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "request_duration",
            "Time that a Request took, by gRPC status; those whose caller went away are Cancelled",
            Unit::Seconds,
            self.requests.clone(),
        );
        registry.register_with_unit(
            "close_duration",
            "Time that a Close took, by gRPC status",
            Unit::Seconds,
            self.closes.clone(),
        );
    }

    /// A Request begins.
    pub(crate) fn request(&self) -> Running<'_> {
        Running::start(&self.requests)
    }

    /// A Close begins.
    pub(crate) fn close(&self) -> Running<'_> {
        Running::start(&self.closes)
    }
}

/// A call at work; dropped without an outcome it was cancelled.
pub(crate) struct Running<'a> {
    durations: &'a Durations,
    started: Instant,
    code: Code,
}

impl<'a> Running<'a> {
    fn start(durations: &'a Durations) -> Self {
        Self {
            durations,
            started: Instant::now(),
            code: Code::Cancelled,
        }
    }

    /// The call has this outcome.
    pub(crate) fn done<T>(mut self, outcome: Result<T, Status>) -> Result<T, Status> {
        self.code = outcome
            .as_ref()
            .map_or_else(|status| status.code(), |_| Code::Ok);
        outcome
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let labels = Labels {
            code: GrpcCode(self.code),
        };
        let took: Duration = self.started.elapsed();
        self.durations
            .get_or_create(&labels)
            .observe(took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_outcome() {
        let metrics = CallMetrics::default();
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        metrics.request().done(Ok(())).unwrap();
        let refused: Result<(), Status> = Err(Status::not_found("x"));
        metrics.request().done(refused).unwrap_err();
        drop(metrics.request());
        metrics.close().done(Ok(())).unwrap();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            r#"request_duration_seconds_count{code="OK"} 1"#,
            r#"request_duration_seconds_count{code="NotFound"} 1"#,
            r#"request_duration_seconds_count{code="Cancelled"} 1"#,
            r#"close_duration_seconds_count{code="OK"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}:\n{text}");
        }
    }
}
