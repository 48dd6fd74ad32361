//! Links against the live kernel, in network namespaces that only the tests have.

// The support is no test by itself, and its failures are the tests'.
#![allow(clippy::unwrap_used)]

mod addresses;
mod contents;
mod converge;
mod failure;
mod fast;
mod fence;
mod forward;
mod leftover;
mod pod_link;
mod support;
mod times;
mod underlay;
