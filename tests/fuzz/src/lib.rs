//! The parsers of bytes that others choose, each as a function of any bytes.
//!
//! A [`Target`] panics where a parser panics, and where what it gave breaks a law of its own: a name reads as it is written, an admitted
//! context holds nothing of what is refused. `cargo xtask fuzz` drives the targets with libFuzzer, by the coverage of our crates;
//! `cargo test` replays the inputs in `corpus/NAME`, among them each that once failed.

#![forbid(unsafe_code)]

mod targets;

pub use targets::ALL;

/// The environment variable that names the target to the program.
pub const TARGET_VARIABLE: &str = "NSM_FUZZ_TARGET";

/// A parser, or several that get the same bytes.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, and that of its folder in `corpus`.
    pub name: &'static str,
    /// Parses, and checks what came of it.
    pub run: fn(&[u8]),
}

impl Target {
    /// The target of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|target| target.name == name)
    }
}
