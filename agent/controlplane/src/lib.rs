//! The network side of the agent: NSM v1 services, registries, Requests.
//!
//! [`plane::ControlPlane`] is the whole of it; [`api`] puts it behind sockets. One Request reads top to bottom in
//! `call::request`, where it goes next is decided in [`route`], what this node does for it in `call::case`. The node's links
//! are behind the port [`ports::Forwarder`].

#![forbid(unsafe_code)]

pub mod api;
pub mod call;
mod connection;
pub mod convert;
mod deadlines;
pub mod error;
pub mod identity;
pub mod liveness;
mod metrics;
mod occasional;
mod peer;
pub mod places;
pub mod plane;
pub mod ports;
pub mod registry;
pub mod route;
mod sync;
pub mod transport;
