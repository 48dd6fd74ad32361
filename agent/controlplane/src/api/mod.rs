//! The listeners, and the services of NSM v1 on them.

pub mod listener;
pub mod server;
