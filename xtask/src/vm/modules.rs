//! The modules that the guest needs before it has a root, in the order in which they are loaded.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// A module's file, unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// Reads the wanted modules of a kernel with all that they depend on; what is built into the kernel is left out.
///
/// # Errors
/// When the kernel has one neither as a module nor built in, or a file cannot be read or unpacked.
pub(super) fn load(dir: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let (dependencies, built_in) = (read("modules.dep")?, read("modules.builtin")?);
    let index = Index::parse(&dependencies, &built_in);
    let files = index
        .load_order(wanted)
        .with_context(|| format!("modules of {}", dir.display()))?;
    files
        .into_iter()
        .map(|file| {
            Ok(Module {
                name: name_of(file),
                content: unpack(&dir.join(file))?,
            })
        })
        .collect()
}

/// What depmod wrote about a kernel's modules.
#[derive(Debug, Default)]
struct Index<'a> {
    /// File and dependencies' files by the module's name.
    modules: BTreeMap<String, (&'a str, Vec<&'a str>)>,
    built_in: Vec<String>,
}

impl<'a> Index<'a> {
    /// Reads `modules.dep` (`FILE: DEPENDENCY…`) and `modules.builtin` (a file a line).
    fn parse(dependencies: &'a str, built_in: &str) -> Self {
        let modules = dependencies.lines().filter_map(|line| {
            let (file, needed) = line.split_once(':')?;
            Some((name_of(file), (file, needed.split_whitespace().collect())))
        });
        Self {
            modules: modules.collect(),
            built_in: built_in.lines().map(name_of).collect(),
        }
    }

    /// The files of the modules and of what they need, each once, after those that it needs.
    fn load_order(&self, wanted: &[&str]) -> Result<Vec<&'a str>> {
        let mut order: Vec<&str> = Vec::new();
        for &name in wanted {
            let Some((file, needed)) = self.modules.get(name) else {
                ensure!(
                    self.built_in.iter().any(|built_in| built_in == name),
                    "this kernel has no {name}, neither as a module nor built in{}",
                    reason(name)
                );
                continue;
            };
            // depmod lists them so that the last must be loaded first.
            for &file in needed.iter().rev().chain([file]) {
                if !order.contains(&file) {
                    order.push(file);
                }
            }
        }
        Ok(order)
    }
}

/// Why a module is wanted that Debian's cloud kernels lack.
fn reason(name: &str) -> &'static str {
    if name.starts_with("9p") {
        "; files come by 9p where virtiofs cannot be had: run as root with virtiofsd (in Debian 13 the package of that name), to have them so"
    } else {
        ""
    }
}

/// A module's name by its file: `kernel/net/9p/9pnet_virtio.ko.xz` is `9pnet_virtio`. Kernels take `-` for `_` in names.
fn name_of(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

fn unpack(file: &PathBuf) -> Result<Vec<u8>> {
    let extension = file.extension().unwrap_or_default();
    let program = match extension.to_str() {
        Some("ko") => return fs::read(file).with_context(|| format!("read {}", file.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{}: unknown compression", file.display()),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(file)
        .output()
        .with_context(|| format!("cannot start {program}, which unpacks {}", file.display()))?;
    ensure!(
        output.status.success(),
        "{program} -dc {} failed: {}",
        file.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str =
        "kernel/fs/9p/9p.ko.xz: kernel/fs/netfs/netfs.ko.xz kernel/net/9p/9pnet.ko.xz
kernel/fs/netfs/netfs.ko.xz:
kernel/net/9p/9pnet.ko.xz:
kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz
kernel/lib/crc-t10dif.ko.xz:
";

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let index = Index::parse(DEPENDENCIES, "kernel/drivers/virtio/virtio_pci.ko\n");
        let order = index.load_order(&["virtio_pci", "9p", "9pnet_virtio"]);
        assert_eq!(
            order.unwrap(),
            [
                "kernel/net/9p/9pnet.ko.xz",
                "kernel/fs/netfs/netfs.ko.xz",
                "kernel/fs/9p/9p.ko.xz",
                "kernel/net/9p/9pnet_virtio.ko.xz"
            ]
        );
    }

    #[test]
    fn a_module_that_is_nowhere_is_named() {
        let error = Index::default().load_order(&["virtiofs"]).unwrap_err();
        assert!(error.to_string().contains("no virtiofs"), "{error}");
    }

    #[test]
    fn names_are_as_the_kernel_has_them() {
        assert_eq!(name_of("kernel/lib/crc-t10dif.ko.xz"), "crc_t10dif");
        assert_eq!(name_of("overlay.ko"), "overlay");
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("a.ko");
        fs::write(&plain, "module").unwrap();
        assert_eq!(unpack(&plain).unwrap(), b"module");
        assert!(unpack(&dir.path().join("a.zip")).is_err());
    }
}
