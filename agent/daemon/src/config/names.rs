//! Names of keys as people write them: with mistakes, and several in one variable.

use super::{
    keys::{KEYS, Key},
    value::ListenUrl,
};

/// The variable with which NSM's own components are told all their listen URLs at once.
pub(super) const LISTEN_ON: &str = "NSM_LISTEN_ON";

/// A sentence about a key that does not exist, with the one that was probably meant.
pub(super) fn unknown(path: &str) -> String {
    let leaf = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let near = KEYS
        .iter()
        .map(|key| (distance(path, key.path), key.path))
        .min()
        .filter(|(distance, known)| *distance <= 2.max(known.len() / 4));
    let same_leaf = || {
        let mut found = KEYS.iter().filter(|key| leaf(key.path) == leaf(path));
        found.next().map(|key| (0, key.path))
    };
    match near.or_else(same_leaf) {
        Some((_, known)) => format!("{path}: no such key; did you mean {known}?"),
        None => format!("{path}: no such key; `proxy-nsmgr agent --print-config` lists all"),
    }
}

/// The number of characters to change, add or drop to make one text of the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The listeners that the URLs of `NSM_LISTEN_ON` are for: a socket is the NSMgr's, a port the proxy's.
pub(super) fn listen_on(text: &str) -> Result<Vec<(&'static Key, String)>, String> {
    let mut found: Vec<(&'static Key, String)> = Vec::new();
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
