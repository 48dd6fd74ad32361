//! The NSM v1 wire API (`networkservice`, `connection`, `connectioncontext`, `registry`) and the
//! agent's own admin API, as prost messages and tonic services.
//!
//! Field numbers and service names are those of `github.com/networkservicemesh/api` v1; the
//! messages carry no behaviour here: they are parsed into the types of `nsm-core` at the edge.

#![forbid(unsafe_code)]
#![allow(
    missing_docs,
    reason = "generated code; the .proto files hold the comments"
)]
#![allow(
    clippy::doc_markdown,
    clippy::large_enum_variant,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]

pub mod codec;

/// The admin API of the agent (`proxynsmgr.admin.v1`).
pub mod admin {
    tonic::include_proto!("proxynsmgr.admin.v1");
}

/// Connections, mechanisms, paths and the monitor service.
pub mod connection {
    tonic::include_proto!("connection");
}

/// What the two ends of a connection agree on.
pub mod connectioncontext {
    tonic::include_proto!("connectioncontext");
}

/// The Request and Close service.
pub mod networkservice {
    tonic::include_proto!("networkservice");
}

/// The registries of network services and endpoints.
pub mod registry {
    tonic::include_proto!("registry");
}

/// SPIFFE's Workload API, which agents are clients of.
pub mod workload {
    tonic::include_proto!("_");
}

/// The encoded `FileDescriptorSet` of every message and service above, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
