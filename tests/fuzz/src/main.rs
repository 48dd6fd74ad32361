//! The program that libFuzzer drives. Its arguments are libFuzzer's own, and an environment variable names the target.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nsm_fuzz::{TARGET_VARIABLE, Target};

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var(TARGET_VARIABLE).unwrap_or_default();
    Target::named(&name).unwrap_or_else(|| panic!("{TARGET_VARIABLE}={name:?} names no target"))
});

fuzz_target!(|input: &[u8]| (TARGET.run)(input));
