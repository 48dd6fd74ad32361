//! Addresses: the public address of a node, the map between internal and public ones, and prefixes for connections.

pub mod ipmap;
pub mod prefix;
pub mod public;
