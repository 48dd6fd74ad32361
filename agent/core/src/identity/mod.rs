//! Who calls the agent, what that caller may do, and whose things are.

pub mod access;
mod caller;
pub mod chain;
pub mod claims;
pub mod es256;
mod owner;
pub mod policy;
mod process;
pub mod relay;
pub mod share;
mod spiffe_id;
pub mod workload;

pub use caller::{Caller, Transport};
pub use owner::Owner;
pub use process::{
    Facts, NamespaceId, NetnsCookie, Node, Process, Surroundings, UserNamespace, may_administer,
};
pub use spiffe_id::{SpiffeId, SpiffeIdError, TrustDomain};
pub use workload::Workload;
