//! What an agent asks the world around its node: where another domain's registry and proxy are, and what the node's own public
//! address is.
//!
//! [`dns`] resolves domains. [`public_address`] asks metadata services, Kubernetes and STUN servers. Both ask only; what the
//! answers mean is decided in `nsm_core`.

#![forbid(unsafe_code)]

pub mod dns;
pub mod public_address;
