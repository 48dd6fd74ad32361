//! How domains are resolved: from what, with what outcome, how long a question took.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use super::{ResolveError, cache::Outcome};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookupLabels {
    by: &'static str,
}

/// What a resolution was answered from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    /// The name itself, or the configured hosts.
    Configuration,
    /// An answer that was remembered.
    Cache,
    /// A question that somebody else had asked already.
    Flight,
    /// A new question.
    Question,
    /// Nothing: too many questions at once.
    Refusal,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QuestionLabels {
    outcome: &'static str,
}

/// Counts of one resolver. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub(super) struct DnsMetrics {
    lookups: Family<LookupLabels, Counter>,
    questions: Family<QuestionLabels, Histogram, fn() -> Histogram>,
}

impl Default for DnsMetrics {
    fn default() -> Self {
        Self {
            lookups: Family::default(),
            // From a server on this machine to the longest timeout.
            questions: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.0005, 2.0, 14))
            }),
        }
    }
}

impl DnsMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "dns_lookups",
            "Domains resolved, by what answered",
            self.lookups.clone(),
        );
        registry.register_with_unit(
            "dns_query_duration",
            "Time that the questions for one domain took together, by outcome",
            Unit::Seconds,
            self.questions.clone(),
        );
    }

    pub(super) fn looked_up(&self, by: By) {
        let by = match by {
            By::Configuration => "configuration",
            By::Cache => "cache",
            By::Flight => "flight",
            By::Question => "question",
            By::Refusal => "refusal",
        };
        self.lookups.get_or_create(&LookupLabels { by }).inc();
    }

    pub(super) fn asked(&self, outcome: &Outcome, took: Duration) {
        let outcome = match outcome {
            Ok(_) => "found",
            Err(ResolveError::NoDomain { .. }) => "no_domain",
            Err(ResolveError::NoAddress { .. }) => "no_address",
            Err(ResolveError::NotOffered { .. }) => "not_offered",
            Err(ResolveError::ServerFailed { .. }) => "server_failed",
            Err(ResolveError::Timeout { .. }) => "timeout",
            Err(ResolveError::Unreachable { .. } | ResolveError::NoServers { .. }) => "no_server",
            Err(ResolveError::BadAnswer { .. }) => "bad_answer",
            Err(ResolveError::Busy { .. } | ResolveError::Interrupted { .. }) => "given_up",
        };
        self.questions
            .get_or_create(&QuestionLabels { outcome })
            .observe(took.as_secs_f64());
    }
}
