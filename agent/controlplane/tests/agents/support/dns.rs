//! A DNS server of a few records, on loopback and UDP, in the bytes of RFC 1035.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
};

use tokio::net::UdpSocket;

const A: u16 = 1;
const SRV: u16 = 33;
const NO_ERROR: u8 = 0;
const NX_DOMAIN: u8 = 3;

/// A zone that may change while it is served.
#[derive(Clone)]
pub(crate) struct SharedZone(Arc<Mutex<Zone>>);

impl SharedZone {
    /// Answers by another zone from now on.
    pub(crate) fn change(&self, zone: Zone) {
        *self.0.lock().expect("not poisoned") = zone;
    }

    /// Serves until the test's runtime ends.
    pub(crate) async fn serve(self) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a UDP port");
        let address = socket.local_addr().expect("bound");
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let answer = self
                    .0
                    .lock()
                    .expect("not poisoned")
                    .answer(&buffer[..length]);
                if let Some(answer) = answer {
                    let _ = socket.send_to(&answer, from).await;
                }
            }
        });
        address
    }
}

/// Records by name and type; a name without any does not exist.
#[derive(Default)]
pub(crate) struct Zone {
    records: HashMap<(String, u16), Vec<Vec<u8>>>,
    failing: Vec<String>,
}

impl Zone {
    /// An address.
    pub(crate) fn a(mut self, name: &str, address: Ipv4Addr) -> Self {
        self.put(name, A, address.octets().to_vec());
        self
    }

    fn put(&mut self, name: &str, kind: u16, data: Vec<u8>) {
        self.records
            .entry((name.to_owned(), kind))
            .or_default()
            .push(data);
    }

    /// A service; the one that was named first is preferred.
    pub(crate) fn srv(mut self, name: &str, target: &str, port: u16) -> Self {
        let rank = self
            .records
            .get(&(name.to_owned(), SRV))
            .map_or(0, Vec::len);
        let mut data = vec![0, u8::try_from(rank).expect("a few"), 0, 0];
        data.extend(port.to_be_bytes());
        for label in target.split('.') {
            data.push(u8::try_from(label.len()).expect("a short label"));
            data.extend(label.as_bytes());
        }
        data.push(0);
        self.put(name, SRV, data);
        self
    }

    /// A domain whose server fails.
    pub(crate) fn failing(mut self, name: &str) -> Self {
        self.failing.push(name.to_owned());
        self
    }

    /// Serves until the test's runtime ends.
    pub(crate) async fn serve(self) -> SocketAddr {
        self.shared().serve().await
    }

    /// To be changed while it is served.
    pub(crate) fn shared(self) -> SharedZone {
        SharedZone(Arc::new(Mutex::new(self)))
    }

    fn answer(&self, question: &[u8]) -> Option<Vec<u8>> {
        let mut at = 12;
        let mut labels = Vec::new();
        while let Some(&length) = question.get(at).filter(|&&length| length > 0) {
            let label = question.get(at + 1..at + 1 + usize::from(length))?;
            labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
            at += 1 + usize::from(length);
        }
        let kind = u16::from_be_bytes(question.get(at + 1..at + 3)?.try_into().ok()?);
        let asked = question.get(12..at + 5)?;
        let name = labels.join(".");
        let known = self.records.get(&(name.clone(), kind));
        let known = known.map_or(&[][..], Vec::as_slice);
        let code = if self.failing.iter().any(|failing| name.ends_with(failing)) {
            2
        } else if self.records.keys().any(|(known, _)| *known == name) {
            NO_ERROR
        } else {
            NX_DOMAIN
        };
        let mut answer = question[..2].to_vec();
        answer.extend([
            0x81,
            0x80 | code,
            0,
            1,
            0,
            u8::try_from(known.len()).ok()?,
            0,
            0,
            0,
            0,
        ]);
        answer.extend(asked);
        for data in known {
            answer.extend([0xc0, 12]);
            answer.extend(kind.to_be_bytes());
            answer.extend([0, 1, 0, 0, 0, 60]);
            answer.extend(u16::try_from(data.len()).ok()?.to_be_bytes());
            answer.extend(data);
        }
        Some(answer)
    }
}
