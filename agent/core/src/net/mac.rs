//! Ethernet addresses.

use std::{fmt, str::FromStr};

/// An Ethernet address.
///
/// ```
/// # use nsm_core::net::MacAddr;
/// let mac: MacAddr = "02:00:00:00:00:2A".parse().unwrap();
/// assert_eq!(mac.to_string(), "02:00:00:00:00:2a");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr([u8; 6]);

/// A text that is no [`MacAddr`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no Ethernet address: write six bytes in hexadecimal, such as `02:00:5e:10:00:01`"
)]
pub struct MacAddrError(String);

impl MacAddr {
    /// The address of these bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// An address that no manufacturer has, from random bytes: locally administered, unicast (IEEE 802-2014 section 8.2).
    #[must_use]
    pub const fn local_random(random: [u8; 6]) -> Self {
        const GROUP: u8 = 0b01;
        const LOCAL: u8 = 0b10;
        let [first, b, c, d, e, f] = random;
        Self([first & !GROUP | LOCAL, b, c, d, e, f])
    }

    /// Its bytes, in the order of the wire.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Whether one station can own it: neither a group's address nor zero.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, MacAddrError> {
        let refuse = || MacAddrError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(refuse)?;
            // `from_str_radix` alone would take a sign.
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(refuse());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| refuse())?;
        }
        if parts.next().is_some() {
            Err(refuse())
        } else {
            Ok(Self(bytes))
        }
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_what_is_no_address() {
        for text in [
            "",
            ":",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:0",
            "+2:00:00:00:00:00",
            "0g:00:00:00:00:00",
            "é:00:00:00:00:00",
        ] {
            let error = text.parse::<MacAddr>().unwrap_err();
            assert!(error.to_string().contains(&format!("`{text}`")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn survives_text(bytes: [u8; 6]) {
            let mac = MacAddr::new(bytes);
            prop_assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
        }

        #[test]
        fn random_addresses_are_local_and_unicast(bytes: [u8; 6]) {
            let mac = MacAddr::local_random(bytes);
            prop_assert!(mac.is_unicast());
            prop_assert_eq!(mac.octets()[0] & 0b11, 0b10);
            prop_assert_eq!(&mac.octets()[1..], &bytes[1..]);
        }

        #[test]
        fn parsing_never_panics(text: String) {
            let _ = text.parse::<MacAddr>();
        }
    }
}
