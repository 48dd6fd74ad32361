//! Where the workspace's own programs are.

use std::{
    collections::HashMap,
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use crate::WorldError;

/// The path of a program of this workspace whose package has the same name: what the environment names (`PROXY_NSMGR_BIN`
/// for `proxy-nsmgr`, `NSM_WORLD_DNS_BIN` for `nsm-world-dns`), else it is built, once per process, in the caller's
/// profile; so that a test that is run by hand never meets a stale program.
///
/// # Errors
/// When it cannot be built.
pub fn binary(package: &str) -> Result<PathBuf, WorldError> {
    static BUILT: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);
    let variable = format!("{}_BIN", package.to_uppercase().replace('-', "_"));
    if let Some(path) = env::var_os(variable).filter(|path| !path.is_empty()) {
        return Ok(PathBuf::from(path));
    }
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    if let Some(path) = built.get(package) {
        return Ok(path.clone());
    }
    let path = build(package)?;
    built.insert(package.to_owned(), path.clone());
    Ok(path)
}

/// Cargo, as it names itself to what it runs; `cargo` alone might be another version.
///
/// What it states about the package that it runs is not passed on: build scripts ask cargo to compare such variables (ring's does), and
/// crates would be built again whenever a build by hand follows one by a test, or the reverse.
#[must_use]
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_of_a_package) {
            command.env_remove(name);
        }
    }
    command
}

/// Whether cargo sets a variable of this name for the package that it runs.
fn is_of_a_package(name: &str) -> bool {
    name.starts_with("CARGO_PKG_")
        || name.starts_with("CARGO_MANIFEST_")
        || matches!(
            name,
            "CARGO_BIN_NAME" | "CARGO_CRATE_NAME" | "CARGO_PRIMARY_PACKAGE"
        )
}

fn build(package: &str) -> Result<PathBuf, WorldError> {
    let failed = |message: String| WorldError::Build {
        package: package.to_owned(),
        message,
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = cargo();
    command.args([
        "build",
        "--quiet",
        "--message-format=json-render-diagnostics",
        "--package",
        package,
    ]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let output = command
        .current_dir(workspace)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(format!("cannot run cargo: {error}")))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let path = executable(&messages, package);
    path.ok_or_else(|| failed("cargo named no executable of that name".to_owned()))
}

/// The executable of that name among cargo's messages.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let ours = message["reason"] == "compiler-artifact" && message["target"]["name"] == name;
        ours.then(|| message["executable"].as_str().map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cargo_states_of_a_package_is_not_passed_on() {
        // Cargo sets it for every test.
        assert!(env::var_os("CARGO_MANIFEST_DIR").is_some());
        let command = cargo();
        let removed: Vec<_> = command
            .get_envs()
            .filter(|(_, value)| value.is_none())
            .map(|(name, _)| name.to_str().unwrap())
            .collect();
        for name in ["CARGO_MANIFEST_DIR", "CARGO_PKG_VERSION"] {
            assert!(removed.contains(&name), "{removed:?}");
        }
        for name in ["CARGO_BUILD_JOBS", "CARGO_TARGET_DIR", "CARGO_HOME"] {
            assert!(!is_of_a_package(name), "{name}");
        }
    }

    #[test]
    fn the_executable_is_found_among_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"serde"},"executable":null}
not json
{"reason":"compiler-artifact","target":{"name":"nsm-world-dns"},"executable":"/t/debug/nsm-world-dns"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(
            executable(messages, "nsm-world-dns"),
            Some("/t/debug/nsm-world-dns".into())
        );
        assert_eq!(executable(messages, "serde"), None);
    }
}
