//! The file that maps internal addresses to public ones (NSM's `map-ip.yaml`), followed while the
//! agent runs.
//!
//! It is read once a second and compared. On Kubernetes the file is a ConfigMap: its update swaps
//! a symbolic link two folders up, which a watch on the file itself does not see; a read of a few
//! hundred bytes a second sees every way of changing it.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use nsm_controlplane::plane::ControlPlane;
use nsm_core::address::ipmap::{IpMap, IpMapError};
use tokio::sync::Notify;

use crate::{config::MapIpFile, files};

/// How soon a change is noticed.
const INTERVAL: Duration = Duration::from_secs(1);

/// The map that holds: the file's, and over it this node's own pair as it was found out.
pub(crate) struct IpMaps {
    plane: ControlPlane,
    parts: Mutex<Parts>,
    changed: Notify,
}

#[derive(Default)]
struct Parts {
    file: IpMap,
    own: Option<(IpAddr, IpAddr)>,
}

impl IpMaps {
    /// An empty map.
    pub(crate) fn new(plane: ControlPlane) -> Self {
        Self {
            plane,
            parts: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Takes the file's map.
    fn set_file(&self, map: IpMap) {
        let mut parts = self.parts();
        parts.file = map;
        match parts.effective() {
            Ok(map) => self.plane.set_ip_map(map),
            Err(error) => {
                tracing::warn!(%error, "the public address that was found out is left out of the IP map");
                self.plane.set_ip_map(parts.file.clone());
            }
        }
        self.changed.notify_one();
    }

    /// Takes this node's own internal and public address.
    ///
    /// # Errors
    /// The file gives that public address to another node: the file's map holds alone.
    pub(crate) fn set_own(&self, own: Option<(IpAddr, IpAddr)>) -> Result<(), IpMapError> {
        let mut parts = self.parts();
        parts.own = own;
        let effective = parts.effective();
        let outcome = effective.as_ref().map(drop).map_err(Clone::clone);
        self.plane
            .set_ip_map(effective.unwrap_or_else(|_| parts.file.clone()));
        outcome
    }

    /// The public address that the file has for an internal one.
    pub(crate) fn of_file(&self, internal: IpAddr) -> Option<IpAddr> {
        self.parts().file.get(internal)
    }

    /// Waits until the file's map has changed since the last call.
    pub(crate) async fn file_changed(&self) {
        self.changed.notified().await;
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parts {
    fn effective(&self) -> Result<IpMap, IpMapError> {
        match self.own {
            Some((internal, external)) => self.file.with(internal, external),
            None => Ok(self.file.clone()),
        }
    }
}

/// A followed file.
pub(crate) struct IpMapFile {
    path: PathBuf,
    text: Option<String>,
}

impl IpMapFile {
    /// Reads the file. One that is absent is an error only when it was named.
    pub(crate) fn load(file: &MapIpFile, maps: &IpMaps) -> anyhow::Result<Self> {
        let MapIpFile { path, is_required } = file;
        let text = match std::fs::read_to_string(path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_required => None,
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("cannot read the IP map {} (`map_ip_file`)", path.display())
                });
            }
        };
        maps.set_file(parse(path, text.as_deref().unwrap_or_default())?);
        Ok(Self {
            path: path.to_owned(),
            text,
        })
    }

    /// Follows the file for ever. A file that is gone or wrong leaves the map as it was.
    pub(crate) async fn follow(mut self, maps: Arc<IpMaps>) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let Ok(text) = tokio::fs::read_to_string(&self.path).await else {
                continue;
            };
            if self.text.as_deref() != Some(text.as_str()) {
                apply(&self.path, &text, &maps);
                self.text = Some(text);
            }
        }
    }
}

/// Reads the file at once.
pub(crate) fn reload(path: &Path, maps: &IpMaps) {
    match std::fs::read_to_string(path) {
        Ok(text) => apply(path, &text, maps),
        Err(error) => tracing::warn!(file = %path.display(), %error, "the IP map stays as it was"),
    }
}

fn apply(path: &Path, text: &str, maps: &IpMaps) {
    match parse(path, text) {
        Ok(map) => {
            maps.set_file(map);
            tracing::info!(file = %path.display(), "took over the IP map");
        }
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the IP map stays as it was");
        }
    }
}

fn parse(path: &Path, text: &str) -> anyhow::Result<IpMap> {
    files::ip_map(text).with_context(|| format!("the IP map {}", path.display()))
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
        for (text, expected) in [
            ("10.0.0.1: nowhere", "`nowhere` is no IP address"),
            ("- a\n- b", "internal: external"),
            (
                "10.0.0.1: 203.0.113.1\n10.0.0.2: 203.0.113.1",
                "203.0.113.1",
            ),
        ] {
            let error = format!("{:#}", parse(path, text).unwrap_err());
            assert!(
                error.contains("map-ip.yaml") && error.contains(expected),
                "{error}"
            );
        }
    }
}
