//! `cargo xtask vm`: runs a command on another Linux kernel, in a virtual machine that has this machine's files.
//!
//! The guest's root is this machine's root, read-only, below an overlay in the guest's memory: a command finds its programs,
//! the checkout and `target/` where they are here, may write everywhere, and changes nothing here. It runs as root.
//!
//! ```text
//!  host                                          guest
//!  xtask vm ── qemu ── kernel, initramfs ─────►  init.sh: modules, mounts, overlay, switch_root
//!     │ ▲                                        xtask vm-guest, process 1: starts the command
//!     │ └─ frames (channel.rs), virtio-serial ─  its stdout, its stderr, its exit status
//!     └─ virtiofsd (or 9p): / read-only
//! ```
//!
//! Invariants:
//! - Output is exact: stdout is the command's and nothing else. stderr has the command's bytes unchanged, between whole lines
//!   of this program (`==> …`). The kernel's console is kept apart: it is shown in errors, and with `--console`.
//! - A run has no files of its own on the host: sockets and the initramfs are open descriptors without names. What is cached
//!   ([`cache`]) appears whole or not at all.
//! - QEMU dies with this process, whatever ends it; virtiofsd ends with QEMU's connection.

mod accelerator;
mod archive;
mod cache;
mod channel;
mod check;
mod child;
mod environment;
mod guest;
mod host_files;
mod initramfs;
mod interruption;
mod kernel;
mod machine;
mod modules;
mod pin;
mod session;

use std::{ops::RangeInclusive, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::Args;

use self::{
    accelerator::{Accelerator, Choice},
    guest::Task,
    host_files::HostFiles,
    kernel::Kernel,
    machine::Machine,
    pin::Pin,
    session::Terms,
};
pub(crate) use self::{
    check::check,
    guest::main as guest_main,
    pin::{DEFAULT_SERIES, all_series},
};
use crate::packages;

/// A week, in seconds.
const LONGEST_TIMEOUT: u64 = 7 * 24 * 3600;

/// Debian's kernels and the initramfs do not start in less than the first.
const MEMORY_MIB: RangeInclusive<u32> = 256..=1 << 20;

/// The arguments of `cargo xtask vm`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Arguments {
    /// Debian's cloud kernel of this series, fetched on first use: 6.1 or 6.12.
    #[arg(long, value_name = "SERIES", default_value = DEFAULT_SERIES, value_parser = pin::of_series)]
    kernel: &'static Pin,
    /// Another kernel: a bzImage. Without --modules it must have overlay, virtio_pci, virtio_console and virtiofs (or 9p)
    /// built in.
    #[arg(long, value_name = "PATH", conflicts_with = "kernel")]
    image: Option<PathBuf>,
    /// The modules of --image: a folder as /lib/modules/VERSION, with modules.dep in it.
    #[arg(long, value_name = "DIR", requires = "image")]
    modules: Option<PathBuf>,
    /// The guest's memory in MiB; half of it may hold files that the command writes.
    #[arg(long, value_name = "MIB", default_value_t = 2048,
        value_parser = clap::value_parser!(u32).range(i64::from(*MEMORY_MIB.start())..=i64::from(*MEMORY_MIB.end())))]
    memory: u32,
    /// End the machine and fail after this many seconds, the start included.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600,
        value_parser = clap::value_parser!(u64).range(1..=LONGEST_TIMEOUT))]
    timeout: u64,
    /// How the guest's processor is made; `auto` takes KVM where it works.
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    accelerator: Choice,
    /// How the guest sees this machine's files; `auto` takes virtiofs where virtiofsd is installed and we are root.
    #[arg(long, value_enum, default_value_t = host_files::Choice::Auto)]
    files: host_files::Choice,
    /// Show the kernel's console on stderr while it runs.
    #[arg(long)]
    console: bool,
    /// The command and its arguments; it runs as root in the current directory, with an empty standard input.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Installs what virtual machines need, and fetches the kernels of these series: what is there already is left alone.
///
/// # Errors
/// When something cannot be installed or fetched.
pub(crate) fn provide(series: impl IntoIterator<Item = &'static str>) -> Result<()> {
    packages::ensure(packages::VM)?;
    for series in series {
        let pin = pin::of_series(series).map_err(anyhow::Error::msg)?;
        cache::kernel(pin)?;
    }
    Ok(())
}

/// Boots the kernel, runs the command in it, and returns the command's exit status.
///
/// # Errors
/// When something is missing on this machine, or the guest does not get as far as the command's end.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    packages::ensure(packages::VM)?;
    let kernel = match &arguments.image {
        Some(image) => Kernel::of_image(image, arguments.modules.as_deref())?,
        None => cache::kernel(arguments.kernel)?,
    };
    let accelerator = Accelerator::choose(arguments.accelerator)?;
    let files = HostFiles::choose(arguments.files)?;
    let task = Task::of_caller(&arguments.command, accelerator)?;
    let initramfs = initramfs::build(&kernel, &files, &task)
        .with_context(|| format!("make the initramfs for {kernel}{}", kernel.remedy()))?;
    let machine = Machine {
        kernel: &kernel,
        initramfs,
        accelerator,
        files,
        memory_mib: arguments.memory,
    };
    let terms = Terms {
        limit: Duration::from_secs(arguments.timeout),
        console: arguments.console,
    };
    // Until here a signal ends this process as any other. A run's threads start after this and inherit the mask.
    let signals = interruption::block()?;
    session::run(&machine, terms, signals)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn the_time_of_a_run_is_one_that_clocks_can_add() {
        let parse =
            |seconds: &str| Line::try_parse_from(["vm", "--timeout", seconds, "--", "true"]);
        assert_eq!(parse("604800").unwrap().arguments.timeout, LONGEST_TIMEOUT);
        for wrong in ["0", "604801", "18446744073709551615"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("1..=604800"), "{error}");
        }
    }
}
