//! Debian's archive: which kernel packages it has, and fetching one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::pin::Pin;
use crate::{digest::sha256, packages};

/// A package as the archive's index lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    /// Of the package's file, in lower-case hexadecimal.
    sha256: String,
}

/// The pinned package if the archive has it, else the newest of its series; says so on stderr then. The index is fetched anew
/// where it lacks the pinned package, unless the one to be taken instead `is_cached`.
///
/// # Errors
/// When the archive has none of the series.
pub(super) fn find(pin: &Pin, is_cached: impl Fn(&Package) -> bool) -> Result<Package> {
    let mut found = look_up(pin)?;
    let suffices = |package: &Package| is_pinned(pin, package) || is_cached(package);
    // Images of containers come without an index, and an old index names versions that are gone.
    if !found.as_ref().is_some_and(suffices) && packages::is_root() {
        if let Err(error) = packages::update_index() {
            eprintln!("==> {error:#}");
        }
        found = look_up(pin)?;
    }
    let package = found.with_context(|| {
        format!(
            "Debian's archive, as apt-cache has it, has no kernel {}…: run apt-get update, see whether bookworm's \
             security archive is among apt's sources, or take another kernel by --image",
            pin.prefix()
        )
    })?;
    if !is_pinned(pin, &package) {
        eprintln!(
            "==> NOT THE PINNED KERNEL: Debian's archive no longer has {} {}; taking {} {} (the pins are in xtask/src/vm/pin.rs)",
            pin.package(),
            pin.version,
            package.name,
            package.version
        );
    }
    Ok(package)
}

/// The pinned package, else the newest of its series, by the index that is there.
fn look_up(pin: &Pin) -> Result<Option<Package>> {
    let known = index_of(&pin.package())?;
    if let Some(package) = known.into_iter().find(|package| is_pinned(pin, package)) {
        return Ok(Some(package));
    }
    let names = apt_cache(&["pkgnames", pin.prefix()])?;
    let Some(newest) = newest(pin, &names) else {
        return Ok(None);
    };
    Ok(index_of(newest)?.into_iter().next())
}

fn is_pinned(pin: &Pin, package: &Package) -> bool {
    package.name == pin.package() && package.version == pin.version && package.sha256 == pin.sha256
}

/// The name with the highest ABI number of the series among package names, one a line.
fn newest<'a>(pin: &Pin, names: &'a str) -> Option<&'a str> {
    let of_series = names
        .lines()
        .filter_map(|name| Some((pin.abi_of(name)?, name)));
    of_series.max().map(|(_, name)| name)
}

fn index_of(package: &str) -> Result<Vec<Package>> {
    // It fails where there is no such package, which is an answer.
    Ok(parse_index(&apt_cache(&["show", package])?))
}

/// The packages of an index in Debian's control format, in its order; incomplete entries are left out.
fn parse_index(text: &str) -> Vec<Package> {
    let stanzas = text.split("\n\n");
    stanzas
        .filter_map(|stanza| {
            let field = |name: &str| {
                stanza.lines().find_map(|line| {
                    let (key, value) = line.split_once(':')?;
                    (key == name).then(|| value.trim().to_owned())
                })
            };
            Some(Package {
                name: field("Package")?,
                version: field("Version")?,
                sha256: field("SHA256")?,
            })
        })
        .collect()
}

fn apt_cache(arguments: &[&str]) -> Result<String> {
    let output = Command::new("apt-cache")
        .args(arguments)
        .output()
        .context("cannot start apt-cache: kernels are fetched from Debian's archive; elsewhere --image takes a kernel")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Package {
    /// Downloads the package into `dir`, checks its hash, and returns the file's path.
    ///
    /// # Errors
    /// When apt-get fails, or the file is not the one that the index names.
    pub(super) fn download(&self, dir: &Path) -> Result<PathBuf> {
        eprintln!("==> fetching {} {}", self.name, self.version);
        let output = Command::new("apt-get")
            .current_dir(dir)
            .args(["-qq", "download"])
            .arg(format!("{}={}", self.name, self.version))
            .output()
            .context("cannot start apt-get")?;
        ensure!(
            output.status.success(),
            "apt-get download {}={} failed (apt-get update, if the index is old): {}",
            self.name,
            self.version,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let file = only_file(dir)?;
        let content = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        let found = sha256(&content);
        ensure!(
            found == self.sha256,
            "{} {} has the SHA-256 {found}, and not {}: not used",
            self.name,
            self.version,
            self.sha256
        );
        Ok(file)
    }
}

fn only_file(dir: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry?.path()),
        _ => bail!("apt-get download left not one file in {}", dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::pin::of_series;

    const INDEX: &str = "Package: linux-image-6.1.0-57-cloud-amd64
Source: linux-signed-amd64 (6.1.192+3)
Version: 6.1.192-3
Description: Linux 6.1 for x86-64 cloud (signed)
 The Linux kernel 6.1.
Filename: pool/linux-image-6.1.0-57-cloud-amd64_6.1.192-3_amd64.deb
SHA256: 4fdd0172a8c3f41a97e92465b2ac1867e1c10d82d7aeed3d26ee7a5d14df1754

Package: installed-without-hash
Version: 1

";

    #[test]
    fn packages_are_read_from_an_index() {
        let packages = parse_index(INDEX);
        assert_eq!(packages.len(), 1, "{packages:?}");
        assert_eq!(packages[0].version, "6.1.192-3");
        assert!(parse_index("").is_empty());
    }

    #[test]
    fn a_package_is_the_pinned_one_by_name_version_and_hash() {
        let pin = of_series("6.1").unwrap();
        let pinned = Package {
            name: pin.package(),
            version: pin.version.to_owned(),
            sha256: pin.sha256.to_owned(),
        };
        assert!(is_pinned(pin, &pinned));
        for other in [
            Package {
                version: "6.1.1-1".to_owned(),
                ..pinned.clone()
            },
            Package {
                sha256: "0".repeat(64),
                ..pinned.clone()
            },
        ] {
            assert!(!is_pinned(pin, &other), "{other:?}");
        }
    }

    #[test]
    fn the_newest_of_a_series_is_by_number_not_by_text() {
        let pin = of_series("6.1").unwrap();
        let names = "linux-image-6.1.0-9-cloud-amd64\nlinux-image-6.1.0-58-cloud-amd64\n\
            linux-image-6.1.0-99-amd64\nlinux-image-6.12.117+deb12-cloud-amd64\n";
        assert_eq!(newest(pin, names), Some("linux-image-6.1.0-58-cloud-amd64"));
        assert_eq!(newest(pin, ""), None);
    }
}
