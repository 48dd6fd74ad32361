//! Who calls: the tokens that each hop puts into the path.

mod es256;
pub mod gate;
pub mod token;
