//! Addresses: the public address of a node, the map between internal and public ones, prefixes for connections, and special ranges.

pub mod ipmap;
pub mod prefix;
pub mod public;
pub mod special;
