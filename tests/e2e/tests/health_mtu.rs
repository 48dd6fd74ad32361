//! A path that silently drops large packets: what is sent through a connection arrives all the same, both ways.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nsm_e2e::{PATIENCE, Pair, Served, client_address, endpoint_address, health};
use nsm_world::{Cloud, Pod};
use serde_json::Value;

const MIB: usize = 1024 * 1024;

/// The longest underlay packet that passes.
const NARROW: u16 = 1280;

/// TCP between two pods.
struct Transfer {
    sender: TcpStream,
    receiver: TcpStream,
    what: String,
}

impl Transfer {
    /// Connects; `address` is that of `to` in the tunnel.
    fn begin(from: &Pod, to: &Pod, address: &str) -> Result<Self> {
        let what = format!("a transfer from {} to {}", from.name(), to.name());
        let listener = to.inside(|| TcpListener::bind((address, 0)))??;
        let at = listener.local_addr()?;
        let sender = from.inside(|| TcpStream::connect_timeout(&at, PATIENCE))?;
        let sender = sender.with_context(|| what.clone())?;
        let (receiver, _) = listener.accept()?;
        sender.set_write_timeout(Some(PATIENCE))?;
        receiver.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            sender,
            receiver,
            what,
        })
    }

    /// Sends so many bytes, and compares what arrives.
    fn pass(&mut self, length: usize) -> Result<()> {
        // A prime length of the pattern: a segment that is missing or comes twice shows.
        let sent: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
        let mut received = vec![0; length];
        let (sender, receiver) = (&mut self.sender, &mut self.receiver);
        let (sending, receiving) = thread::scope(|scope| {
            let sending = scope.spawn(|| sender.write_all(&sent));
            let receiving = receiver.read_exact(&mut received);
            (sending.join(), receiving)
        });
        receiving.with_context(|| format!("{}: what arrives", self.what))?;
        sending
            .map_err(|_| anyhow!("the sender's thread panicked"))?
            .with_context(|| format!("{}: what is sent", self.what))?;
        ensure!(
            received == sent,
            "{}: something else arrived than was sent",
            self.what
        );
        Ok(())
    }
}

/// A transfer each way.
fn both_ways(pair: &Pair, connected: &Value) -> Result<[Transfer; 2]> {
    let (client, endpoint) = (pair.client_pod(0)?, pair.world.pod("endpoint")?);
    Ok([
        Transfer::begin(&client, &endpoint, &endpoint_address(connected)?)?,
        Transfer::begin(&endpoint, &client, &client_address(connected)?)?,
    ])
}

/// Sends so many bytes on each of them at the same time.
fn pass_all(transfers: &mut [Transfer], length: usize) -> Result<()> {
    thread::scope(|scope| {
        let passing: Vec<_> = transfers
            .iter_mut()
            .map(|transfer| scope.spawn(move || transfer.pass(length)))
            .collect();
        passing.into_iter().try_for_each(|passing| {
            passing
                .join()
                .map_err(|_| anyhow!("a transfer's thread panicked"))?
        })
    })
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_transfer_completes_over_a_path_that_never_let_large_packets_through() -> Result<()> {
    let pair = Served::start("mtu-before", Cloud::Packet, 1)?;
    let _narrow = pair.narrow(NARROW)?;
    let (client, connected) = pair.connect(0)?;
    pass_all(&mut both_ways(&pair, &connected)?, MIB)?;
    pair.mtu_follows(NARROW.into())?;
    pair.close([client])
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_transfer_completes_over_a_path_that_comes_to_drop_large_packets() -> Result<()> {
    let pair = Served::start("mtu-amid", Cloud::Packet, 1)?;
    let (client, connected) = pair.connect(0)?;
    health(&pair.near, "the path to be measured", |it| {
        it["path_mtu"] == 1450
    })?;
    let mut transfers = both_ways(&pair, &connected)?;
    pass_all(&mut transfers, MIB / 2)?;
    let _narrow = pair.narrow(NARROW)?;
    // Two that begin before the MTU follows, beside the two that are half done.
    let mut late = both_ways(&pair, &connected)?;
    let (rest, late) = thread::scope(|scope| {
        let rest = scope.spawn(|| pass_all(&mut transfers, MIB / 2));
        let late = pass_all(&mut late, MIB);
        (rest.join(), late)
    });
    rest.map_err(|_| anyhow!("a transfer's thread panicked"))??;
    late?;
    pair.mtu_follows(NARROW.into())?;
    pair.close([client])
}
