//! VXLAN network identifiers.

use std::{fmt, str::FromStr};

use serde::Serialize;

use crate::text::decimal;

/// Why a number or a text is no VNI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VniError {
    /// The number does not fit 24 bits, or is zero.
    #[error("VNI {0} is out of range: a VNI is 1 to {max} (RFC 7348: 24 bits, and 0 is not used)", max = Vni::MAX)]
    OutOfRange(u64),
    /// The text is no number.
    #[error("VNI `{0}` is no number: a VNI is a decimal number from 1 to {max}", max = Vni::MAX)]
    NotANumber(String),
}

/// A VXLAN network identifier, 1 to 16,777,215.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Vni(u32);

impl Vni {
    /// The largest VNI.
    pub const MAX: u32 = 0xff_ffff;

    /// The default management VNI (RFC 8971 section 3).
    pub const MANAGEMENT: Self = Self(1);

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = VniError;

    fn try_from(number: u32) -> Result<Self, VniError> {
        if (1..=Self::MAX).contains(&number) {
            Ok(Self(number))
        } else {
            Err(VniError::OutOfRange(number.into()))
        }
    }
}

impl FromStr for Vni {
    type Err = VniError;

    fn from_str(text: &str) -> Result<Self, VniError> {
        let number = decimal(text).ok_or_else(|| VniError::NotANumber(text.to_owned()))?;
        u32::try_from(number)
            .map_err(|_| VniError::OutOfRange(number))?
            .try_into()
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vni(number: u32) -> Vni {
        number.try_into().unwrap()
    }

    #[test]
    fn a_vni_has_24_bits_and_is_not_zero() {
        assert_eq!(vni(0xff_ffff).get(), 16_777_215);
        assert_eq!(Vni::try_from(0), Err(VniError::OutOfRange(0)));
        assert_eq!(
            Vni::try_from(0x100_0000),
            Err(VniError::OutOfRange(0x100_0000))
        );
        assert_eq!(
            "16777216".parse::<Vni>(),
            Err(VniError::OutOfRange(16_777_216))
        );
        assert_eq!(
            "4294967297".parse::<Vni>(),
            Err(VniError::OutOfRange(4_294_967_297)),
            "not cut to 32 bits"
        );
        for bad in ["", "+5", "-5", "0x10", "5 ", "99999999999999999999", "٣"] {
            assert_eq!(
                bad.parse::<Vni>(),
                Err(VniError::NotANumber(bad.to_owned())),
                "{bad}"
            );
        }
    }

    proptest! {
        #[test]
        fn text_round_trips(number in 1u32..=Vni::MAX) {
            prop_assert_eq!(vni(number).to_string().parse::<Vni>().unwrap().get(), number);
        }
    }
}
