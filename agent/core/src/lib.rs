//! The decisions of the agent.
//!
//! Everything here is a function of its arguments: no clock, socket, kernel or random source is read, so that each rule can be tested
//! with plain values. Time comes in as `now`, randomness as a closure, and what is to be done goes out as a value. `dataplane` and
//! `controlplane` carry it out.
//!
//! Text from the wire is parsed here, once, into types that cannot hold an illegal value; what does not parse is an error that
//! names the key and the value.

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
