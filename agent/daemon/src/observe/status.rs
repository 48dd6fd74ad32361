//! `proxy-nsmgr status`: what the agent on this node has, as tables for people or as JSON.

use std::time::Duration;

use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets};
use nsm_controlplane::transport::dial::dial;
use nsm_core::net::PeerUrl;
use nsm_proto::admin::{
    ConnectionStatus, Counters, DnsAnswer, Identity, Status, StatusRequest,
    admin_client::AdminClient,
};
use tonic::Code;

use crate::{
    cli::StatusArgs,
    tool::{print_line, shown},
};

mod paths;

/// How long a connection to the agent may take; it is on this node.
pub(crate) const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the agent may take to answer: it enters the namespace of each pod that has a link, of which there may be thousands.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The largest answer that is read, bytes: a connection takes 1 KiB or so, and an agent is meant for tens of thousands. A
/// program that answers on this node is not trusted for that alone.
const LONGEST_ANSWER: usize = 256 << 20;

/// Ids are shown short, as container tools do: enough to tell connections of one node apart.
const SHORT_ID: usize = 8;

/// Asks the agent and prints its answer.
///
/// # Errors
///
/// No agent answers on the admin socket.
pub(crate) async fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let status = ask(&args.admin).await?;
    if args.json {
        print_line(&serde_json::to_string(&status)?)
    } else {
        print_line(render(&status).trim_end())
    }
}

/// Asks the agent who it is, and prints that.
///
/// # Errors
///
/// No agent answers on the admin socket.
pub(crate) async fn run_identity(args: &StatusArgs) -> anyhow::Result<()> {
    let status = ask(&args.admin).await?;
    let found = status.identity.unwrap_or_default();
    if args.json {
        return print_line(&serde_json::to_string(&found)?);
    }
    for line in identity(&found) {
        print_line(&shown(line.trim_start()))?;
    }
    for peer in status
        .peers
        .iter()
        .filter(|peer| !peer.spiffe_id.is_empty())
    {
        print_line(&shown(&format!("peer {}: {}", peer.url, peer.spiffe_id)))?;
    }
    Ok(())
}

async fn ask(admin: &PeerUrl) -> anyhow::Result<Status> {
    let channel = dial(admin, DIAL_TIMEOUT)
        .await
        .with_context(|| no_agent(admin))?;
    let mut request = tonic::Request::new(StatusRequest {});
    request.set_timeout(TIMEOUT);
    let mut client = AdminClient::new(channel).max_decoding_message_size(LONGEST_ANSWER);
    match tokio::time::timeout(TIMEOUT, client.get_status(request)).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(refused(admin, &status)),
        Err(_) => {
            anyhow::bail!("{admin} took the connection and gave no answer within {TIMEOUT:?}")
        }
    }
}

/// Why an admin socket gives no answer.
pub(crate) fn refused(admin: &PeerUrl, status: &tonic::Status) -> anyhow::Error {
    if status.code() == Code::Unimplemented {
        return anyhow::anyhow!(
            "{admin} serves no admin API: it is not the admin socket of an agent (see listen.admin)"
        );
    }
    let (code, message) = (status.code(), shown(status.message()));
    anyhow::anyhow!("{admin} refused ({code:?}): {message}")
}

/// What to do about an admin socket that does not take us.
pub(crate) fn no_agent(admin: &PeerUrl) -> String {
    let Some(path) = admin.socket_path() else {
        return "is the agent running?".to_owned();
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            "the admin socket is not for this user: ask as root".to_owned()
        }
        Err(_) => {
            "no agent is running on this node, or its listen.admin is another (--admin)".to_owned()
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                "the admin socket is not for this user: ask as root".to_owned()
            }
            _ => "the agent that made the admin socket is not running any more".to_owned(),
        },
    }
}

/// The whole answer as text.
fn render(status: &Status) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        text.push_str(&shown(&words));
        text.push('\n');
    };
    let ready = if status.ready { "ready" } else { "NOT READY" };
    line(format!(
        "{} of {}, version {}: {ready}",
        status.name, status.domain, status.version
    ));
    for reason in &status.waiting_for {
        line(format!("  waiting for: {reason}"));
    }
    for reason in &status.degraded {
        line(format!("  degraded: {reason}"));
    }
    if let Some(bpf) = &status.bpf {
        line(match bpf.hook.as_str() {
            "none" | "" => "  bpf: none".to_owned(),
            hook => format!(
                "  bpf: {hook} on {}, maps in {}, object {}",
                list(&bpf.interfaces),
                bpf.pin_path,
                short(&bpf.object_sha256)
            ),
        });
    }
    if let Some(frames) = status.bpf.as_ref().and_then(|bpf| bpf.frames) {
        line(format!(
            "  frames out: {} fast, {} slow; in: {} fast, {} slow",
            frames.fast_out, frames.slow_out, frames.fast_in, frames.slow_in
        ));
    }
    for words in public_address(status) {
        line(words);
    }
    for words in status.identity.iter().flat_map(identity) {
        line(words);
    }
    for listener in &status.listeners {
        line(format!("  {}: {}", listener.role, listener.url));
    }
    section(&mut text, "CONNECTIONS", connections(&status.connections));
    let down = down(&status.connections);
    if !down.is_empty() {
        section(&mut text, "DOWN", down);
    }
    section(&mut text, "TUNNELS", tunnels(&status.connections));
    let pairs = pairs(&status.connections);
    if !pairs.is_empty() {
        section(&mut text, "PAIRS", pairs);
    }
    if let Some(paths) = paths::table(status) {
        section(&mut text, "PATHS", paths);
    }
    let mut peers = table(&["PEER", "STATE", "CONNECTIONS", "SPIFFE ID"], &[2]);
    for peer in &status.peers {
        add(
            &mut peers,
            [
                peer.url.clone(),
                peer.state.clone(),
                peer.connections.to_string(),
                peer.spiffe_id.clone(),
            ],
        );
    }
    section(&mut text, "PEERS", peers);
    let dns = dns(&status.dns);
    if !dns.is_empty() {
        section(&mut text, "DNS", dns);
    }
    let mut drops = table(&["REASON", "PACKETS"], &[1]);
    for (reason, packets) in status.drops.iter().filter(|(_, packets)| **packets > 0) {
        add(&mut drops, [reason.clone(), packets.to_string()]);
    }
    section(&mut text, "DROPS", drops);
    text
}

/// Who the agent is, and whom it believes.
fn identity(identity: &Identity) -> Vec<String> {
    if identity.insecure {
        let what = "  INSECURE: plain text, everybody who reaches this agent may do everything (`insecure`)";
        return vec![what.to_owned()];
    }
    if identity.source.is_empty() {
        return vec!["  identity: none, plain text on this node only".to_owned()];
    }
    if identity.spiffe_id.is_empty() {
        return vec![format!(
            "  identity: none yet, waiting for {}",
            identity.source
        )];
    }
    let bundles = identity.bundles.iter();
    let bundles = bundles.map(|bundle| format!("{} ({})", bundle.trust_domain, bundle.authorities));
    let ends = seconds(identity.ends_in_seconds);
    vec![
        format!(
            "  identity: {}, ends in {ends}, from {}",
            identity.spiffe_id, identity.source
        ),
        format!("  believed: {}", list(&bundles.collect::<Vec<_>>())),
    ]
}

/// The public address, and the sources with another.
fn public_address(status: &Status) -> Vec<String> {
    let Some(found) = &status.public_address else {
        return Vec::new();
    };
    let first = match (found.address.as_str(), found.local.as_str()) {
        ("", "") => "  public address: unknown".to_owned(),
        ("", local) => format!("  public address: unknown, peers get {local}"),
        (address, _) => format!("  public address: {address} ({})", found.source),
    };
    let conflicts = found.conflicts.iter().map(|finding| {
        format!(
            "  conflict: {} by {}, but {} by {}",
            found.address, found.source, finding.address, finding.source
        )
    });
    std::iter::once(first).chain(conflicts).collect()
}

fn connections(connections: &[ConnectionStatus]) -> Table {
    let mut table = table(
        &[
            "ID",
            "SERVICE",
            "ENDPOINT",
            "STATE",
            "MECHANISM",
            "CLIENT",
            "SERVER",
            "MTU",
            "EXPIRES",
            "PATH",
        ],
        &[7, 8],
    );
    for connection in connections {
        let cells = [
            short(&connection.id),
            connection.network_service.clone(),
            connection.endpoint.clone(),
            state(connection),
            format!(
                "{} → {}",
                connection.client_mechanism, connection.endpoint_mechanism
            ),
            list(&connection.src_addresses),
            list(&connection.dst_addresses),
            connection.mtu.to_string(),
            seconds(connection.expires_in_seconds),
            connection.path.join(" → "),
        ];
        add(&mut table, cells);
    }
    table
}

/// The state, and of a connection that was granted without proof what is known of its path.
fn state(connection: &ConnectionStatus) -> String {
    let path = connection.health.as_ref().map(|health| &health.state);
    match path.filter(|path| *path != "up" && connection.state == "UP") {
        Some(path) => format!("UP, path {path}"),
        None => connection.state.clone(),
    }
}

/// Why connections are DOWN, where an agent has the reason.
fn down(connections: &[ConnectionStatus]) -> Table {
    let mut table = table(&["ID", "REASON"], &[]);
    for connection in connections.iter().filter(|it| !it.down_reason.is_empty()) {
        let cells = [short(&connection.id), connection.down_reason.clone()];
        add(&mut table, cells);
    }
    table
}

fn tunnels(connections: &[ConnectionStatus]) -> Table {
    let mut table = table(
        &[
            "ID",
            "VNI",
            "PORT",
            "LOCAL",
            "REMOTE",
            "INTERFACE",
            "NETNS",
            "TX PACKETS",
            "TX BYTES",
            "RX PACKETS",
            "RX BYTES",
        ],
        &[1, 2, 7, 8, 9, 10],
    );
    for connection in connections {
        let Some(tunnel) = &connection.tunnel else {
            continue;
        };
        let [tx_packets, tx_bytes, rx_packets, rx_bytes] = counts(tunnel.counters.as_ref());
        let cells = [
            short(&connection.id),
            tunnel.vni.to_string(),
            tunnel.port.to_string(),
            tunnel.local.clone(),
            tunnel.remote.clone(),
            tunnel.interface.clone(),
            tunnel.netns.clone(),
            tx_packets,
            tx_bytes,
            rx_packets,
            rx_bytes,
        ];
        add(&mut table, cells);
    }
    table
}

/// The links of connections whose pods are both on this node.
fn pairs(connections: &[ConnectionStatus]) -> Table {
    let headers = [
        "ID",
        "END",
        "INTERFACE",
        "NETNS",
        "TX PACKETS",
        "TX BYTES",
        "RX PACKETS",
        "RX BYTES",
    ];
    let mut table = table(&headers, &[4, 5, 6, 7]);
    for connection in connections {
        for (end, link) in ["client", "endpoint"].into_iter().zip(&connection.pair) {
            let [tx_packets, tx_bytes, rx_packets, rx_bytes] = counts(link.counters.as_ref());
            let cells = [
                short(&connection.id),
                end.to_owned(),
                link.interface.clone(),
                link.netns.clone(),
                tx_packets,
                tx_bytes,
                rx_packets,
                rx_bytes,
            ];
            add(&mut table, cells);
        }
    }
    table
}

/// Packets and bytes sent, then received.
fn counts(counters: Option<&Counters>) -> [String; 4] {
    let count = |of: fn(&Counters) -> u64| {
        counters.map_or_else(|| "-".to_owned(), |counters| of(counters).to_string())
    };
    [
        count(|counters| counters.tx_packets),
        count(|counters| counters.tx_bytes),
        count(|counters| counters.rx_packets),
        count(|counters| counters.rx_bytes),
    ]
}

/// What DNS answered about other domains.
fn dns(answers: &[DnsAnswer]) -> Table {
    let mut table = table(&["DOMAIN", "ANSWER", "BY", "AGE", "EXPIRES"], &[3, 4]);
    for answer in answers {
        let (outcome, server) = match answer.trouble.as_str() {
            "" => (&answer.answer, answer.server.as_str()),
            _ => (&answer.trouble, "-"),
        };
        let cells = [
            answer.domain.clone(),
            outcome.clone(),
            server.to_owned(),
            seconds(answer.age_ms / 1000),
            seconds(answer.expires_in_ms / 1000),
        ];
        add(&mut table, cells);
    }
    table
}

/// Adds a row to a table; much of its text comes from other domains.
fn add<const CELLS: usize>(table: &mut Table, cells: [String; CELLS]) {
    table.add_row(cells.map(|cell| shown(&cell)));
}

/// A table with these headers; the columns `right` hold numbers.
fn table(headers: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(headers.to_vec());
    for (index, column) in table.column_iter_mut().enumerate() {
        // One space to the left stands between columns, none at the line's start.
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn section(text: &mut String, title: &str, table: Table) {
    text.push('\n');
    if table.is_empty() {
        text.push_str(title);
        text.push_str(": none\n");
        return;
    }
    text.push_str(title);
    text.push('\n');
    for line in table.lines() {
        text.push_str("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

fn short(id: &str) -> String {
    id.chars().take(SHORT_ID).collect()
}

fn list(values: &[String]) -> String {
    if values.is_empty() {
        "-".to_owned()
    } else {
        values.join(", ")
    }
}

fn seconds(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        _ => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests;
