//! What the BPF programs decide, as plain Rust: it runs in the kernel and, unchanged, in the tests of the host.
//!
//! [`packet`] finds the VXLAN header in a frame, [`decide`] says what the frame is to us, [`pod`] what a pod may send, [`fast`]
//! what takes the fast path. They see the world only through
//! two small traits: [`Bytes`] (a frame) and [`decide::Node`] (the maps). The kernel's side of them is in `main.rs`.
//!
//! Rules that keep the verifier content: a loop turns a few times and is unrolled by the compiler, nothing recurses, nothing can
//! panic, every function is inlined into its program. Two are exceptions: one step of the chain of IPv6 extension headers ([`Bytes::next_header`]), which the verifier would
//! otherwise walk on every way that leads to it; and the decision on frames that are not plain ([`packet::PlainV4`],
//! [`packet::PlainV6`]), so that the others have all registers for themselves.

#![no_std]
#![forbid(unsafe_code)]

pub mod decide;
pub mod fast;
pub mod packet;
pub mod pod;

use packet::{Header, Step};

/// A frame, read piecewise. Reading past its end gives `None`, never a panic.
pub trait Bytes {
    /// The `N` bytes that start at `offset`.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// One step along IPv6 extension headers. In the kernel it is a function that the verifier checks once, by itself.
    #[inline(always)]
    fn next_header(&self, at: Header) -> Step {
        packet::next_header(self, at)
    }
}

impl Bytes for [u8] {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}
