//! The next hops of our connections: their channels, and the monitor streams from them.

pub(crate) mod downstream;
pub(crate) mod peers;
