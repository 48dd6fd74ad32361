//! What a call does: Request, Close, and the calls to the registry.

mod case;
pub(crate) mod close;
pub(crate) mod pod;
pub(crate) mod registrar;
pub mod request;
