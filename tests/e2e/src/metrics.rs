//! What an agent's metrics say.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use anyhow::{Context as _, Result, ensure};
use nsm_world::Agent;

use crate::PATIENCE;

/// The page, asked on the agent's node.
///
/// # Errors
/// When there is none.
pub fn page(agent: &Agent) -> Result<String> {
    agent.node().inside(|| {
        let mut stream = TcpStream::connect("127.0.0.1:9006")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        ensure!(page.starts_with("HTTP/1.1 200"), "{page}");
        Ok(page)
    })?
}

/// The value of the one series with this name and these labels.
///
/// # Errors
/// When there is none, or more than one.
pub fn value(page: &str, name: &str, labels: &[String]) -> Result<f64> {
    let is_it = |line: &&str| {
        let rest = line.strip_prefix(name).unwrap_or_default();
        rest.starts_with(['{', ' ']) && labels.iter().all(|label| line.contains(label))
    };
    let mut lines = page.lines().filter(is_it);
    let line = lines
        .next()
        .with_context(|| format!("no {name}{labels:?} in {page}"))?;
    ensure!(lines.next().is_none(), "two {name}{labels:?} in {page}");
    Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)
}
