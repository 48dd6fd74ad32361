//! Seamless BFD (RFC 7880) as it runs in VXLAN's management VNI (RFC 8971): the Control packet, bit for bit.
//!
//! The initiator's packets ("probes") and the reflector's ("answers") are the same 24 bytes of RFC 5880, section 4.1;
//! [`frame`] puts them into Ethernet, IP and UDP (RFC 7881).
//!
//! S-BFD has no sequence number. The initiator puts one into the low [`SEQUENCE_BITS`] of *Desired Min TX Interval*, which
//! the reflector must copy back (RFC 7880, section 7.2.3): so each answer is matched to its probe, round trips are exact with
//! several probes in flight, and a replayed answer is seen to be one. To others it looks like an interval that wanders by a
//! millisecond.

pub mod frame;

/// UDP port of S-BFD reflectors (RFC 7881, section 3).
pub const PORT: u16 = 7784;

/// Lowest source port of an initiator (RFC 7881 leaves it open but for 7784; RFC 5881, section 4 has this range).
pub const SOURCE_PORT_MIN: u16 = 49_152;

/// Length of a Control packet without authentication, bytes.
pub const CONTROL: usize = 24;

/// TTL or hop limit of every packet, sent and expected (RFC 7881, section 3: GTSM, RFC 5082).
pub const TTL: u8 = 255;

/// Bits of the sequence number in *Desired Min TX Interval*.
pub const SEQUENCE_BITS: u32 = 10;

/// The largest sequence number: those of the wire are [`u32`]s up to here.
pub const SEQUENCE_MASK: u32 = (1 << SEQUENCE_BITS) - 1;

/// Detection multiplier that our probes name (RFC 5880's usual one). Nobody's timer follows from it: a reflector keeps no state.
pub const DETECT_MULTIPLIER: u8 = 3;

/// Diagnostic 1 (RFC 5880, section 4.1): the sender's session went down because answers did not come.
pub const DIAGNOSTIC_TIME_EXPIRED: u8 = 1;

const VERSION: u8 = 1;
const DIAGNOSTIC_MASK: u8 = 0x1f;

/// The session state of the sender of a Control packet (RFC 5880, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Administratively down.
    AdminDown,
    /// Down.
    Down,
    /// Init; never in S-BFD.
    Init,
    /// Up.
    Up,
}

impl State {
    /// From the two bits of the wire; higher ones are ignored.
    #[inline(always)]
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 0b11 {
            0 => Self::AdminDown,
            1 => Self::Down,
            2 => Self::Init,
            _ => Self::Up,
        }
    }

    /// The two bits of the wire.
    #[inline(always)]
    #[must_use]
    pub const fn bits(self) -> u8 {
        self as u8
    }
}

/// The flags of a Control packet: the low six bits of its second byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u8);

impl Flags {
    /// P: an answer with F is wanted.
    pub const POLL: Self = Self(0x20);
    /// F: the answer to a P.
    pub const FINAL: Self = Self(0x10);
    /// C: the sender goes on when its control plane does not.
    pub const CONTROL_PLANE_INDEPENDENT: Self = Self(0x08);
    /// A: an authentication section follows.
    pub const AUTHENTICATION: Self = Self(0x04);
    /// D: demand. In S-BFD it says who speaks: set by the initiator, cleared by the reflector.
    pub const DEMAND: Self = Self(0x02);
    /// M: reserved for point-to-multipoint.
    pub const MULTIPOINT: Self = Self(0x01);

    const MASK: u8 = 0x3f;

    /// Whether all of `other` are set.
    #[inline(always)]
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These and `other`.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// As they are on the wire.
    #[inline(always)]
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }
}

/// A BFD Control packet without authentication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// Why the sender's session went down last, 5 bits.
    pub diagnostic: u8,
    /// The sender's state.
    pub state: State,
    /// The flags.
    pub flags: Flags,
    /// Detection time multiplier, never 0.
    pub detect_multiplier: u8,
    /// The sender's discriminator, never 0.
    pub my_discriminator: u32,
    /// The receiver's discriminator.
    pub your_discriminator: u32,
    /// Desired Min TX Interval, microseconds; its low bits are the sequence number.
    pub desired_min_tx_us: u32,
    /// Required Min RX Interval, microseconds.
    pub required_min_rx_us: u32,
    /// Required Min Echo RX Interval, microseconds.
    pub required_min_echo_rx_us: u32,
}

impl Control {
    /// Reads a Control packet that is followed by `payload - 24` bytes of padding. `None`: RFC 5880, section 6.8.6 has it
    /// discarded whatever the session, or it carries authentication, which none of our sessions uses.
    #[inline(always)]
    #[must_use]
    pub const fn parse(bytes: &[u8; CONTROL], payload: u32) -> Option<Self> {
        let flags = Flags(bytes[1] & Flags::MASK);
        let control = Self {
            diagnostic: bytes[0] & DIAGNOSTIC_MASK,
            state: State::from_bits(bytes[1] >> 6),
            flags,
            detect_multiplier: bytes[2],
            my_discriminator: word(bytes, 4),
            your_discriminator: word(bytes, 8),
            desired_min_tx_us: word(bytes, 12),
            required_min_rx_us: word(bytes, 16),
            required_min_echo_rx_us: word(bytes, 20),
        };
        let length = bytes[3] as u32;
        let valid = bytes[0] >> 5 == VERSION
            && length == CONTROL as u32
            && length <= payload
            && control.detect_multiplier != 0
            && flags.0 & (Flags::MULTIPOINT.0 | Flags::AUTHENTICATION.0) == 0
            && control.my_discriminator != 0;
        if valid { Some(control) } else { None }
    }

    /// As it is on the wire.
    #[inline(always)]
    #[must_use]
    pub const fn to_bytes(&self) -> [u8; CONTROL] {
        let my = self.my_discriminator.to_be_bytes();
        let your = self.your_discriminator.to_be_bytes();
        let tx = self.desired_min_tx_us.to_be_bytes();
        let rx = self.required_min_rx_us.to_be_bytes();
        let echo = self.required_min_echo_rx_us.to_be_bytes();
        [
            VERSION << 5 | self.diagnostic & DIAGNOSTIC_MASK,
            self.state.bits() << 6 | self.flags.0 & Flags::MASK,
            self.detect_multiplier,
            CONTROL as u8,
            my[0],
            my[1],
            my[2],
            my[3],
            your[0],
            your[1],
            your[2],
            your[3],
            tx[0],
            tx[1],
            tx[2],
            tx[3],
            rx[0],
            rx[1],
            rx[2],
            rx[3],
            echo[0],
            echo[1],
            echo[2],
            echo[3],
        ]
    }

    /// The sequence number.
    #[inline(always)]
    #[must_use]
    pub const fn sequence(&self) -> u32 {
        self.desired_min_tx_us & SEQUENCE_MASK
    }

    /// What the reflector answers (RFC 7880, section 7.2.3; RFC 5880, section 6.8.7 for the rest).
    #[inline(always)]
    #[must_use]
    pub const fn answer(&self, reflector: Reflector) -> Self {
        let mut flags = reflector.flags;
        if self.flags.contains(Flags::POLL) {
            flags = flags.with(Flags::FINAL);
        }
        Self {
            diagnostic: 0,
            state: reflector.state,
            flags,
            detect_multiplier: self.detect_multiplier,
            my_discriminator: self.your_discriminator,
            your_discriminator: self.my_discriminator,
            desired_min_tx_us: self.desired_min_tx_us,
            required_min_rx_us: reflector.required_min_rx_us,
            // A reflector echoes no Echo packets.
            required_min_echo_rx_us: 0,
        }
    }
}

/// What a reflector says of itself in its answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reflector {
    /// [`State::Up`], or [`State::AdminDown`] to ask initiators to back off.
    pub state: State,
    /// C where the answers do not depend on an agent that runs.
    pub flags: Flags,
    /// How fast it takes probes, microseconds between two.
    pub required_min_rx_us: u32,
}

/// *Desired Min TX Interval* with a sequence number in its low bits: the interval is rounded down to what is above them.
#[inline(always)]
#[must_use]
pub const fn interval_with_sequence(interval_us: u32, sequence: u32) -> u32 {
    interval_us & !SEQUENCE_MASK | sequence & SEQUENCE_MASK
}

#[inline(always)]
const fn word(bytes: &[u8; CONTROL], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe() -> Control {
        Control {
            diagnostic: DIAGNOSTIC_TIME_EXPIRED,
            state: State::Down,
            flags: Flags::DEMAND.with(Flags::POLL),
            detect_multiplier: 3,
            my_discriminator: 0x0102_0304,
            your_discriminator: 0x0506_0708,
            desired_min_tx_us: interval_with_sequence(50_000, 0x2aa),
            required_min_rx_us: 0,
            required_min_echo_rx_us: 0,
        }
    }

    /// RFC 5880, section 4.1: Vers 3 bits, Diag 5; Sta 2, P F C A D M; Detect Mult; Length; five words.
    #[test]
    fn a_probe_is_laid_out_as_rfc_5880_says() {
        let bytes = probe().to_bytes();
        assert_eq!(
            bytes,
            [
                0b001_00001, // version 1, diagnostic 1
                0b01_100010, // Down; P and D
                3,
                24,
                1,
                2,
                3,
                4,
                5,
                6,
                7,
                8,
                0,
                0,
                0xc2,
                0xaa, // 50,000 = 0xc350: 0xc000 above the low ten bits, of which 0x2aa is the sequence
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
            ]
        );
        assert_eq!(Control::parse(&bytes, 24), Some(probe()));
        assert_eq!(
            Control::parse(&bytes, 1400),
            Some(probe()),
            "RFC 9764: padding"
        );
        assert_eq!(probe().sequence(), 0x2aa);
    }

    /// RFC 7880, section 7.2.3, field by field.
    #[test]
    fn an_answer_is_what_rfc_7880_says() {
        let reflector = Reflector {
            state: State::Up,
            flags: Flags::CONTROL_PLANE_INDEPENDENT,
            required_min_rx_us: 2_500,
        };
        let bytes = probe().answer(reflector).to_bytes();
        assert_eq!(
            bytes,
            [
                0b001_00000,
                0b11_011000, // Up; F for the P, C, no D
                3,
                24,
                5,
                6,
                7,
                8,
                1,
                2,
                3,
                4,
                0,
                0,
                0xc2,
                0xaa,
                0,
                0,
                0x09,
                0xc4,
                0,
                0,
                0,
                0,
            ]
        );
        let quiet = Control {
            flags: Flags::DEMAND,
            ..probe()
        };
        let down = Reflector {
            state: State::AdminDown,
            flags: Flags::default(),
            ..reflector
        };
        let answer = quiet.answer(down);
        assert_eq!(
            (answer.state, answer.flags),
            (State::AdminDown, Flags::default())
        );
    }

    /// RFC 5880, section 6.8.6: each reason to discard, one at a time.
    #[test]
    fn what_rfc_5880_discards_is_discarded() {
        let bytes = probe().to_bytes();
        let broken = |at: usize, value: u8| {
            let mut bytes = bytes;
            bytes[at] = value;
            Control::parse(&bytes, 24)
        };
        assert_eq!(broken(0, 0b010_00001), None, "version 2");
        assert_eq!(broken(0, 0b000_00001), None, "version 0");
        assert_eq!(broken(1, 0b01_100011), None, "multipoint");
        assert_eq!(broken(1, 0b01_100110), None, "authentication");
        assert_eq!(broken(2, 0), None, "detection multiplier 0");
        assert_eq!(broken(3, 23), None, "too short");
        assert_eq!(broken(3, 25), None, "longer than without authentication");
        assert_eq!(Control::parse(&bytes, 23), None, "longer than its payload");
        let mut anonymous = bytes;
        anonymous[4..8].fill(0);
        assert_eq!(Control::parse(&anonymous, 24), None, "My Discriminator 0");
    }

    #[test]
    fn states_and_sequences_round_trip() {
        for bits in 0..=u8::MAX {
            assert_eq!(State::from_bits(bits).bits(), bits & 3);
        }
        for sequence in [0, 1, 1023, 1024, u32::MAX] {
            let interval = interval_with_sequence(50_000, sequence);
            assert_eq!(interval & SEQUENCE_MASK, sequence & 1023);
            assert!((49_152..=50_175).contains(&interval));
        }
    }
}
