//! `build-ebpf` and `check-ebpf`: the BPF object and the proof that it belongs to its sources.
//!
//! The object is committed, so that everybody else builds with a plain stable toolchain. That is honest only while object
//! and sources belong together: `manifest.json` beside it holds the hash of both. [`check`] compares them, which needs no
//! BPF toolchain; with `rebuild` it builds the object again and compares every byte, which is what CI does.
//!
//! Neither command lets an object pass that the oldest promised kernel would refuse, as far as that can be seen without one ([`lint`]).
//!
//! The bytes depend on nothing but the sources, the recipe below and the versions it names: paths are remapped, debug
//! sections are taken off (BTF stays), and everything that could leak in from the caller's environment is removed.

mod flow;
mod frames;
mod lint;
mod program;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::digest::{hex, sha256};

/// The compiler. Its LLVM must not be newer than the linker's.
const RUSTC: &str = "1.96.0";
/// The linker, and the LLVM it is built on.
const BPF_LINKER: &str = "0.13.0";
const LLVM: &str = "22";

const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "ebpf/proxy-nsmgr.bpf.o";
const MANIFEST: &str = "ebpf/manifest.json";
const PROGRAMS: &str = "ebpf/programs";
const BINARY: &str = "proxy-nsmgr";

/// What the object is made of. Tests are not.
const SOURCES: &[&str] = &[
    "ebpf/common/Cargo.toml",
    "ebpf/common/src",
    "ebpf/programs/Cargo.toml",
    "ebpf/programs/Cargo.lock",
    "ebpf/programs/src",
];

/// What turns sources into the object; part of the source hash.
///
/// v3 is the newest instruction set that the oldest promised kernel (6.1) has whole; v4 came with 6.6. LLVM's wide loads at odd offsets would suit packets, but it
/// then does the same on the stack, which the verifier refuses.
const RUSTFLAGS: &[&str] = &["-Ctarget-cpu=v3", "-Cdebuginfo=2", "-Clink-arg=--btf"];
const CARGO_ARGS: &[&str] = &[
    "build",
    "--locked",
    "--release",
    "--quiet",
    "--features",
    "bpf",
    "--bin",
    BINARY,
    "--target",
    TARGET,
    "-Zbuild-std=core",
];

/// Debian's packages: compiler, its sources (core is built for BPF), and what bpf-linker is built with.
const DEBIAN_PACKAGES: &[&str] = &[
    "rustc-web",
    "cargo-web",
    "rust-web-src",
    "rust-web-llvm",
    "llvm-22-dev",
    "libpolly-22-dev",
    "zlib1g-dev",
    "libzstd-dev",
    "libxml2-dev",
];
const DEBIAN_LLVM: &str = "/usr/lib/llvm-22";

/// What the committed object is, and what it was made from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    /// SHA-256 of the object.
    object_sha256: String,
    /// SHA-256 over [`SOURCES`] and the recipe.
    source_sha256: String,
    /// Version of rustc.
    rustc: String,
    /// Version of bpf-linker.
    bpf_linker: String,
}

/// Builds the object and its manifest into the working tree.
///
/// # Errors
///
/// When the toolchain is missing and cannot be installed here, with what to install; when the build fails; when the oldest promised
/// kernel would refuse what was built.
pub(crate) fn build() -> Result<()> {
    let root = root();
    let object = build_object(&root)?;
    lint::check(&object)?;
    let manifest = Manifest {
        object_sha256: sha256(&object),
        source_sha256: source_hash(&root)?,
        rustc: RUSTC.to_owned(),
        bpf_linker: BPF_LINKER.to_owned(),
    };
    write(&root.join(OBJECT), &object)?;
    write(
        &root.join(MANIFEST),
        (serde_json::to_string_pretty(&manifest)? + "\n").as_bytes(),
    )?;
    println!(
        "{OBJECT}: {} bytes, sha256 {}",
        object.len(),
        manifest.object_sha256
    );
    Ok(())
}

/// Compares the committed object with its manifest and the manifest with the sources; with `rebuild` also the object with
/// what the sources give now.
///
/// # Errors
///
/// When any of them differ, with both values; when the oldest promised kernel would refuse the object.
pub(crate) fn check(rebuild: bool) -> Result<()> {
    let root = root();
    let manifest = read(&root.join(MANIFEST))?;
    let manifest: Manifest = serde_json::from_slice(&manifest)
        .with_context(|| format!("{MANIFEST} is not a manifest"))?;
    let object = read(&root.join(OBJECT))?;

    let object_sha256 = sha256(&object);
    ensure!(
        object_sha256 == manifest.object_sha256,
        "{OBJECT} is not the object of its manifest: it has sha256 {object_sha256}, the manifest says {}",
        manifest.object_sha256
    );
    let source_sha256 = source_hash(&root)?;
    ensure!(
        source_sha256 == manifest.source_sha256,
        "{OBJECT} was built from other sources: they have sha256 {source_sha256} now, the manifest says {}; \
         run `cargo xtask build-ebpf` and commit what it writes",
        manifest.source_sha256
    );
    ensure!(
        manifest.rustc == RUSTC && manifest.bpf_linker == BPF_LINKER,
        "{OBJECT} was built with rustc {} and bpf-linker {}, the recipe says {RUSTC} and {BPF_LINKER}",
        manifest.rustc,
        manifest.bpf_linker
    );
    lint::check(&object)?;
    if rebuild {
        let rebuilt = build_object(&root)?;
        if rebuilt != object {
            let kept = target_dir(&root).join("rebuilt.bpf.o");
            write(&kept, &rebuilt)?;
            bail!(
                "{OBJECT} is not what its sources give: rebuilt it has sha256 {}, committed {object_sha256}; \
                 the rebuilt one is {}",
                sha256(&rebuilt),
                kept.display()
            );
        }
    }
    println!(
        "{OBJECT}: {}",
        if rebuild {
            "rebuilt, every byte the same"
        } else {
            "belongs to its sources"
        }
    );
    Ok(())
}

/// SHA-256 over the recipe and every source file: its path, its length, its bytes.
fn source_hash(root: &Path) -> Result<String> {
    let mut files = BTreeMap::new();
    for source in SOURCES {
        collect(root, Path::new(source), &mut files)?;
    }
    let mut hash = Sha256::new();
    for word in RUSTFLAGS.iter().chain(CARGO_ARGS) {
        hash.update(word);
        hash.update([0]);
    }
    for (path, bytes) in files {
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update([0]);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    Ok(hex(&hash.finalize()))
}

fn collect(root: &Path, path: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) -> Result<()> {
    let full = root.join(path);
    if !full.is_dir() {
        files.insert(path.to_owned(), read(&full)?);
        return Ok(());
    }
    for entry in fs::read_dir(&full).with_context(|| format!("cannot list {}", full.display()))? {
        collect(root, &path.join(entry?.file_name()), files)?;
    }
    Ok(())
}

/// Builds the object and takes the debug sections off.
fn build_object(root: &Path) -> Result<Vec<u8>> {
    let linker = bpf_linker()?;
    let toolchain = Toolchain::find_or_install()?;
    let target_dir = target_dir(root);
    let mut command = Command::new(&toolchain.cargo);
    command
        .current_dir(root.join(PROGRAMS))
        .args(CARGO_ARGS)
        .arg("--target-dir")
        .arg(&target_dir);
    clean_environment(&mut command);
    command
        .env("RUSTC", &toolchain.rustc)
        // build-std and the BPF target are unstable; the version is pinned, so that is no risk.
        .env("RUSTC_BOOTSTRAP", "1")
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            toolchain.rustflags(root, &linker).join("\x1f"),
        );
    run(&mut command)?;
    let built = target_dir.join(TARGET).join("release").join(BINARY);
    strip(&read(&built)?)
}

/// Removes what another invocation of cargo, or the user, set for other builds.
fn clean_environment(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let ours = [
            "CARGO_BUILD_",
            "CARGO_PROFILE_",
            "CARGO_TARGET_",
            "CARGO_PKG_",
            "CARGO_MANIFEST_",
        ];
        if ours.iter().any(|prefix| name.starts_with(prefix))
            || matches!(
                name,
                "CARGO"
                    | "CARGO_INCREMENTAL"
                    | "RUSTC_WRAPPER"
                    | "RUSTC_WORKSPACE_WRAPPER"
                    | "RUSTDOCFLAGS"
                    | "RUSTFLAGS"
                    | "RUSTUP_TOOLCHAIN"
            )
        {
            command.env_remove(name);
        }
    }
}

/// A compiler that can build for BPF.
struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    sysroot: PathBuf,
}

impl Toolchain {
    /// rustup's when it is there, else Debian's, which is installed where that is possible.
    fn find_or_install() -> Result<Self> {
        let rustup = output(Command::new("rustup").args(["which", "--toolchain", RUSTC, "rustc"]));
        if let Ok(rustc) = rustup {
            let rustc = PathBuf::from(rustc);
            if let Some(found) = Self::usable(&rustc, &rustc.with_file_name("cargo")) {
                return Ok(found);
            }
        }
        let debian = || Self::usable(Path::new("/usr/bin/rustc"), Path::new("/usr/bin/cargo"));
        if let Some(found) = debian() {
            return Ok(found);
        }
        install_debian_packages()?;
        debian().with_context(|| {
            format!("/usr/bin/rustc is not {RUSTC} with its sources, even after installing Debian's packages")
        })
    }

    fn usable(rustc: &Path, cargo: &Path) -> Option<Self> {
        let version = output(Command::new(rustc).arg("--version")).ok()?;
        if version.split(' ').nth(1) != Some(RUSTC) {
            return None;
        }
        let sysroot = PathBuf::from(output(Command::new(rustc).args(["--print", "sysroot"])).ok()?);
        let has_core = sysroot
            .join("lib/rustlib/src/rust/library/core/Cargo.toml")
            .exists();
        (has_core && cargo.exists()).then(|| Self {
            rustc: rustc.to_owned(),
            cargo: cargo.to_owned(),
            sysroot,
        })
    }

    fn rustflags(&self, root: &Path, linker: &Path) -> Vec<String> {
        let cargo_home = env::var_os("CARGO_HOME").map_or_else(
            || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"),
            PathBuf::from,
        );
        let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
        let mut flags: Vec<String> = RUSTFLAGS.iter().map(|flag| (*flag).to_owned()).collect();
        flags.push(format!("-Clinker={}", linker.display()));
        flags.push(remap(&self.sysroot.join("lib/rustlib/src/rust"), "/rust"));
        flags.push(remap(&cargo_home, "/cargo"));
        flags.push(remap(root, "/proxy-nsmgr"));
        flags
    }
}

/// The linker, of exactly the version of the recipe.
fn bpf_linker() -> Result<PathBuf> {
    if let Some(found) = find_bpf_linker() {
        return Ok(found);
    }
    if !Path::new(DEBIAN_LLVM).join("bin/llvm-config").exists() {
        install_debian_packages()?;
    }
    let features = format!("llvm-{LLVM}");
    let mut command = nsm_world::cargo();
    command.env("LLVM_PREFIX", DEBIAN_LLVM).args([
        "install",
        "bpf-linker",
        "--version",
        BPF_LINKER,
    ]);
    command.args(["--locked", "--no-default-features", "--features", &features]);
    run(&mut command)?;
    find_bpf_linker().context("bpf-linker was installed but is neither in PATH nor in cargo's bin")
}

fn find_bpf_linker() -> Option<PathBuf> {
    let cargo_bin = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .map(|home| home.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(cargo_bin)
        .map(|dir| dir.join("bpf-linker"))
        .find(|candidate| {
            output(Command::new(candidate).arg("--version"))
                .is_ok_and(|version| version.split(' ').nth(1) == Some(BPF_LINKER))
        })
}

/// Installs what is missing where that is ours to do, else says what is needed.
fn install_debian_packages() -> Result<()> {
    let packages = DEBIAN_PACKAGES.join(" ");
    let root = output(Command::new("id").arg("-u")).is_ok_and(|uid| uid == "0");
    if !root || !Path::new("/etc/debian_version").exists() {
        bail!(
            "the BPF toolchain is missing. With rustup: `rustup toolchain install {RUSTC} --profile minimal \
             --component rust-src`. On Debian, as root: `apt-get update && apt-get install {packages}`. Then \
             `LLVM_PREFIX=<LLVM {LLVM}> cargo install bpf-linker --version {BPF_LINKER} --locked \
             --no-default-features --features llvm-{LLVM}`"
        );
    }
    eprintln!("installing the BPF toolchain: {packages}");
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    run(apt().args(["update", "-q"]))?;
    run(apt()
        .args(["install", "-q", "-y", "--no-install-recommends"])
        .args(DEBIAN_PACKAGES))
}

/// Takes the debug sections off; BTF, which the kernel and bpftool read, stays.
fn strip(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder =
        object::build::elf::Builder::read(object).context("the built object is no ELF file")?;
    for section in builder.sections.iter_mut() {
        // Their relocations have names of their own: ".rel.debug_info".
        if section.name.starts_with(b".debug_") || section.name.starts_with(b".rel.debug_") {
            section.delete = true;
        }
    }
    // LLVM keeps the names of symbols and sections in one table; the writer wants two.
    let names = builder.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = object::build::elf::SectionData::SectionString;
    builder.delete_orphans();
    let mut stripped = Vec::new();
    builder
        .write(&mut stripped)
        .context("cannot write the object without its debug sections")?;
    Ok(stripped)
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        output.status
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// That of the checkout cargo runs us from: two of them may share a target directory, and then this program.
fn root() -> PathBuf {
    let xtask = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    xtask
        .parent()
        .expect("xtask is a folder of the workspace")
        .to_owned()
}

/// Apart from the caller's, which cargo may have locked while it runs us.
fn target_dir(root: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root.join("target"), PathBuf::from)
        .join("ebpf")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_object_is_stripped_and_keeps_its_types() {
        let object = fs::read(root().join(OBJECT)).unwrap();
        let builder = object::build::elf::Builder::read(object.as_slice()).unwrap();
        let names: Vec<_> = builder
            .sections
            .iter()
            .map(|section| section.name.to_vec())
            .collect();
        for wanted in [
            &b".BTF"[..],
            b".BTF.ext",
            b".maps",
            b"classifier",
            b"license",
        ] {
            assert!(
                names.iter().any(|name| name == wanted),
                "{}",
                String::from_utf8_lossy(wanted)
            );
        }
        assert!(!names.iter().any(|name| name.starts_with(b".debug_")));
        strip(b"no object").unwrap_err();
    }

    #[test]
    fn every_change_of_a_source_changes_the_hash() {
        let tree = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = tree.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for source in SOURCES {
            let is_folder = source.ends_with("/src");
            write(
                &if is_folder {
                    format!("{source}/lib.rs")
                } else {
                    (*source).to_owned()
                },
                "a",
            );
        }
        let hash = || source_hash(tree.path()).unwrap();
        let mut seen = vec![hash()];
        assert_eq!(hash(), seen[0]);
        write("ebpf/common/src/lib.rs", "b");
        seen.push(hash());
        write("ebpf/programs/src/deep/er.rs", "");
        seen.push(hash());
        write("ebpf/programs/Cargo.lock", "aa");
        seen.push(hash());
        // The same bytes, cut elsewhere.
        write("ebpf/programs/Cargo.lock", "a");
        write("ebpf/programs/Cargo.toml", "aa");
        seen.push(hash());
        let distinct: std::collections::HashSet<_> = seen.iter().collect();
        assert_eq!(distinct.len(), seen.len());

        fs::remove_file(tree.path().join("ebpf/common/Cargo.toml")).unwrap();
        let error = source_hash(tree.path()).unwrap_err();
        assert!(
            error.to_string().contains("ebpf/common/Cargo.toml"),
            "{error}"
        );
    }
}
