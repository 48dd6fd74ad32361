//! Random numbers: unguessable ones from the kernel, and guessable ones for jitter.

use std::io;

use nix::libc;
use nsm_core::liveness::sbfd::Discriminator;

/// A random number of the kernel.
pub(super) fn number() -> io::Result<u64> {
    let mut bytes = [0; 8];
    loop {
        // SAFETY: writes at most as many bytes as the array has.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(got) {
            Ok(8) => return Ok(u64::from_ne_bytes(bytes)),
            Ok(_) => {}
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// A random discriminator: 0 is none (RFC 5880, section 6.3).
pub(super) fn discriminator() -> io::Result<Discriminator> {
    loop {
        if let Some(drawn) = Discriminator::new(number()? as u32) {
            return Ok(drawn);
        }
    }
}

/// Jitter (xorshift64*, Vigna 2016): even, quick, guessable.
#[derive(Debug)]
pub(super) struct Jitter(u64);

impl Jitter {
    pub(super) const fn new(seed: u64) -> Self {
        // Zero would stay zero.
        Self(seed | 1)
    }

    /// Uniform in 0..1.
    pub(super) fn unit(&mut self) -> f64 {
        let Self(state) = self;
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        let bits = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
        bits as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::Jitter;

    #[test]
    fn jitter_is_even_and_stays_inside() {
        let mut jitter = Jitter::new(0);
        let drawn: Vec<f64> = (0..10_000).map(|_| jitter.unit()).collect();
        assert!(drawn.iter().all(|unit| (0.0..1.0).contains(unit)));
        let mean = drawn.iter().sum::<f64>() / drawn.len() as f64;
        assert!((0.48..0.52).contains(&mean), "{mean}");
    }
}
