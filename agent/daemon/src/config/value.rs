//! The texts of single values: durations, sizes, listen URLs, log levels.
//!
//! Each parser returns the value or the values that are allowed; the caller adds where the text came from.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

/// Nanoseconds of each unit that a duration is written in, largest first.
const UNITS: [(&str, u64); 6] = [
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// The form of a duration, for messages.
const DURATION_ALLOWED: &str = "a duration such as 10m, 1h30m, 15s or 500ms";

/// The form of a size, for messages.
const SIZE_ALLOWED: &str = "a number of bytes such as 65536, 512KiB or 1MiB";

/// The form of a listen URL, for messages.
const LISTEN_ALLOWED: &str =
    "unix:///path or tcp://address:port (an IPv6 address in brackets, no address for all of IPv4)";

/// Where the agent listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum ListenUrl {
    /// A socket at an absolute path.
    Unix(PathBuf),
    /// A TCP address; the port is never 0, because peers dial it.
    Tcp(SocketAddr),
}

impl FromStr for ListenUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        if let Some(rest) = text.strip_prefix("unix:") {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            return if path.starts_with('/') && !path.ends_with('/') && !path.contains('\0') {
                Ok(Self::Unix(path.into()))
            } else {
                Err(LISTEN_ALLOWED)
            };
        }
        let authority = text.strip_prefix("tcp://").ok_or(LISTEN_ALLOWED)?;
        let address = match authority.strip_prefix(':') {
            Some(port) => port
                .parse()
                .map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))
                .map_err(|_| LISTEN_ALLOWED)?,
            None => authority.parse().map_err(|_| LISTEN_ALLOWED)?,
        };
        if address.port() == 0 {
            return Err("a port between 1 and 65535: peers dial it");
        }
        Ok(Self::Tcp(address))
    }
}

impl fmt::Display for ListenUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// Reads a duration: numbers with units, largest first or not, such as `1h30m` or `0.5s`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, &'static str> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or(DURATION_ALLOWED)?;
        let (number, tail) = rest.split_at(digits);
        let unit_end = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let &(_, nanos) = UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or(DURATION_ALLOWED)?;
        let part = scale(number, nanos).ok_or(DURATION_ALLOWED)?;
        total = total.checked_add(part).ok_or(DURATION_ALLOWED)?;
        rest = tail;
    }
    if text.is_empty() {
        return Err(DURATION_ALLOWED);
    }
    Ok(total)
}

/// `number` (digits, perhaps with a fraction) times `nanos` nanoseconds, without rounding errors.
fn scale(number: &str, nanos: u64) -> Option<Duration> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > 9 || fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let parse = |text: &str| -> Option<u128> {
        if text.is_empty() {
            Some(0)
        } else {
            text.parse().ok()
        }
    };
    let power = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let total = parse(whole)?
        .checked_mul(u128::from(nanos))?
        .checked_add(parse(fraction)? * u128::from(nanos) / power)?;
    let seconds = u64::try_from(total / 1_000_000_000).ok()?;
    let below = u32::try_from(total % 1_000_000_000).ok()?;
    Some(Duration::new(seconds, below))
}

/// Writes a duration as [`parse_duration`] reads it.
pub(crate) fn show_duration(duration: Duration) -> String {
    let mut left = duration.as_nanos();
    if left == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    for (unit, nanos) in UNITS {
        let count = left / u128::from(nanos);
        if count > 0 {
            write!(text, "{count}{unit}").expect("a String takes every text");
            left %= u128::from(nanos);
        }
    }
    text
}

/// Reads a size in bytes.
pub(crate) fn parse_size(text: &str) -> Result<usize, &'static str> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: usize = match unit.trim_start() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(SIZE_ALLOWED),
    };
    number
        .parse::<usize>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or(SIZE_ALLOWED)
}

/// Writes a size as [`parse_size`] reads it, in the largest unit that divides it.
pub(crate) fn show_size(bytes: usize) -> String {
    for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes > 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Reads `true` or `false` in all spellings of YAML.
pub(crate) fn parse_bool(text: &str) -> Result<bool, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("true or false"),
    }
}

/// The word that switches something off.
pub(super) const OFF: &str = "off";

/// Whether a value switches something off. YAML reads a bare `off` as false.
pub(super) fn is_off(text: &str) -> bool {
    parse_bool(text) == Ok(false)
}

/// Checks a log level: one level, then perhaps levels of single modules.
pub(crate) fn parse_log_level(text: &str) -> Result<String, &'static str> {
    const ALLOWED: &str =
        "trace, debug, info, warn, error or off, perhaps with modules: info,h2=warn";
    let mut parts = text.split(',').map(str::trim);
    let first = parts.next().and_then(level).ok_or(ALLOWED)?;
    let mut filter = first.to_owned();
    for part in parts {
        let (module, text) = part.split_once('=').ok_or(ALLOWED)?;
        let is_module = !module.is_empty()
            && module
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b':'));
        let level = level(text).filter(|_| is_module).ok_or(ALLOWED)?;
        write!(filter, ",{module}={level}").expect("a String takes every text");
    }
    Ok(filter)
}

/// A level as `tracing` spells it; NSM's own components have `warning` and `fatal`, too.
fn level(text: &str) -> Option<&'static str> {
    Some(match text.to_ascii_lowercase().as_str() {
        "trace" => "trace",
        "debug" => "debug",
        "info" => "info",
        "warn" | "warning" => "warn",
        "error" | "fatal" | "panic" => "error",
        "off" => "off",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_read() {
        for (text, duration) in [
            ("10m", Duration::from_secs(600)),
            ("500ms", Duration::from_millis(500)),
            ("1h30m", Duration::from_secs(5400)),
            ("1.5s", Duration::from_millis(1500)),
            (".5s", Duration::from_millis(500)),
            ("10m0s", Duration::from_secs(600)),
            ("0s", Duration::ZERO),
            ("7us", Duration::from_micros(7)),
        ] {
            assert_eq!(parse_duration(text), Ok(duration), "{text}");
        }
        for text in [
            "",
            "10",
            "m",
            "10 m",
            "10min",
            "-1s",
            "1.2.3s",
            ".s",
            "99999999999999999999h",
            "1s2",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("1MiB"), Ok(1 << 20));
        assert_eq!(parse_size("512 KiB"), Ok(512 << 10));
        assert_eq!(parse_size("1048577"), Ok(1_048_577));
        for text in ["", "MiB", "1MB", "-1", "99999999999GiB", "1.5MiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(show_size(0), "0");
        assert_eq!(show_size(1 << 20), "1MiB");
        assert_eq!(show_size(1536), "1536");
    }

    #[test]
    fn listen_urls_are_read() {
        for (text, shown) in [
            ("unix:///run/x.sock", "unix:///run/x.sock"),
            ("unix:/run/x.sock", "unix:///run/x.sock"),
            ("tcp://:5006", "tcp://0.0.0.0:5006"),
            ("tcp://[::]:5006", "tcp://[::]:5006"),
            ("tcp://192.0.2.1:5006", "tcp://192.0.2.1:5006"),
        ] {
            assert_eq!(text.parse::<ListenUrl>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "unix:x.sock",
            "unix:///run/",
            "tcp://host:1",
            "tcp://0.0.0.0:0",
            "tcp://:0",
            "tcp://:65536",
            "http://0.0.0.0:1",
        ] {
            assert!(text.parse::<ListenUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn log_levels_are_read() {
        assert_eq!(parse_log_level("INFO").unwrap(), "info");
        assert_eq!(parse_log_level("warning").unwrap(), "warn");
        assert_eq!(
            parse_log_level("info, h2=warn,proxy_nsmgr::agent=trace").unwrap(),
            "info,h2=warn,proxy_nsmgr::agent=trace"
        );
        for text in [
            "",
            "loud",
            "h2=warn",
            "info,h2",
            "info,h2=loud",
            "info,=warn",
        ] {
            assert!(parse_log_level(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_duration_reads_back(seconds in 0u64..1_000_000_000, nanos in 0u32..1_000_000_000) {
            let duration = Duration::new(seconds, nanos);
            prop_assert_eq!(parse_duration(&show_duration(duration)), Ok(duration));
        }

        #[test]
        fn a_size_reads_back(bytes: usize) {
            prop_assert_eq!(parse_size(&show_size(bytes)), Ok(bytes));
        }

        #[test]
        fn no_text_panics(text in ".{0,24}") {
            let _ = parse_duration(&text);
            let _ = parse_size(&text);
            let _ = text.parse::<ListenUrl>();
            let _ = parse_log_level(&text);
        }
    }
}
