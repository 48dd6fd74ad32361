//! Bytes between processes: dialing, unix sockets that carry descriptors, and the coalescing of writes.

pub mod clients;
pub(crate) mod coalesce;
pub mod dial;
pub(crate) mod guard;
pub(crate) mod incoming;
pub(crate) mod stagger;
pub mod tls;
pub mod unix;
