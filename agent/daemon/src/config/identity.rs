//! The keys of the agent's identity, and what holds between them: without an identity an agent speaks plain text only where the
//! configuration says so, or where only its own node can reach it.

use std::path::PathBuf;

use nsm_controlplane::identity::pem::PemFiles;
use nsm_core::net::PeerUrl;

use super::{
    keys::{Config, Identity},
    value::ListenUrl,
};

/// Where an identity comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// SPIFFE's Workload API behind this socket.
    WorkloadApi(PathBuf),
    /// PEM files.
    Files(PemFiles),
}

/// The ways out for an agent that would be open to the network.
const WAYS_OUT: &str = "without an identity this agent would serve everybody there in plain text: set `identity.workload_api` to the \
                        socket of SPIFFE's Workload API, or `identity.certificate_file`, `identity.key_file` and `identity.bundles` to PEM \
                        files, or `insecure: true` where everybody on the network may do everything";

impl Identity {
    /// Where the identity comes from; none where there is none. What is missing is a contradiction, which was reported before.
    pub(crate) fn source(&self) -> Option<Source> {
        let socket = self.workload_api.as_ref().and_then(PeerUrl::socket_path);
        if let Some(socket) = socket {
            return Some(Source::WorkloadApi(socket.to_owned()));
        }
        let (certificate, key) = self.certificate_file.clone().zip(self.key_file.clone())?;
        let bundles = self.bundles.clone();
        Some(Source::Files(PemFiles {
            certificate,
            key,
            bundles,
        }))
    }
}

impl Config {
    /// Contradictions of the identity.
    pub(super) fn identity_contradictions(&self) -> Vec<(&'static str, String)> {
        let identity = &self.identity;
        let mut found = Vec::new();
        let files = [
            (
                "identity.certificate_file",
                identity.certificate_file.is_some(),
            ),
            ("identity.key_file", identity.key_file.is_some()),
            ("identity.bundles", !identity.bundles.is_empty()),
        ];
        let first = files.iter().find(|(_, is_set)| *is_set);
        let missing = files.iter().find(|(_, is_set)| !is_set);
        let has_api = identity.workload_api.is_some();
        match (first, missing) {
            (Some((key, _)), _) if has_api => {
                let what = "identity.workload_api gives certificates, keys and bundles: take the files out, or it";
                found.push((*key, what.to_owned()));
            }
            (Some((key, _)), Some((missing, _))) => {
                let what = format!("{missing} is missing: an identity in files has all three");
                found.push((*key, what));
            }
            _ => {}
        }
        let has_identity = has_api || first.is_some();
        if has_identity && self.insecure {
            let what = "an agent with an identity speaks TLS: take `insecure` out, or the identity (SPIFFE_ENDPOINT_SOCKET sets one, too)";
            found.push(("insecure", what.to_owned()));
        }
        found
    }

    /// Whether the agent may listen where the configuration says.
    ///
    /// # Errors
    /// It would be open to the network, and the configuration does not allow that.
    pub(crate) fn check_openness(&self) -> anyhow::Result<()> {
        if self.insecure || self.identity.source().is_some() {
            return Ok(());
        }
        let listeners = [
            ("listen.proxy", &self.listen.proxy),
            ("listen.registry", &self.listen.registry),
        ];
        match listeners.iter().find(|(_, url)| is_open(url)) {
            Some((key, url)) => Err(anyhow::anyhow!("`{key}` is {url}: {WAYS_OUT}")),
            None => Ok(()),
        }
    }
}

/// Whether others than processes of this node can reach it.
fn is_open(url: &ListenUrl) -> bool {
    match url {
        ListenUrl::Unix(_) => false,
        ListenUrl::Tcp(address) => !address.ip().to_canonical().is_loopback(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::of_text;

    fn error(text: &str) -> String {
        of_text(text).unwrap_err().to_string()
    }

    #[test]
    fn an_open_agent_without_an_identity_names_the_three_ways_out() {
        let check = |text: &str| of_text(text).unwrap().config.check_openness();
        let error = check("").unwrap_err().to_string();
        for way in [
            "identity.workload_api",
            "identity.certificate_file",
            "insecure: true",
        ] {
            assert!(error.contains(way), "{error}");
        }
        check("insecure: true").unwrap();
        check("identity: {workload_api: \"unix:///a\"}").unwrap();
        check("listen: {proxy: \"tcp://127.0.0.1:5006\", registry: \"tcp://[::1]:5005\"}").unwrap();
        let error = check("listen: {proxy: \"tcp://127.0.0.1:5006\"}").unwrap_err();
        assert!(error.to_string().contains("listen.registry"), "{error}");
    }

    fn error_about(text: &str, what: &str) {
        let error = error(text);
        assert!(error.contains(what), "{error}");
    }

    #[test]
    fn both_sources_are_read() {
        let api = of_text("identity: {workload_api: \"unix:///run/spire/agent.sock\"}").unwrap();
        let source = api.config.identity.source();
        assert_eq!(
            source,
            Some(Source::WorkloadApi("/run/spire/agent.sock".into()))
        );
        let text = "identity: {certificate_file: /c, key_file: /k, bundles: {one.example: /b}}";
        let files = of_text(text).unwrap();
        let files_of = PemFiles {
            certificate: "/c".into(),
            key: "/k".into(),
            bundles: [("one.example".parse().unwrap(), "/b".into())].into(),
        };
        assert_eq!(
            files.config.identity.source(),
            Some(Source::Files(files_of))
        );
        assert_eq!(
            of_text(&files.to_yaml()).unwrap().config.identity,
            files.config.identity
        );
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        error_about(
            "identity: {workload_api: \"tcp://127.0.0.1:1\"}",
            "workload_api",
        );
        error_about(
            "identity: {certificate_file: /c}",
            "identity.key_file is missing",
        );
        error_about(
            "identity: {workload_api: \"unix:///a\", key_file: /k}",
            "take the files out",
        );
        error_about(
            "{insecure: true, identity: {workload_api: \"unix:///a\"}}",
            "take `insecure` out",
        );
        error_about("identity: {bundles: {One: /b}}", "no trust domain");
    }
}
