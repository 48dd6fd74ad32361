//! Where a Request goes next.

pub(crate) mod addresses;
mod admit;
pub(crate) mod bypass;
pub(crate) mod directory;
pub(crate) mod expected;
pub(crate) mod local;
pub(crate) mod lookup;
pub mod next;
pub mod router;
pub mod upstream;
