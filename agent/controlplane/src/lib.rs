//! The network side of the agent: NSM v1 services, registries, DNS.
//!
//! [`plane::ControlPlane`] is the whole of it; [`server`] puts it behind sockets. One Request reads
//! top to bottom in [`request`], where it goes next is decided in `route`, what this node does for
//! it in `case`. The node's links are behind the port [`forwarder::Forwarder`].

#![forbid(unsafe_code)]

mod bypass;
mod case;
mod close;
mod coalesce;
mod connections;
mod convert;
pub mod dial;
mod directory;
mod downstream;
pub mod error;
mod expiry;
pub mod forwarder;
pub mod health;
mod metrics;
mod monitor;
mod path_header;
mod peers;
pub mod plane;
mod pod;
mod registrar;
pub mod registry;
pub mod request;
pub mod route;
pub mod server;
pub mod token;
pub mod unix;
pub mod upstream;
