//! How the guest sees the host's files: virtiofs, whose server is a process of its own, or 9p by QEMU itself.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use nix::{
    errno::Errno,
    libc,
    sched::{CloneFlags, unshare},
};

use super::child::{Child, fd_argument};
use crate::packages;

/// The user's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Choice {
    Auto,
    Virtiofs,
    #[value(name = "9p")]
    Plan9,
}

/// How the host's root reaches the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HostFiles {
    /// By this virtiofsd.
    Virtiofs(PathBuf),
    Plan9,
}

/// Where distributions put virtiofsd, which is not in PATH: Debian 12; Debian 13, Fedora and others.
const VIRTIOFSD: &[&str] = &["/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd"];

impl HostFiles {
    /// Takes virtiofs where it works, unless the user has chosen.
    ///
    /// # Errors
    /// When virtiofs is demanded and cannot be had.
    pub(super) fn choose(choice: Choice) -> Result<Self> {
        let virtiofsd = VIRTIOFSD.iter().map(Path::new).find(|path| path.is_file());
        match (choice, virtiofsd) {
            (Choice::Plan9, _) => Ok(Self::Plan9),
            // Without root virtiofsd cannot open files by handle, nor change its root.
            (Choice::Auto | Choice::Virtiofs, Some(path)) if packages::is_root() => {
                Ok(Self::Virtiofs(path.to_owned()))
            }
            (Choice::Auto, _) => Ok(Self::Plan9),
            (Choice::Virtiofs, None) => bail!(
                "there is no virtiofsd, neither as {} (Debian: apt-get install virtiofsd); --files 9p does without",
                VIRTIOFSD.join(" nor as ")
            ),
            (Choice::Virtiofs, Some(path)) => {
                bail!("{} needs root; --files 9p does without", path.display())
            }
        }
    }

    /// The modules that mount it.
    pub(super) fn modules(&self) -> &'static [&'static str] {
        match self {
            Self::Virtiofs(_) => &["virtiofs"],
            Self::Plan9 => &["9pnet_virtio", "9p"],
        }
    }

    /// The value of `vm.files=`, by which init.sh chooses how to mount.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Virtiofs(_) => "virtiofs",
            Self::Plan9 => "9p",
        }
    }

    /// Starts the server if there is one.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn serve(&self) -> Result<Option<Server>> {
        let Self::Virtiofs(program) = self else {
            return Ok(None);
        };
        let (listener, connection) = connected_listener().context("make a socket for virtiofsd")?;
        let listener = OwnedFd::from(listener);
        let mut command = Command::new(program);
        command
            .arg(format!("--fd={}", fd_argument(&listener)))
            .args(["-o", "source=/", "-o", "sandbox=chroot"])
            // The guest asks once for what it has read: changes by the host meanwhile may go unnoticed.
            .args(["-o", "cache=always", "-o", "log_level=err"])
            .arg("--thread-pool-size=4")
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        make_read_only(&mut command);
        let child = Child::spawn("virtiofsd", command, vec![listener]).context(
            "virtiofsd, with this machine's mounts read-only, so that the guest cannot write to them (--files 9p does without)",
        )?;
        Ok(Some(Server {
            child,
            connection: connection.into(),
        }))
    }

    /// QEMU's arguments for it.
    pub(super) fn arguments(&self, server: Option<&Server>, memory_mib: u32) -> Vec<String> {
        let arguments: Vec<String> = match server {
            Some(server) => vec![
                // virtiofsd writes into the guest's memory.
                "-object".into(),
                format!("memory-backend-memfd,id=memory,size={memory_mib}M,share=on"),
                "-numa".into(),
                "node,memdev=memory".into(),
                "-chardev".into(),
                format!("socket,id=files,fd={}", fd_argument(&server.connection)),
                "-device".into(),
                "vhost-user-fs-pci,queue-size=1024,chardev=files,tag=host".into(),
            ],
            None => vec![
                "-fsdev".into(),
                "local,id=files,path=/,security_model=none,readonly=on,multidevs=remap".into(),
                "-device".into(),
                "virtio-9p-pci,fsdev=files,mount_tag=host".into(),
            ],
        };
        arguments
    }
}

/// A running virtiofsd, and the connection to it that QEMU is given.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) child: Child,
    pub(super) connection: OwnedFd,
}

/// A listening socket and a connection that waits in its queue. The socket's name is gone when this returns, so nobody else
/// can connect: whoever could would have all files of this machine.
fn connected_listener() -> io::Result<(UnixListener, UnixStream)> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path)?;
    let connection = UnixStream::connect(&path)?;
    dir.close()?;
    Ok((listener, connection))
}

/// Gives the command a view of the files in which all mounts are read-only. The guest mounts them read-only already; this
/// holds also for a guest that would not: it is root there, and may mount them again. Where the kernel cannot do this (before
/// 5.12) or may not (in a container), the command does not start.
fn make_read_only(command: &mut Command) {
    let read_only = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: runs between fork and exec; unshare and mount_setattr are bare system calls, and the structure that the second
    // reads is the closure's own, of the size that is given.
    unsafe {
        command.pre_exec(move || {
            unshare(CloneFlags::CLONE_NEWNS)?;
            let result = libc::syscall(
                libc::SYS_mount_setattr,
                libc::AT_FDCWD,
                c"/".as_ptr(),
                libc::AT_RECURSIVE,
                &raw const read_only,
                size_of::<libc::mount_attr>(),
            );
            Errno::result(result).map(drop)?;
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_waits_at_a_socket_without_a_name() {
        let (listener, connection) = connected_listener().unwrap();
        let address = listener.local_addr().unwrap();
        assert!(!address.as_pathname().unwrap().exists());
        let (accepted, _) = listener.accept().unwrap();
        drop(connection);
        let mut nothing = Vec::new();
        io::Read::read_to_end(&mut &accepted, &mut nothing).unwrap();
        assert!(nothing.is_empty());
    }
}
