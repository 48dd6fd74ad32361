//! A path that silently drops large packets: what is sent through a connection arrives all the same, both ways.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nsm_e2e::{PATIENCE, Pair, client_address, endpoint_address};
use nsm_world::{Cloud, Fault, FaultGuard, Pod, wait_until};
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

/// From now on, and until they are dropped, packets above [`NARROW`] bytes are lost in both directions, the control plane's too.
fn narrow(pair: &Pair) -> Result<[FaultGuard; 2]> {
    let (near, far) = (pair.near.node(), pair.far.node());
    let hole = Fault::MtuBlackHole { max: NARROW };
    Ok([
        pair.world.inject(near, far, hole)?,
        pair.world.inject(far, near, hole)?,
    ])
}

/// Both ends have links that fit the path: [`NARROW`] less what VXLAN adds; the search ends when it is close.
fn mtu_has_followed(pair: &Pair) -> Result<()> {
    for agent in [&pair.near, &pair.far] {
        let mut mtu = Value::Null;
        wait_until("the MTU to follow", PATIENCE, || {
            let status = agent.status().unwrap_or_default();
            mtu = status["connections"][0]["mtu"].clone();
            mtu.as_u64().is_some_and(|mtu| (1226..=1230).contains(&mtu))
        })
        .with_context(|| format!("{}: MTU {mtu}", agent.node().name()))?;
    }
    Ok(())
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_transfer_completes_over_a_path_that_never_let_large_packets_through() -> Result<()> {
    let pair = Pair::start("mtu-before", Cloud::Packet, 1)?;
    let _endpoint = pair.endpoint()?;
    let before = pair.footprint()?;
    let _narrow = narrow(&pair)?;
    let (client, connected) = pair.connect(0)?;
    pass_all(&mut both_ways(&pair, &connected)?, MIB)?;
    mtu_has_followed(&pair)?;
    ensure!(client.close(PATIENCE)?.success(), "the client did not end");
    pair.assert_clean(&before)
}

#[test]
#[ignore = "needs root: namespaces, links, BPF"]
fn a_transfer_completes_over_a_path_that_comes_to_drop_large_packets() -> Result<()> {
    let pair = Pair::start("mtu-amid", Cloud::Packet, 1)?;
    let _endpoint = pair.endpoint()?;
    let before = pair.footprint()?;
    let (client, connected) = pair.connect(0)?;
    wait_until("the path to be measured", PATIENCE, || {
        let status = pair.near.status().unwrap_or_default();
        status["connections"][0]["health"]["path_mtu"] == 1450
    })?;
    let mut transfers = both_ways(&pair, &connected)?;
    pass_all(&mut transfers, MIB / 2)?;
    let _narrow = narrow(&pair)?;
    // Two that begin before the MTU follows, beside the two that are half done.
    let mut late = both_ways(&pair, &connected)?;
    let (rest, late) = thread::scope(|scope| {
        let rest = scope.spawn(|| pass_all(&mut transfers, MIB / 2));
        let late = pass_all(&mut late, MIB);
        (rest.join(), late)
    });
    rest.map_err(|_| anyhow!("a transfer's thread panicked"))??;
    late?;
    mtu_has_followed(&pair)?;
    ensure!(client.close(PATIENCE)?.success(), "the client did not end");
    pair.assert_clean(&before)
}
