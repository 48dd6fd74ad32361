//! Questions of an agent to the world around its node: where another domain's registry and proxy are, and which public address the node
//! has.
//!
//! [`dns`] resolves domains. [`public_address`] asks metadata services, Kubernetes and STUN servers. Their questions and answers
//! end here: which address holds is decided in `nsm_core::address`.

#![forbid(unsafe_code)]

pub mod dns;
pub mod public_address;
