//! Who calls the agent, and what that caller may do.

mod caller;
pub mod policy;
pub mod relay;

pub use caller::{Caller, Transport, User};
