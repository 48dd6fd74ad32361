//! The file that maps internal addresses to public ones (NSM's `map-ip.yaml`), followed while the
//! agent runs.
//!
//! It is read once a second and compared. On Kubernetes the file is a ConfigMap: its update swaps
//! a symbolic link two folders up, which a watch on the file itself does not see; a read of a few
//! hundred bytes a second sees every way of changing it.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use nsm_controlplane::plane::ControlPlane;
use nsm_core::ipmap::IpMap;

/// How soon a change is noticed.
const INTERVAL: Duration = Duration::from_secs(1);

/// A followed file.
pub(crate) struct IpMapFile {
    path: PathBuf,
    text: Option<String>,
}

impl IpMapFile {
    /// Reads the file into the plane. One that is absent is an error only when it was named.
    pub(crate) fn load(path: &Path, required: bool, plane: &ControlPlane) -> anyhow::Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => None,
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("cannot read the IP map {} (`map_ip_file`)", path.display())
                });
            }
        };
        plane.set_ip_map(parse(path, text.as_deref().unwrap_or_default())?);
        Ok(Self {
            path: path.to_owned(),
            text,
        })
    }

    /// Follows the file for ever. A file that is gone or wrong leaves the map as it was.
    pub(crate) async fn follow(mut self, plane: ControlPlane) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let Ok(text) = tokio::fs::read_to_string(&self.path).await else {
                continue;
            };
            if self.text.as_deref() != Some(text.as_str()) {
                apply(&self.path, &text, &plane);
                self.text = Some(text);
            }
        }
    }
}

/// Reads the file at once.
pub(crate) fn reload(path: &Path, plane: &ControlPlane) {
    match std::fs::read_to_string(path) {
        Ok(text) => apply(path, &text, plane),
        Err(error) => tracing::warn!(file = %path.display(), %error, "the IP map stays as it was"),
    }
}

fn apply(path: &Path, text: &str, plane: &ControlPlane) {
    match parse(path, text) {
        Ok(map) => {
            plane.set_ip_map(map);
            tracing::info!(file = %path.display(), "took over the IP map");
        }
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the IP map stays as it was");
        }
    }
}

fn parse(path: &Path, text: &str) -> anyhow::Result<IpMap> {
    let file = || format!("the IP map {}", path.display());
    if text.trim().is_empty() {
        return Ok(IpMap::default());
    }
    let pairs: BTreeMap<String, String> = serde_saphyr::from_str(text)
        .with_context(|| format!("{} is not a list of `internal: external`", file()))?;
    let pairs = pairs
        .iter()
        .map(|(internal, external)| Ok((address(internal)?, address(external)?)))
        .collect::<anyhow::Result<Vec<_>>>()
        .with_context(file)?;
    IpMap::from_pairs(pairs).with_context(file)
}

fn address(text: &str) -> anyhow::Result<IpAddr> {
    text.parse()
        .with_context(|| format!("`{text}` is no IP address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_map_is_read_and_a_wrong_one_names_the_file_and_the_value() {
        let path = Path::new("map-ip.yaml");
        let map = parse(path, "10.0.0.1: 203.0.113.1\n10.0.0.2: 203.0.113.2\n").unwrap();
        let internal: IpAddr = "10.0.0.2".parse().unwrap();
        assert_eq!(map.external(internal).to_string(), "203.0.113.2");
        assert!(parse(path, "").is_ok());
        for (text, told) in [
            ("10.0.0.1: nowhere", "`nowhere` is no IP address"),
            ("- a\n- b", "internal: external"),
            (
                "10.0.0.1: 203.0.113.1\n10.0.0.2: 203.0.113.1",
                "203.0.113.1",
            ),
        ] {
            let error = format!("{:#}", parse(path, text).unwrap_err());
            assert!(
                error.contains("map-ip.yaml") && error.contains(told),
                "{error}"
            );
        }
    }
}
