//! Where a Request goes next.

pub(crate) mod bypass;
pub(crate) mod directory;
pub mod router;
pub mod upstream;
