//! A number in memory that BPF programs and user space both use, at any time.

use core::cell::UnsafeCell;

/// A 64 bit number that is loaded and stored whole, without order between several of them.
///
/// User space does so by atomics. For BPF Rust has none (LLVM 22 cannot select even a relaxed load below instruction set v4);
/// there it is a volatile access, which the compiler neither splits nor repeats, of an aligned word, which the processor
/// does not split.
#[repr(transparent)]
#[derive(Default)]
pub struct Shared(UnsafeCell<u64>);

// SAFETY: every access goes through `load` and `store`, which are whole whatever other threads do.
unsafe impl Sync for Shared {}

impl Shared {
    /// The value.
    #[inline(always)]
    #[must_use]
    pub fn load(&self) -> u64 {
        #[cfg(target_arch = "bpf")]
        // SAFETY: valid and aligned as `self` is; see the type.
        return unsafe { self.0.get().read_volatile() };
        #[cfg(not(target_arch = "bpf"))]
        return self.atomic().load(core::sync::atomic::Ordering::Relaxed);
    }

    /// Replaces the value.
    #[inline(always)]
    pub fn store(&self, value: u64) {
        #[cfg(target_arch = "bpf")]
        // SAFETY: as in `load`.
        unsafe {
            self.0.get().write_volatile(value);
        }
        #[cfg(not(target_arch = "bpf"))]
        self.atomic()
            .store(value, core::sync::atomic::Ordering::Relaxed);
    }

    /// Loads, adds, stores. Whoever does the same at the same moment makes one of the two additions get lost.
    #[inline(always)]
    pub(crate) fn add(&self, more: u64) {
        self.store(self.load().wrapping_add(more));
    }

    #[cfg(not(target_arch = "bpf"))]
    fn atomic(&self) -> &core::sync::atomic::AtomicU64 {
        // SAFETY: valid and aligned as `self` is; whatever else accesses it does so by atomics, too, or is a BPF program.
        unsafe { core::sync::atomic::AtomicU64::from_ptr(self.0.get()) }
    }
}

impl core::fmt::Debug for Shared {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.load().fmt(f)
    }
}
