//! The connections of this agent: the store, when they expire, and who monitors them.

pub(crate) mod expiry;
pub(crate) mod monitor;
pub(crate) mod store;
