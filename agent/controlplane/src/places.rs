//! What the agent's callers may hold of it, each and together: [`nsm_core::identity::share`] decides, here it is counted.
//!
//! A [`Place`] is held by the thing that it stands for, and goes with it. What finds no place is refused with the key of the limit; each
//! refusal is counted, and one a minute of each kind is logged.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use nsm_core::identity::share::{Holder, Limit, NoShare, Shares};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use crate::{occasional::Occasional, sync::lock};

/// What there is a limit of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Connections of NSM.
    Connections,
    /// Transport connections, each of which is an open file.
    Clients,
    /// Streams of events: monitors, Finds and watches.
    Streams,
    /// Entries of the registry, and endpoints that are reached through this agent.
    Entries,
    /// Bytes of all that is kept for callers.
    Bytes,
    /// Bytes of messages that have not arrived as a whole. They count apart: a refresh must arrive before anything can be given back.
    Messages,
    /// Questions of DNS that wait for an answer.
    Questions,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Clients => "clients",
            Self::Streams => "streams",
            Self::Entries => "entries",
            Self::Bytes => "bytes",
            Self::Messages => "messages",
            Self::Questions => "questions",
        }
    }

    const fn what(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Clients => "transport connections",
            Self::Streams => "monitor and Find streams",
            Self::Entries => "registry entries",
            Self::Bytes => "bytes of connections, registrations and events",
            Self::Messages => "bytes of messages that have not arrived as a whole",
            Self::Questions => "questions to DNS",
        }
    }

    /// The key of the limit for one holder.
    const fn key_of_one(self) -> &'static str {
        match self {
            Self::Connections => "limits.max_connections_per_source",
            Self::Clients => "limits.max_clients_per_source",
            Self::Streams => "limits.max_streams_per_source",
            Self::Entries => "limits.max_entries_per_source",
            Self::Bytes | Self::Messages => "limits.max_bytes_per_source",
            Self::Questions => "limits.max_questions_per_source",
        }
    }

    /// What raises the limit for all.
    const fn key_of_all(self) -> &'static str {
        match self {
            Self::Connections => "raise `limits.max_connections`",
            Self::Clients => "raise the agent's limit of open files (`ulimit -n`)",
            Self::Streams => "raise `limits.max_streams`",
            Self::Entries => "raise `limits.max_entries`",
            Self::Bytes | Self::Messages => "raise `limits.max_bytes`",
            Self::Questions => "ask again in a moment",
        }
    }
}

impl EncodeLabelValue for Kind {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        EncodeLabelValue::encode(&self.name(), encoder)
    }
}

/// There is no place for what a caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// One holder has as much as one may have.
    #[error(
        "one source may hold {limit} {} here, and this one has them: give some back, or raise `{}`",
        kind.what(),
        kind.key_of_one()
    )]
    OfOne {
        /// What of.
        kind: Kind,
        /// The limit.
        limit: usize,
    },
    /// The rest is for others.
    #[error(
        "what is left of the {limit} {} of this agent is kept for other sources: give some back, ask later, or {}",
        kind.what(),
        kind.key_of_all()
    )]
    Reserved {
        /// What of.
        kind: Kind,
        /// The limit for all.
        limit: usize,
    },
    /// Nothing is left.
    #[error("this agent holds {limit} {}, its limit: {}", kind.what(), kind.key_of_all())]
    All {
        /// What of.
        kind: Kind,
        /// The limit for all.
        limit: usize,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    limit: Kind,
}

/// How often something was refused for a limit. Clones count together.
#[derive(Debug, Clone, Default)]
struct Refusals(Family<Labels, Counter>);

/// The places of one kind. Clones count together.
#[derive(Debug, Clone)]
pub struct Places(Arc<Counted>);

#[derive(Debug)]
struct Counted {
    kind: Kind,
    limit: Limit,
    shares: Mutex<Shares>,
    refused: Counter,
    warning: Occasional,
}

impl Places {
    fn new(kind: Kind, limit: Limit, refusals: &Refusals) -> Self {
        Self(Arc::new(Counted {
            kind,
            limit,
            shares: Mutex::default(),
            refused: refusals.0.get_or_create(&Labels { limit: kind }).clone(),
            warning: Occasional::default(),
        }))
    }

    /// Takes `amount` for `holder`.
    ///
    /// # Errors
    /// A limit is reached. The refusal is counted.
    pub fn take(&self, holder: Holder, amount: usize) -> Result<Place, NoPlace> {
        let mut place = Place {
            places: self.clone(),
            holder,
            amount: 0,
        };
        place.grow(amount)?;
        Ok(place)
    }

    /// How much is taken by all.
    #[must_use]
    pub fn taken(&self) -> usize {
        lock(&self.0.shares).all()
    }
}

impl Counted {
    fn refusal(&self, holder: Holder, share: NoShare) -> NoPlace {
        let kind = self.kind;
        let refusal = match share {
            NoShare::OfOne => NoPlace::OfOne {
                kind,
                limit: self.limit.of_one,
            },
            NoShare::Reserved => NoPlace::Reserved {
                kind,
                limit: self.limit.all,
            },
            NoShare::All => NoPlace::All {
                kind,
                limit: self.limit.all,
            },
        };
        self.refused.inc();
        if self.warning.is_due() {
            tracing::warn!(
                limit = kind.name(),
                ?holder,
                %refusal,
                "a caller is refused; others within a minute are not logged"
            );
        }
        refusal
    }
}

/// What a holder has of a limit, until it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    holder: Holder,
    amount: usize,
}

impl Place {
    /// Takes so much more.
    ///
    /// # Errors
    /// A limit is reached. The place stays as it was.
    pub fn grow(&mut self, amount: usize) -> Result<(), NoPlace> {
        let places = &*self.places.0;
        let taken = lock(&places.shares).take(self.holder, amount, places.limit);
        taken.map_err(|share| places.refusal(self.holder, share))?;
        self.amount += amount;
        Ok(())
    }

    /// How much it is.
    #[must_use]
    pub const fn amount(&self) -> usize {
        self.amount
    }

    /// Gives back so much of it, or all where that is less.
    pub fn shrink(&mut self, amount: usize) {
        let amount = amount.min(self.amount);
        lock(&self.places.0.shares).give_back(self.holder, amount);
        self.amount -= amount;
    }

    /// Moves so much of it into a place of its own, or all where that is less.
    #[must_use]
    pub fn split(&mut self, amount: usize) -> Self {
        let amount = amount.min(self.amount);
        self.amount -= amount;
        Self {
            places: self.places.clone(),
            holder: self.holder,
            amount,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shrink(self.amount);
    }
}

/// The limits of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections of NSM.
    pub connections: Limit,
    /// Transport connections.
    pub clients: Limit,
    /// Streams of events.
    pub streams: Limit,
    /// Registry entries.
    pub entries: Limit,
    /// Bytes of all that is kept; the same for messages that have not arrived as a whole.
    pub bytes: Limit,
    /// Questions of DNS.
    pub questions: Limit,
}

impl Limits {
    /// Limits that are far from reach.
    #[must_use]
    pub const fn wide() -> Self {
        const fn each(all: usize) -> Limit {
            Limit { all, of_one: all }
        }
        Self {
            connections: each(1 << 16),
            clients: each(1 << 16),
            streams: each(1 << 16),
            entries: each(1 << 17),
            bytes: each(1 << 30),
            questions: each(512),
        }
    }
}

/// All places of an agent. Clones count together.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Connections of NSM.
    pub connections: Places,
    /// Transport connections.
    pub clients: Places,
    /// Streams of events.
    pub streams: Places,
    /// Registry entries.
    pub entries: Places,
    /// Bytes of all that is kept.
    pub bytes: Places,
    /// Bytes of messages that have not arrived as a whole.
    pub messages: Places,
    /// Questions of DNS.
    pub questions: Places,
    refusals: Refusals,
}

impl Budget {
    /// Nothing is taken yet.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let refusals = Refusals::default();
        Self {
            connections: Places::new(Kind::Connections, limits.connections, &refusals),
            clients: Places::new(Kind::Clients, limits.clients, &refusals),
            streams: Places::new(Kind::Streams, limits.streams, &refusals),
            entries: Places::new(Kind::Entries, limits.entries, &refusals),
            bytes: Places::new(Kind::Bytes, limits.bytes, &refusals),
            messages: Places::new(Kind::Messages, limits.bytes, &refusals),
            questions: Places::new(Kind::Questions, limits.questions, &refusals),
            refusals,
        }
    }

    /// Places for transport connections that are counted apart from all others.
    #[must_use]
    pub fn clients_apart(&self, most: usize) -> Places {
        let limit = Limit {
            all: most,
            of_one: most,
        };
        Places::new(Kind::Clients, limit, &self.refusals)
    }

    pub(crate) fn register_metrics(&self, registry: &mut Registry) {
        registry.register(
            "limit_refusals",
            "What was refused because a limit was reached, by limit",
            self.refusals.0.clone(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_back_and_refusals_are_counted() {
        let budget = Budget::new(&Limits {
            bytes: Limit {
                all: 1000,
                of_one: 100,
            },
            ..Limits::wide()
        });
        let user = Holder::process(Some(1), None);
        let mut place = budget.bytes.take(user, 60).unwrap();
        let error = place.grow(50).unwrap_err();
        assert!(
            error.to_string().contains("limits.max_bytes_per_source"),
            "{error}"
        );
        let mut part = place.split(20);
        part.grow(40).unwrap();
        assert_eq!(budget.bytes.taken(), 100);
        drop(place);
        part.shrink(50);
        assert_eq!(budget.bytes.taken(), 10);
        drop(part);
        assert_eq!(budget.bytes.taken(), 0);

        let mut registry = Registry::default();
        budget.register_metrics(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let line = r#"limit_refusals_total{limit="bytes"} 1"#;
        assert!(text.lines().any(|found| found == line), "{text}");
    }
}
