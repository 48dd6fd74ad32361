//! The project's commands.

mod ebpf;

use anyhow::Result;
use clap::Parser;

/// The project's commands.
#[derive(Parser)]
enum Command {
    /// Build the BPF object and its manifest.
    BuildEbpf,
    /// Check that the committed BPF object belongs to its sources.
    CheckEbpf {
        /// Also rebuild it and compare every byte.
        #[arg(long)]
        rebuild: bool,
    },
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::BuildEbpf => ebpf::build(),
        Command::CheckEbpf { rebuild } => ebpf::check(rebuild),
    }
}
