//! The same work on every machine and every day.

use std::hint::black_box;

/// Some hundred milliseconds on a CPU of 2026.
const STEPS: u32 = 40_000_000;

/// A chain of multiplications and shifts of which each needs the result of the one before: it takes the CPU's time and little memory.
///
/// The workspace compiles this crate with optimisation in every profile, so that all programs do the same work. The result is there for
/// callers to pass on, so that the compiler leaves the work in.
#[inline(never)]
pub fn fixed_work() -> u64 {
    let mut state = black_box(0x9e37_79b9_7f4a_7c15_u64);
    for _ in 0..STEPS {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
    }
    state
}
