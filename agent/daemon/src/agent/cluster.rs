//! Prefixes of the cluster that no other domain may use: NSM's `excluded_prefixes.yaml`, and the addresses of Kubernetes' API and DNS as
//! this process has them.
//!
//! NSM's component `exclude-prefixes` writes the file, with the prefixes of pods and services. It is read once a second and compared, as
//! the IP map is, because a ConfigMap changes behind symbolic links.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use ipnet::IpNet;
use nsm_controlplane::plane::ControlPlane;
use nsm_core::net::special::of_address;

use crate::files;

/// How soon a change is noticed.
const INTERVAL: Duration = Duration::from_secs(1);

/// The variable by which Kubernetes gives pods the address of its API: one of the range of services.
const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";

/// The node's DNS servers: in a pod, an address of the range of services.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Follows the file for ever. One that is gone or wrong leaves the prefixes as they were.
pub(crate) async fn follow(file: PathBuf, plane: ControlPlane) {
    let mut known = None;
    let mut tick = tokio::time::interval(INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    plane.protect(of_process());
    loop {
        tick.tick().await;
        let Ok(text) = tokio::fs::read_to_string(&file).await else {
            continue;
        };
        if known.as_ref() == Some(&text) {
            continue;
        }
        match parse(&file, &text) {
            Ok(mut prefixes) => {
                tracing::info!(file = %file.display(), count = prefixes.len(), "protects the cluster's prefixes");
                prefixes.extend(of_process());
                plane.protect(prefixes);
            }
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "the cluster's prefixes stay as they were"
                );
            }
        }
        known = Some(text);
    }
}

/// The addresses of the cluster's own services that this process was given.
fn of_process() -> Vec<IpNet> {
    let api = std::env::var(SERVICE_HOST).ok();
    let resolv_conf = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    addresses(api.as_deref(), &resolv_conf)
}

fn addresses(api: Option<&str>, resolv_conf: &str) -> Vec<IpNet> {
    let servers = resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"));
    let texts = api.into_iter().chain(servers);
    texts
        .filter_map(|text| text.trim().parse::<IpAddr>().ok())
        .filter(|ip| of_address(*ip).is_none())
        .map(IpNet::from)
        .collect()
}

fn parse(file: &Path, text: &str) -> anyhow::Result<Vec<IpNet>> {
    files::excluded_prefixes(text)
        .with_context(|| format!("the excluded prefixes of {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nsms_file_is_read_and_a_wrong_one_is_named() {
        let file = Path::new("excluded_prefixes.yaml");
        for text in [
            "prefixes:\n- 10.96.0.0/12\n- 10.244.0.0/16\n",
            "Prefixes: [10.96.0.0/12, 10.244.0.0/16]",
        ] {
            let prefixes = parse(file, text).unwrap();
            assert_eq!(
                prefixes,
                ["10.96.0.0/12", "10.244.0.0/16"].map(|net| net.parse().unwrap())
            );
        }
        assert!(parse(file, "").unwrap().is_empty());
        assert!(parse(file, "prefixes:\n").unwrap().is_empty());
        let error = format!("{:#}", parse(file, "prefixes: [all]").unwrap_err());
        assert!(
            error.contains("excluded_prefixes.yaml") && error.contains("`all`"),
            "{error}"
        );
    }

    #[test]
    fn the_api_and_the_dns_servers_are_protected() {
        let found = addresses(
            Some("10.96.0.1"),
            "search svc.cluster.local\nnameserver 10.96.0.10\nnameserver 127.0.0.53\n",
        );
        assert_eq!(
            found,
            ["10.96.0.1/32", "10.96.0.10/32"].map(|net| net.parse().unwrap())
        );
    }
}
