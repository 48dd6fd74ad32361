//! The file of who may do what by a proven id (`policy_file`), read at the start and at SIGHUP.

use std::path::Path;

use anyhow::Context as _;
use nsm_controlplane::{identity::gate::Gate, plane::ControlPlane};
use nsm_core::identity::access::Rules;

use crate::{config::Config, files};

/// What decides on callers and servers that show certificates.
///
/// # Errors
/// The file cannot be read, or its rules contradict each other.
pub(crate) fn gate(config: &Config) -> anyhow::Result<Gate> {
    let Some(path) = config.policy_file.as_deref() else {
        return Ok(Gate::of_own_domain(config.domain.clone()));
    };
    let rules = load(path)?;
    let gate = Gate::new(config.domain.clone(), rules);
    gate.with_context(|| format!("the policy {} (`policy_file`)", path.display()))
}

/// Takes over what the file has now. A bad file changes nothing.
pub(crate) fn reload(path: Option<&Path>, plane: &ControlPlane) {
    let Some(path) = path else { return };
    let taken = load(path).and_then(|rules| Ok(plane.set_rules(rules)?));
    match taken {
        Ok(()) => tracing::info!(file = %path.display(), "took over the policy"),
        Err(error) => tracing::error!(
            file = %path.display(), error = format!("{error:#}"),
            "the policy stays as it was: mend the file and send SIGHUP again"
        ),
    }
}

fn load(path: &Path) -> anyhow::Result<Rules> {
    let file = || format!("the policy {} (`policy_file`)", path.display());
    let text = std::fs::read_to_string(path).with_context(file)?;
    files::policy(&text).with_context(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(text: &str) -> anyhow::Result<Rules> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.yaml");
        std::fs::write(&path, text).unwrap();
        load(&path)
    }

    #[test]
    fn a_policy_is_read_and_a_wrong_one_names_file_line_and_value() {
        let text = "domains:\n  - domain: two.example\n    trust_domain: td-2\n    services: [icmp-responder, web-*]\n";
        let rules = loaded(text).unwrap();
        assert_eq!(rules.domains[0].services.len(), 2);
        for empty in ["", "\n# nothing\n"] {
            assert_eq!(loaded(empty).unwrap(), Rules::default());
        }
        for (text, words) in [
            ("domains: [{domain: two.example}]", "trust_domain"),
            (
                "domains:\n  - {domain: two.example, trust_domain: TD-2}",
                "TD-2",
            ),
            ("domain: two.example", "line 1"),
            ("roles: {proxy: [nsmgr]}", "nsmgr"),
        ] {
            let error = format!("{:#}", loaded(text).unwrap_err());
            assert!(
                error.contains("policy.yaml") && error.contains(words),
                "{error}"
            );
        }
        let error = load(Path::new("/nothing/policy.yaml")).unwrap_err();
        assert!(format!("{error:#}").contains("/nothing/policy.yaml"));
    }
}
