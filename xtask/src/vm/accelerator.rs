//! How the guest's processor is made: by the host's (KVM), or by QEMU's emulation (TCG).

use std::{
    fs::{self, File},
    io::{Seek as _, Write as _},
    os::fd::OwnedFd,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use super::child::{Child, fd_path};

/// The emulator.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// The user's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Choice {
    Auto,
    Kvm,
    Tcg,
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    /// Takes KVM where it works, unless the user has chosen.
    ///
    /// # Errors
    /// When KVM is demanded and does not work.
    pub(super) fn choose(choice: Choice) -> Result<Self> {
        match choice {
            Choice::Tcg => Ok(Self::Tcg),
            Choice::Auto => Ok(if kvm_works()? { Self::Kvm } else { Self::Tcg }),
            Choice::Kvm if kvm_works()? => Ok(Self::Kvm),
            Choice::Kvm => bail!(
                "KVM does not work here: the processor shows neither vmx nor svm, or /dev/kvm runs no guest; \
                 --accelerator tcg emulates one"
            ),
        }
    }

    /// QEMU's arguments for it.
    pub(super) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    /// The kernel's arguments for it.
    pub(super) fn kernel_arguments(self) -> &'static str {
        match self {
            Self::Kvm => "",
            // Mitigations cost time and protect nothing from emulated code. When the host is busy, watchdogs fire and the
            // check of the timer fails.
            Self::Tcg => " mitigations=off nowatchdog no_timer_check tsc=reliable",
        }
    }

    /// Whether the guest's processors are made by software.
    pub(super) fn is_emulation(self) -> bool {
        self == Self::Tcg
    }

    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "KVM",
            Self::Tcg => "emulated",
        }
    }
}

/// A guest that does nothing ends within milliseconds.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// Whether KVM runs guests.
///
/// A /dev/kvm may be there and not do: nested in a paravirtual machine it interprets instructions one by one, and stops at
/// those of newer processors, which kernels are full of. The processor's flags show that; a guest that runs shows all else.
fn kvm_works() -> Result<bool> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualization(&cpu) || File::open("/dev/kvm").is_err() {
        return Ok(false);
    }
    let mut firmware = tempfile::tempfile().context("make a temporary file")?;
    firmware
        .write_all(&probe_firmware())
        .and_then(|()| firmware.rewind())
        .context("write a temporary file")?;
    let firmware = OwnedFd::from(firmware);
    let mut command = Command::new(QEMU);
    command
        .args(Accelerator::Kvm.arguments())
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-bios",
        ])
        .arg(fd_path(&firmware))
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut probe = Child::spawn("qemu", command, vec![firmware])?;
    let status = probe.wait(PROBE_LIMIT)?;
    Ok(status.and_then(|status| status.code()) == Some(i32::from(PROBE_STATUS)))
}

/// Whether a processor of /proc/cpuinfo has the instructions that KVM needs.
fn has_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    let mut flags = flags.into_iter().flat_map(str::split_whitespace);
    flags.any(|flag| flag == "vmx" || flag == "svm")
}

/// What the probe's guest writes to the exit device.
const PROBE_VALUE: u8 = 0x2a;

/// QEMU's exit status for it, as isa-debug-exit makes it.
const PROBE_STATUS: u8 = PROBE_VALUE << 1 | 1;

/// A firmware that ends the machine with its first instructions.
fn probe_firmware() -> Vec<u8> {
    const SIZE: usize = 64 * 1024;
    /// Where a processor begins: 16 bytes below the end.
    const RESET: usize = SIZE - 16;
    // hlt, everywhere else.
    let mut firmware = vec![0xf4; SIZE];
    // mov al, VALUE; out 0xf4, al
    firmware[RESET..RESET + 4].copy_from_slice(&[0xb0, PROBE_VALUE, 0xe6, 0xf4]);
    firmware
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_is_a_flag_of_the_processor() {
        assert!(has_virtualization("processor: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: svm\n"));
        // Another line has the word, and another flag contains it.
        assert!(!has_virtualization(
            "flags\t\t: fpu hypervisor vmx_not\nvmx flags: vmx\n"
        ));
        assert!(!has_virtualization(""));
    }
}
