//! What a workload with a proven id may do here: the policy of a domain.
//!
//! Inside the own trust domain NSM's standard ids need no configuration. Every other domain has to be named, with the trust domain that
//! speaks for it, and gets what it is given: nothing to begin with.
//!
//! | question | answered by |
//! |---|---|
//! | which domain speaks a trust domain for | [`Remote::trust_domain`] |
//! | what is an id | [`Roles`] |
//! | may a caller do this | [`Access::check_caller`] |
//! | is this server who it should be | [`Access::check_server`] |
//! | does a caller see a service | [`Access::sees`] |
//! | whose is what a caller makes | [`Access::workload`] |
//!
//! A caller without an id is not asked about here: see [`policy`](super::policy).

mod decide;
mod pattern;
mod rules;

pub use decide::{Ask, Denied, Server};
pub use pattern::{IdPattern, NamePattern, PatternError};
pub use rules::{Access, BadRules, MOST_DOMAINS, Remote, Role, Roles, Rules};
