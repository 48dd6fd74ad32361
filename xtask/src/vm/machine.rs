//! The virtual machine: QEMU's command line, and the processes that it is.

use std::{
    ffi::OsString,
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, Result};

use super::{
    accelerator::{Accelerator, QEMU},
    channel,
    child::{Child, fd_argument, fd_path},
    host_files::{HostFiles, Server},
    kernel::Kernel,
};

/// As the machines have that CI runs on.
const PROCESSORS: &str = "2";

/// What a machine is made of.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: File,
    pub(super) accelerator: Accelerator,
    pub(super) files: HostFiles,
    pub(super) memory_mib: u32,
}

/// A machine that runs. Dropping it ends it: QEMU first.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) qemu: Child,
    files: Option<Child>,
    /// Where the guest's frames come from.
    pub(super) channel: Option<UnixStream>,
    /// The kernel's console.
    pub(super) console: Option<ChildStdout>,
}

impl Running {
    /// What QEMU wrote to standard error, else what virtiofsd did: virtiofsd writes an error whenever QEMU ends.
    pub(super) fn stderr_text(&self) -> Option<String> {
        let files = || self.files.as_ref()?.stderr_text();
        self.qemu.stderr_text().or_else(files)
    }
}

impl Machine<'_> {
    /// Starts it.
    ///
    /// # Errors
    /// When QEMU or virtiofsd cannot be started.
    pub(super) fn start(&self) -> Result<Running> {
        let server = self.files.serve()?;
        let (ours, theirs) = UnixStream::pair().context("make a socket pair")?;
        let channel = OwnedFd::from(theirs);
        let initramfs = self.initramfs.try_clone().context("copy a descriptor")?;
        let initramfs = OwnedFd::from(initramfs);
        let mut command = Command::new(QEMU);
        command
            .args(self.accelerator.arguments())
            .args(["-smp", PROCESSORS, "-m", &format!("{}M", self.memory_mib)])
            // No network and no default devices; a reboot ends the machine.
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", "stdio", "-device", "virtio-serial-pci"])
            .arg("-chardev")
            .arg(format!("socket,id=channel,fd={}", fd_argument(&channel)))
            .arg("-device")
            .arg(format!(
                "virtserialport,chardev=channel,name={}",
                channel::PORT
            ))
            .args(self.files.arguments(server.as_ref(), self.memory_mib))
            .arg("-kernel")
            .arg(&self.kernel.image)
            .args([OsString::from("-initrd"), fd_path(&initramfs)])
            .args(["-append", &kernel_arguments(self.accelerator, &self.files)])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut inherited = vec![channel, initramfs];
        let files = server.map(|Server { child, connection }| {
            inherited.push(connection);
            child
        });
        let mut qemu = Child::spawn("qemu", command, inherited)?;
        Ok(Running {
            console: qemu.stdout(),
            qemu,
            files,
            channel: Some(ours),
        })
    }
}

/// The kernel's command line.
fn kernel_arguments(accelerator: Accelerator, files: &HostFiles) -> String {
    // An oops is a finding, so it ends the machine, and a panic does at once. Errors are shown on the console, all else not.
    format!(
        "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic random.trust_cpu=on vm.files={}{}",
        files.name(),
        accelerator.kernel_arguments()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_has_how_files_come_and_what_emulation_needs() {
        let emulated = kernel_arguments(Accelerator::Tcg, &HostFiles::Plan9);
        assert!(emulated.contains(" vm.files=9p "), "{emulated}");
        assert!(emulated.contains(" nowatchdog"), "{emulated}");
        let real = kernel_arguments(Accelerator::Kvm, &HostFiles::Virtiofs("/v".into()));
        assert!(real.ends_with(" vm.files=virtiofs"), "{real}");
        assert!(!real.contains("mitigations"), "{real}");
    }
}
