//! Who calls the agent, and what that caller may do.

mod caller;
pub mod policy;

pub use caller::{Caller, Transport, User};
