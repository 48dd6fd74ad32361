//! Whether packets reach a peer and come back: the S-BFD session, the path MTU search, and the verdict from all evidence.

pub mod health;
pub mod plpmtu;
pub mod sbfd;
