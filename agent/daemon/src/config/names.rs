//! Names of keys with mistakes, and the variable that stands for several keys.

use super::{Config, keys::KEYS, table::Key, value::ListenUrl};

/// The variable that has all listen URLs of an NSM component.
pub(super) const LISTEN_ON: &str = "NSM_LISTEN_ON";

/// A sentence about a key that does not exist, with the one that was probably meant.
pub(super) fn unknown(path: &str) -> String {
    let leaf = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let paths = || KEYS.iter().map(|key| key.path.as_str());
    let near = paths()
        .map(|known| (strsim::levenshtein(path, known), known))
        .min()
        .filter(|(distance, known)| *distance <= 2.max(known.len() / 4))
        .map(|(_, known)| known);
    match near.or_else(|| paths().find(|known| leaf(known) == leaf(path))) {
        Some(known) => format!("{path}: no such key; did you mean {known}?"),
        None => format!("{path}: no such key; `proxy-nsmgr agent --print-config` lists all"),
    }
}

/// The listeners that the URLs of `NSM_LISTEN_ON` are for: a socket is the NSMgr's, a port the proxy's.
pub(super) fn listen_on(text: &str) -> Result<Vec<(&'static Key<Config>, String)>, String> {
    let mut found: Vec<(&'static Key<Config>, String)> = Vec::new();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let url: ListenUrl = part
            .parse()
            .map_err(|allowed| format!("{part:?} is not allowed: {allowed}"))?;
        let path = match url {
            ListenUrl::Unix(_) => "listen.nsmgr",
            ListenUrl::Tcp(_) => "listen.proxy",
        };
        let key = KEYS
            .iter()
            .find(|key| key.path == path)
            .expect("a key of the table");
        if found.iter().any(|(other, _)| other.path == path) {
            return Err(format!(
                "{text:?} has two URLs for {path}: one unix:// and one tcp:// URL are allowed"
            ));
        }
        found.push((key, part.to_owned()));
    }
    Ok(found)
}
