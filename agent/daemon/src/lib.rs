//! `proxy-nsmgr`: the interdomain node agent of Network Service Mesh, and its tools for people.
//!
//! `agent` is the product; `connect` and `endpoint` are an NSM v1 client and endpoint that a person
//! can run by hand, with nothing but the wire API between them and the agent; `status` shows
//! a running agent, and `drain` ends one for good.

#![forbid(unsafe_code)]

mod agent;
mod cli;
mod config;
mod connect;
mod drain;
mod endpoint;
pub mod files;
mod health;
mod identity;
mod logging;
mod netns;
mod observe;
mod run;
mod tool;
mod view;

use std::process::ExitCode;

use clap::Parser as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    cli::{AgentArgs, Cli, Command},
    config::{Config, Inputs},
};

/// The program: reads the command line and does what it asks for.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match execute(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy-nsmgr: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Agent(args) => agent(*args),
        Command::Connect(args) => one_thread()?.block_on(connect::run(&args)),
        Command::Endpoint(args) => one_thread()?.block_on(endpoint::run(&args)),
        Command::Status(args) => one_thread()?.block_on(observe::status::run(&args)),
        Command::Drain(args) => one_thread()?.block_on(drain::run(&args)),
        Command::Identity(args) => one_thread()?.block_on(observe::status::run_identity(&args)),
        Command::Health(args) => one_thread()?.block_on(health::run(&args)),
    }
}

fn agent(args: AgentArgs) -> anyhow::Result<()> {
    if args.print_config_schema {
        return tool::print_line(&config::schema());
    }
    let inputs = Inputs {
        file: args.config,
        environment: std::env::vars_os().collect(),
        flags: args.keys,
    };
    let loaded = Config::load(&inputs)?;
    if args.print_config {
        return tool::print_line(loaded.to_yaml().trim_end());
    }
    let log = logging::start(&loaded.config.log)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    raise_open_files();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(worker_threads())
        .enable_all()
        .build()?
        .block_on(run::run(loaded.config, inputs, log))
}

/// Every client holds a descriptor, and every namespace that one passes. The usual soft limit of 1024 is for programs that use
/// select(2); this one may have what the system allows.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| (soft, hard))
    });
    match raised {
        Ok((soft, hard)) => tracing::debug!(soft, hard, "raised the limit of open files"),
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files"),
    }
}

/// Half of the processors, at most four: the node is there for others, and the agent waits more than it computes. On two processors a
/// Request costs a sixth less processor time on one thread than on two that wake each other; blocking work (netlink, loading BPF) has
/// threads of its own.
fn worker_threads() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (processors / 2).clamp(1, 4)
}

/// The tools wait for one peer most of the time: one thread is enough.
fn one_thread() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}
