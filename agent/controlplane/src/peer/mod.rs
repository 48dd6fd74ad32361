//! The next hops of our connections: their channels, and the monitor streams from them.

pub(crate) mod calls;
pub(crate) mod peers;
mod reach;
pub(crate) mod stream;
#[cfg(test)]
mod tests;
