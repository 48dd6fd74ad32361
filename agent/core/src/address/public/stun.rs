//! STUN (RFC 8489): the Binding request, its answer, and when it is sent again. No sockets here.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

/// The port of a STUN server that is named without one (RFC 8489 section 8.1).
pub const PORT: u16 = 3478;

/// A request has a header and nothing else.
pub const REQUEST_LENGTH: usize = HEADER_LENGTH;

/// The longest answer that is read: what fits a datagram that no network fragments (RFC 8489 section 6.1).
pub const MAX_ANSWER: usize = 1500;

/// Waits between sendings, the last for a late answer: the first is the initial RTO of RFC 8489 section 6.2.1, each twice the one before.
/// The RFC goes on for 39.5 s, which is not needed where the question is repeated each minute.
pub const WAITS: [Duration; 4] = [
    Duration::from_millis(500),
    Duration::from_millis(1000),
    Duration::from_millis(2000),
    Duration::from_millis(2000),
];

const HEADER_LENGTH: usize = 20;
const MAGIC_COOKIE: u32 = 0x2112_a442;
const BINDING_REQUEST: u16 = 0x0001;
const BINDING_SUCCESS: u16 = 0x0101;
const BINDING_ERROR: u16 = 0x0111;
const MAPPED_ADDRESS: u16 = 0x0001;
const ERROR_CODE: u16 = 0x0009;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;

/// Attributes from here on may be ignored by a receiver that does not support them.
const COMPREHENSION_OPTIONAL: u16 = 0x8000;

/// Attributes that are known and not needed here: addresses of RFC 3489 that servers of our days still send (SOURCE-ADDRESS,
/// CHANGED-ADDRESS), and MESSAGE-INTEGRITY in both its kinds, for there is no password to check it with.
const PASSED_OVER: [u16; 4] = [0x0004, 0x0005, 0x0008, 0x001c];

/// What identifies an answer to our request: 96 random bits, new for each transaction.
pub type TransactionId = [u8; 12];

/// Why a packet is no answer to our request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StunError {
    /// Not STUN, or cut off.
    #[error("the packet is no STUN message")]
    Malformed,
    /// Of another transaction: late, or forged.
    #[error("the STUN answer is of another transaction")]
    WrongTransaction,
    /// The server refused.
    #[error("the STUN server refused with error {0}")]
    Refused(u16),
    /// An answer without XOR-MAPPED-ADDRESS, as servers of RFC 3489 give: a NAT may have rewritten their MAPPED-ADDRESS.
    #[error("the STUN server sends no XOR-MAPPED-ADDRESS: use one of RFC 5389 or later")]
    NoAddress,
    /// An attribute that must be understood and is not.
    #[error("the STUN answer has an attribute {0:#06x} that must be understood and is not")]
    UnknownAttribute(u16),
}

/// A Binding request.
#[must_use]
pub fn binding_request(id: &TransactionId) -> [u8; REQUEST_LENGTH] {
    let mut packet = [0; REQUEST_LENGTH];
    packet[..2].copy_from_slice(&BINDING_REQUEST.to_be_bytes());
    packet[4..8].copy_from_slice(&MAGIC_COOKIE.to_be_bytes());
    packet[8..].copy_from_slice(id);
    packet
}

/// The address that the server saw our request come from.
///
/// # Errors
/// When the packet is no success answer of this transaction.
pub fn binding_answer(packet: &[u8], id: &TransactionId) -> Result<SocketAddr, StunError> {
    let header = packet.get(..HEADER_LENGTH).ok_or(StunError::Malformed)?;
    let (kind, length) = (u16_at(header, 0)?, u16_at(header, 2)?);
    let attributes = &packet[HEADER_LENGTH..];
    if header[4..8] != MAGIC_COOKIE.to_be_bytes()
        || usize::from(length) != attributes.len()
        || length % 4 != 0
    {
        return Err(StunError::Malformed);
    }
    if header[8..] != *id {
        return Err(StunError::WrongTransaction);
    }
    match kind {
        BINDING_SUCCESS => mapped_address(attributes, id),
        BINDING_ERROR => Err(StunError::Refused(error_code(attributes)?)),
        _ => Err(StunError::Malformed),
    }
}

fn mapped_address(attributes: &[u8], id: &TransactionId) -> Result<SocketAddr, StunError> {
    let mut found = None;
    for attribute in Attributes(attributes) {
        match attribute? {
            // The first of several counts (RFC 8489 section 14).
            (XOR_MAPPED_ADDRESS, value) if found.is_none() => found = Some(xor_address(value, id)?),
            (MAPPED_ADDRESS | XOR_MAPPED_ADDRESS, _) => {}
            (kind, _) if kind >= COMPREHENSION_OPTIONAL || PASSED_OVER.contains(&kind) => {}
            (kind, _) => return Err(StunError::UnknownAttribute(kind)),
        }
    }
    found.ok_or(StunError::NoAddress)
}

fn xor_address(value: &[u8], id: &TransactionId) -> Result<SocketAddr, StunError> {
    let cookie = MAGIC_COOKIE.to_be_bytes();
    let port = u16_at(value, 2)? ^ u16::from_be_bytes([cookie[0], cookie[1]]);
    let mask = cookie.into_iter().chain(id.iter().copied());
    let address: IpAddr = match (value[1], value.get(4..).unwrap_or_default()) {
        (1, bytes) => {
            let mut v4 = <[u8; 4]>::try_from(bytes).map_err(|_| StunError::Malformed)?;
            v4.iter_mut().zip(mask).for_each(|(byte, key)| *byte ^= key);
            Ipv4Addr::from(v4).into()
        }
        (2, bytes) => {
            let mut v6 = <[u8; 16]>::try_from(bytes).map_err(|_| StunError::Malformed)?;
            v6.iter_mut().zip(mask).for_each(|(byte, key)| *byte ^= key);
            Ipv6Addr::from(v6).into()
        }
        _ => return Err(StunError::Malformed),
    };
    Ok(SocketAddr::new(address, port))
}

fn error_code(attributes: &[u8]) -> Result<u16, StunError> {
    for attribute in Attributes(attributes) {
        if let (ERROR_CODE, value) = attribute? {
            // Hundreds in three bits, the rest in a byte.
            let &[_, _, class, number, ..] = value else {
                return Err(StunError::Malformed);
            };
            return Ok(u16::from(class & 7) * 100 + u16::from(number));
        }
    }
    Err(StunError::Malformed)
}

/// Type and value of each, without the padding to four bytes.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), StunError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.0);
        let attribute = || {
            let (kind, length) = (u16_at(bytes, 0)?, usize::from(u16_at(bytes, 2)?));
            let value = bytes.get(4..4 + length).ok_or(StunError::Malformed)?;
            let after = 4 + length.next_multiple_of(4);
            Ok((kind, value, bytes.get(after..).ok_or(StunError::Malformed)?))
        };
        Some(attribute().map(|(kind, value, rest)| {
            self.0 = rest;
            (kind, value)
        }))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, StunError> {
    match bytes.get(at..at + 2) {
        Some(&[high, low]) => Ok(u16::from_be_bytes([high, low])),
        _ => Err(StunError::Malformed),
    }
}
