//! The next hops of our connections: their channels, and the monitor streams from them.

pub(crate) mod peers;
pub(crate) mod stream;
