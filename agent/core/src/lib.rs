//! The decisions of the agent.
//!
//! Everything here is a function of its arguments. No clock, socket, kernel or random source is read, so each rule can be tested with
//! plain values: time is a parameter `now`, randomness a closure, and the result is a value. `dataplane` and `controlplane` act on it.
//!
//! Text from the wire is parsed here, once, into types that cannot hold an illegal value. An error of parsing names the key and the
//! value.

#![forbid(unsafe_code)]

pub mod address;
pub mod backoff;
pub mod clock;
pub mod identity;
pub mod link;
pub mod liveness;
pub mod mechanism;
pub mod net;
pub mod nsm;
pub mod text;

#[cfg(test)]
mod tests;
