//! Who calls: the tokens that each hop puts into the path.

pub mod token;
