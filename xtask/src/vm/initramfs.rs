//! The initramfs: a static busybox, `init.sh`, modules, and this program with its task. A cpio archive of the format "newc"
//! (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst), not compressed: QEMU puts it into memory.

use std::{
    fs::{self, File},
    io::{Seek as _, Write as _},
    os::unix::ffi::OsStrExt as _,
};

use anyhow::{Context as _, Result, ensure};

use super::{guest::Task, host_files::HostFiles, kernel::Kernel, modules};
use crate::packages;

const INIT: &[u8] = include_bytes!("guest/init.sh");

/// What init.sh calls.
const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "cp",
    "echo",
    "hostname",
    "insmod",
    "ip",
    "ln",
    "mkdir",
    "mount",
    "poweroff",
    "rm",
    "switch_root",
    "uname",
];

/// Where init.sh mounts.
const MOUNT_POINTS: &[&str] = &["proc", "sys", "dev", "host", "written", "new"];

/// What every root needs, whichever way the host's files come.
const MODULES: &[&str] = &["virtio_pci", "virtio_console", "overlay"];

/// Modes of the archive's entries: file type and permissions.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// Makes the initramfs in a file without a name.
///
/// # Errors
/// When the kernel lacks a module, or a file cannot be read or written.
pub(super) fn build(kernel: &Kernel, files: &HostFiles, task: &Task) -> Result<File> {
    let mut archive = Archive::default();
    for directory in ["bin", "modules", "guest"].iter().chain(MOUNT_POINTS) {
        archive.add(directory, DIRECTORY, b"");
    }
    archive.add("init", PROGRAM, INIT);
    archive.add("bin/busybox", PROGRAM, &busybox()?);
    for applet in APPLETS {
        archive.add(&format!("bin/{applet}"), LINK, b"busybox");
    }
    if let Some(dir) = &kernel.modules {
        let wanted = [MODULES, files.modules()].concat();
        for (n, module) in modules::load(dir, &wanted)?.iter().enumerate() {
            let name = format!("modules/{n:02}-{}.ko", module.name);
            archive.add(&name, FILE, &module.content);
        }
        archive.add("modules-dir", LINK, dir.as_os_str().as_bytes());
    }
    // By this name it is the program that runs, also when a build has replaced its file meanwhile.
    let program = fs::read("/proc/self/exe").context("read this program")?;
    archive.add("guest/xtask", PROGRAM, &program);
    archive.add("guest/task.json", FILE, &serde_json::to_vec(task)?);
    let mut file = tempfile::tempfile().context("make a temporary file")?;
    file.write_all(&archive.finish())
        .and_then(|()| file.rewind())
        .context("write a temporary file")?;
    Ok(file)
}

/// The busybox of the host, which must need no library.
fn busybox() -> Result<Vec<u8>> {
    let path = packages::path_of("busybox").context("busybox is not in PATH")?;
    let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let dynamic = content.windows(LOADER.len()).any(|window| window == LOADER);
    ensure!(
        !dynamic,
        "{} is not static: apt-get install busybox-static",
        path.display()
    );
    Ok(content)
}

/// How the name of glibc's loader begins, which only programs with shared libraries name.
const LOADER: &[u8] = b"/ld-linux";

/// A cpio archive that grows.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        self.entry(name, [self.entries, mode, 0, 0, links], content);
    }

    /// `fields` are inode, mode, user, group and number of links.
    fn entry(&mut self, name: &str, fields: [u32; 5], content: &[u8]) {
        let size = u32::try_from(content.len()).expect("files of an initramfs are below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        self.bytes.extend(b"070701");
        let rest = [0, size, 0, 0, 0, 0, name_size, 0];
        for field in fields.into_iter().chain(rest) {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Names and contents end at multiples of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", [0, 0, 0, 0, 1], b"");
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_headers_names_and_padded_contents() {
        let mut archive = Archive::default();
        archive.add("init", PROGRAM, b"hello");
        let bytes = archive.finish();
        let header = String::from_utf8(bytes[..110].to_vec()).unwrap();
        assert_eq!(
            header,
            "070701\
             00000001000081ed00000000000000000000000100000000\
             0000000500000000000000000000000000000000\
             0000000500000000"
        );
        // The header and the name with its zero take 115 bytes.
        assert_eq!(&bytes[110..116], b"init\0\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert!(bytes.ends_with(b"TRAILER!!!\0\0\0\0"), "{bytes:?}");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn the_script_calls_only_what_is_there() {
        let script = std::str::from_utf8(INIT).unwrap();
        let commands = script
            .lines()
            .map(str::trim_start)
            .filter_map(|line| line.split_whitespace().next());
        let known = ["mount", "mkdir", "ln", "cp", "rm", "ip", "hostname"];
        for command in commands.filter(|command| known.contains(command)) {
            assert!(APPLETS.contains(&command), "{command}");
        }
        for point in MOUNT_POINTS {
            assert!(script.contains(&format!("/{point}")), "{point}");
        }
    }
}
