//! Kernels that were fetched, kept outside of the checkout: `${XDG_CACHE_HOME:-~/.cache}/proxy-nsmgr/vm/<package>_<version>/`.
//!
//! An entry is made under another name and renamed when it is whole. One run at a time fetches, under a lock on a file that
//! the kernel releases with the process; so whatever has a temporary name while the lock is held was left by a run that was
//! killed, and is removed.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{archive, kernel::Kernel, pin::Pin};

/// How names of unfinished entries begin.
const UNFINISHED: &str = ".unfinished-";

/// The kernel of a pin, fetched if it is not in the cache.
///
/// # Errors
/// When it cannot be fetched or unpacked.
pub(super) fn kernel(pin: &Pin) -> Result<Kernel> {
    let dir = directory()?;
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let pinned = dir.join(entry_name(&pin.package(), pin.version));
    ensure!(
        pinned.is_dir() || !pinned.exists(),
        "{} is no directory: remove it, and the kernel is fetched",
        pinned.display()
    );
    if pinned.is_dir() {
        return Kernel::of_package(&pinned);
    }
    let _lock = lock(&dir)?;
    if pinned.is_dir() {
        return Kernel::of_package(&pinned);
    }
    remove_unfinished(&dir)?;
    let entry_of =
        |package: &archive::Package| dir.join(entry_name(&package.name, &package.version));
    let package = archive::find(pin, |package| entry_of(package).is_dir())?;
    let entry = entry_of(&package);
    if !entry.is_dir() {
        fetch(&package, &dir, &entry)?;
    }
    Kernel::of_package(&entry)
}

/// The name of a package's entry.
fn entry_name(package: &str, version: &str) -> String {
    format!("{package}_{version}")
}

fn directory() -> Result<PathBuf> {
    crate::cache::directory("vm")
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    file.lock()
        .with_context(|| format!("lock {}", path.display()))?;
    Ok(file)
}

fn remove_unfinished(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            fs::remove_dir_all(entry.path())
                .with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn fetch(package: &archive::Package, dir: &Path, entry: &Path) -> Result<()> {
    let unfinished = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(dir)
        .with_context(|| format!("make a directory in {}", dir.display()))?;
    let download = unfinished.path().join("download");
    fs::create_dir(&download).with_context(|| format!("create {}", download.display()))?;
    let file = package.download(&download)?;
    let files = unfinished.path().join("files");
    run(Command::new("dpkg-deb").arg("-x").args([&file, &files]))?;
    let release = super::kernel::release_in(&files)?;
    // Debian runs it when the package is installed.
    run(Command::new("depmod").arg("-b").arg(&files).arg(release))?;
    fs::rename(&files, entry).with_context(|| format!("rename to {}", entry.display()))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_run_left_is_removed_and_entries_stay() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".unfinished-x/files", "linux_1/boot"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let _lock = lock(dir.path()).unwrap();
        remove_unfinished(dir.path()).unwrap();
        assert!(!dir.path().join(".unfinished-x").exists());
        assert!(dir.path().join("linux_1/boot").exists());
    }
}
