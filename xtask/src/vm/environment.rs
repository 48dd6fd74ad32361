//! The environment that the command has in the guest: the caller's, without what leads out of the guest.

use std::{collections::BTreeMap, env};

use super::accelerator::Accelerator;

/// How much longer tests wait when the processor is emulated.
const EMULATED_PATIENCE: &str = "4";

/// Variables that name sockets and devices of the caller's session, by how their names begin.
const OF_THE_SESSION: &[&str] = &["DBUS_", "DISPLAY", "SSH_", "WAYLAND_", "XDG_RUNTIME_DIR"];

/// For a caller without a PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The guest's environment for this process's.
pub(super) fn for_guest(accelerator: Accelerator) -> BTreeMap<String, String> {
    // Variables that are no text cannot be sent, and nothing that runs in the guest reads such.
    let ours = env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    select(ours, accelerator)
}

fn select(
    variables: impl Iterator<Item = (String, String)>,
    accelerator: Accelerator,
) -> BTreeMap<String, String> {
    let mut selected: BTreeMap<_, _> = variables
        .filter(|(name, _)| !OF_THE_SESSION.iter().any(|start| name.starts_with(start)))
        .collect();
    let mut default = |name: &str, value: &str| {
        selected
            .entry(name.to_owned())
            .or_insert_with(|| value.to_owned());
    };
    default("PATH", DEFAULT_PATH);
    default("HOME", "/root");
    if accelerator.is_emulation() {
        default(nsm_world::PATIENCE_VARIABLE, EMULATED_PATIENCE);
    }
    selected
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(variables: &[(&str, &str)], accelerator: Accelerator) -> Vec<String> {
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        select(variables, accelerator)
            .into_iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect()
    }

    #[test]
    fn the_callers_variables_are_kept_but_those_of_its_session() {
        let callers = [
            ("PATH", "/x"),
            ("HOME", "/h"),
            ("RUST_LOG", "debug"),
            ("SSH_AUTH_SOCK", "/tmp/agent"),
            ("DISPLAY", ":0"),
        ];
        assert_eq!(
            selected(&callers, Accelerator::Kvm),
            ["HOME=/h", "PATH=/x", "RUST_LOG=debug"]
        );
    }

    #[test]
    fn patience_grows_with_emulation_unless_the_caller_has_set_it() {
        assert_eq!(
            selected(&[], Accelerator::Tcg),
            [
                "HOME=/root".to_owned(),
                "NSM_WORLD_PATIENCE=4".to_owned(),
                format!("PATH={DEFAULT_PATH}")
            ]
        );
        assert!(
            selected(&[("NSM_WORLD_PATIENCE", "9")], Accelerator::Tcg)
                .contains(&"NSM_WORLD_PATIENCE=9".to_owned())
        );
    }
}
