//! Who we are and who calls: X.509-SVIDs and where they come from, the certificates of peers, and the tokens that each hop puts into the
//! path.

pub mod certificate;
mod es256;
pub mod gate;
pub mod pem;
pub mod session;
pub mod source;
pub mod svid;
pub mod token;
pub mod workload_api;
