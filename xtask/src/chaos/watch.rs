//! One client from outside: what it claims of its connection, and whether packets pass.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nsm_world::{Pod, patient};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

/// How long a connection may be UP while nothing passes.
const UP_WITHOUT_PACKETS: Duration = Duration::from_secs(2);

/// Time between two echo requests.
const PING_INTERVAL: Duration = Duration::from_millis(100);

/// What the client has said last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// There is no client, or it has not connected yet.
    None,
    Up {
        since: Instant,
        address: Ipv4Addr,
    },
    Down {
        address: Ipv4Addr,
    },
}

impl Claim {
    fn address(self) -> Option<Ipv4Addr> {
        match self {
            Self::None => None,
            Self::Up { address, .. } | Self::Down { address } => Some(address),
        }
    }

    /// The claim after an event of `connect --json`.
    fn after(self, event: &Value, now: Instant) -> Self {
        match event["event"].as_str() {
            Some("connected" | "refreshed") => {
                let connection = &event["connection"];
                let address = connection["dst_addresses"][0].as_str().and_then(|text| {
                    let (address, _) = text.split_once('/')?;
                    address.parse().ok()
                });
                match (address, self) {
                    (None, _) => self,
                    // Granted although the path is down, which the answer says.
                    (Some(address), _) if connection["path_down"].is_string() => {
                        Self::Down { address }
                    }
                    (Some(address), Self::Up { address: old, .. }) if address == old => self,
                    (Some(address), _) => Self::Up {
                        since: now,
                        address,
                    },
                }
            }
            Some("down") => match self.address() {
                Some(address) => Self::Down { address },
                None => Self::None,
            },
            Some("closed") => Self::None,
            _ => self,
        }
    }
}

struct State {
    claim: Claim,
    /// The client's standard output, and how much of it was read.
    output: Option<(PathBuf, u64)>,
    last_reply: Instant,
    /// Until then the client gets no events of a loss: its own agent is away.
    excused_until: Instant,
    sent: u64,
    received: u64,
    violations: Vec<String>,
}

/// A client that is watched, until this is dropped.
pub(super) struct Watch {
    state: Arc<Mutex<State>>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches the client of this number in its pod.
    pub(super) fn start(number: u8, pod: &Pod) -> Result<Self> {
        let socket = pod.inside(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)))?;
        let socket = socket.context("open a socket for echo requests")?;
        socket.set_read_timeout(Some(PING_INTERVAL))?;
        let now = Instant::now();
        let state = Arc::new(Mutex::new(State {
            claim: Claim::None,
            output: None,
            last_reply: now,
            excused_until: now,
            sent: 0,
            received: 0,
            violations: Vec::new(),
        }));
        let ends = Arc::new(AtomicBool::new(false));
        let (shared, is_over) = (Arc::clone(&state), Arc::clone(&ends));
        let thread = thread::spawn(move || {
            let mut sent_at = Instant::now();
            while !is_over.load(Ordering::SeqCst) {
                follow(&shared);
                if sent_at.elapsed() >= PING_INTERVAL {
                    sent_at = Instant::now();
                    send(&socket, number, &shared);
                }
                receive(&socket, number, &shared);
                judge(number, &shared);
            }
        });
        Ok(Self {
            state,
            ends,
            thread: Some(thread),
        })
    }

    /// A new client has this standard output.
    pub(super) fn follow(&self, output: PathBuf) {
        let mut state = self.state();
        state.output = Some((output, 0));
        state.claim = Claim::None;
    }

    /// The client is gone.
    pub(super) fn unfollow(&self) {
        let mut state = self.state();
        state.output = None;
        state.claim = Claim::None;
    }

    /// Whatever it claims is not judged for this time.
    pub(super) fn excuse(&self, time: Duration) {
        let mut state = self.state();
        state.excused_until = state.excused_until.max(Instant::now() + time);
    }

    /// Whether packets pass just now.
    pub(super) fn passes(&self) -> bool {
        self.state().last_reply.elapsed() < 5 * PING_INTERVAL
    }

    /// Echo requests sent and answered.
    pub(super) fn pings(&self) -> (u64, u64) {
        let state = self.state();
        (state.sent, state.received)
    }

    /// What was wrong so far.
    pub(super) fn take_violations(&self) -> Vec<String> {
        std::mem::take(&mut self.state().violations)
    }

    /// What is known, for people.
    pub(super) fn words(&self) -> String {
        let state = self.state();
        let silent = state.last_reply.elapsed();
        format!("{:?}, no echo reply for {silent:.1?}", state.claim)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the whole lines that have come.
fn follow(state: &Mutex<State>) {
    let mut state = lock(state);
    let Some((path, read)) = state.output.clone() else {
        return;
    };
    let mut text = String::new();
    let read_on = File::open(&path).and_then(|mut file| {
        file.seek(SeekFrom::Start(read))?;
        file.read_to_string(&mut text)
    });
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    if read_on.is_err() || whole == 0 {
        return;
    }
    state.output = Some((path, read + whole as u64));
    for line in text[..whole].lines() {
        if let Ok(event) = serde_json::from_str(line) {
            state.claim = state.claim.after(&event, Instant::now());
        }
    }
}

/// Payload of the echo requests of one client. Another's in its pod is a packet of another connection.
fn mark(number: u8) -> [u8; 8] {
    let mut mark = *b"chaos\0\0\0";
    mark[7] = number;
    mark
}

fn send(socket: &Socket, number: u8, state: &Mutex<State>) {
    let mut state = lock(state);
    let Some(address) = state.claim.address() else {
        return;
    };
    // Echo request (RFC 792); the identifier is the client's number.
    let mut packet = vec![8, 0, 0, 0, 0, number, 0, 0];
    packet[6..8].copy_from_slice(&(state.sent as u16).to_be_bytes());
    packet.extend(mark(number));
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    state.sent += 1;
    // Without a route it is as lost as on the way.
    let _ = socket.send_to(&packet, &SocketAddrV4::new(address, 0).into());
}

/// The internet checksum (RFC 1071).
fn checksum(packet: &[u8]) -> u16 {
    let words = packet.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or_default();
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn receive(socket: &Socket, number: u8, state: &Mutex<State>) {
    let mut buffer = [0; 512];
    let Ok(length @ 1..) = (&*socket).read(&mut buffer) else {
        return;
    };
    let bytes = &buffer[..length];
    // A raw socket of IPv4 gets the IP header, too.
    let Some(icmp) = bytes.get(usize::from(bytes[0] & 15) * 4..) else {
        return;
    };
    let Some(payload) = icmp.get(8..16) else {
        return;
    };
    if payload[..6] != mark(0)[..6] {
        return;
    }
    let mut state = lock(state);
    if payload[7] != number {
        let text = format!(
            "client {number} got a packet of client {}'s connection",
            payload[7]
        );
        state.violations.push(text);
    } else if icmp[0] == 0 {
        state.last_reply = Instant::now();
        state.received += 1;
    }
}

/// Notes a connection that has been UP for too long while nothing passed.
fn judge(number: u8, state: &Mutex<State>) {
    let mut state = lock(state);
    let Claim::Up { since, address } = state.claim else {
        return;
    };
    let from = since.max(state.last_reply).max(state.excused_until);
    let silent = Instant::now().saturating_duration_since(from);
    if silent > patient(UP_WITHOUT_PACKETS) {
        let text = format!(
            "the connection of client {number} is UP and {address} has not answered for {silent:.1?}"
        );
        state.violations.push(text);
        // Once an incident.
        state.claim = Claim::Down { address };
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_claim_follows_the_clients_events() {
        let now = Instant::now();
        let address = Ipv4Addr::new(172, 16, 1, 3);
        let connected =
            json!({"event": "connected", "connection": {"dst_addresses": ["172.16.1.3/32"]}});
        let up = Claim::Up {
            since: now,
            address,
        };
        let claim = Claim::None.after(&connected, now);
        assert_eq!(claim, up);
        assert_eq!(claim.after(&json!({"event": "error"}), now), up);
        let later = now + Duration::from_secs(1);
        let refreshed =
            json!({"event": "refreshed", "connection": {"dst_addresses": ["172.16.1.3/32"]}});
        assert_eq!(claim.after(&refreshed, later), up, "it was UP all the time");
        let down = claim.after(&json!({"event": "down", "reason": "x"}), later);
        assert_eq!(down, Claim::Down { address });
        let mut unproven = connected.clone();
        unproven["connection"]["path_down"] = "the path is lost".into();
        assert_eq!(Claim::None.after(&unproven, now), Claim::Down { address });
        assert_eq!(
            down.after(&connected, later),
            Claim::Up {
                since: later,
                address
            }
        );
        assert_eq!(down.after(&json!({"event": "closed"}), later), Claim::None);
    }

    #[test]
    fn the_checksum_of_a_packet_with_its_checksum_is_zero() {
        let mut packet = vec![8, 0, 0, 0, 0, 1, 0, 9];
        packet.extend(mark(3));
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&packet), 0);
    }
}
