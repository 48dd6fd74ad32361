//! The project's commands, as `cargo xtask COMMAND`.

mod bench;
mod cache;
mod cargo;
mod chaos;
mod ci;
mod demo;
mod deny;
mod dependencies;
mod digest;
mod ebpf;
mod fuzz;
mod interop;
mod packages;
mod steps;
mod test;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// The project's commands.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
enum Command {
    /// Build the BPF object and its manifest.
    BuildEbpf,
    /// Check that the committed BPF object belongs to its sources, and that the oldest promised kernel can take it.
    CheckEbpf {
        /// Also rebuild it and compare every byte.
        #[arg(long)]
        rebuild: bool,
    },
    /// Check that no crate imports what it must not.
    CheckDependencies,
    /// Check bans, licences, sources and advisories of all dependencies, by the rules of deny.toml.
    Deny,
    /// Show a client of one domain that pings an endpoint of another.
    Demo(demo::Arguments),
    /// Break three domains in all ways that a seed draws, and check what must hold meanwhile.
    Chaos(chaos::Arguments),
    /// Fuzz the parsers of bytes that others choose, or replay an input (needs a C++ compiler).
    Fuzz(fuzz::Arguments),
    /// Test our agents against the real Network Service Mesh (needs Go).
    Interop {
        /// Only tests whose names match, as `go test -run` takes it.
        pattern: Option<String>,
    },
    /// Run all tests; without root those that need none, and say which were left out.
    Test,
    /// Measure the numbers to hold: set-up time, calls a second, throughput, BPF, memory, and the decisions.
    Bench(bench::Arguments),
    /// Run a command on another Linux kernel: in a virtual machine with this machine's files, which it cannot change.
    Vm(vm::Arguments),
    /// The first process of that machine.
    #[command(hide = true)]
    VmGuest,
    /// What CI does: format, lints, documentation, dependency rules, `cargo deny`, the BPF object, all tests, fuzzing, the demo and the source check on each kernel.
    Ci,
}

fn main() -> Result<ExitCode> {
    let done = match Command::parse() {
        Command::BuildEbpf => ebpf::build(),
        Command::CheckEbpf { rebuild } => ebpf::check(rebuild),
        Command::CheckDependencies => dependencies::check(),
        Command::Deny => deny::run(),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Chaos(arguments) => chaos::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
        Command::Interop { pattern } => interop::run(pattern.as_deref()),
        Command::Test => test::run(),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Vm(arguments) => return vm::run(&arguments),
        Command::VmGuest => vm::guest_main(),
        Command::Ci => ci::run(),
    };
    done.map(|()| ExitCode::SUCCESS)
}
