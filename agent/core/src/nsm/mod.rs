//! The rules of NSM: names, paths, the choice of an endpoint, how long a connection lives, and when it heals.

pub mod expiry;
pub mod heal;
pub mod name;
pub mod path;
pub mod registry;
pub mod select;
