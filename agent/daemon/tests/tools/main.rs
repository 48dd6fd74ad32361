//! The tools as people run them: processes with a command line, signals and exit codes, against an
//! agent that the test plays. No root is needed: nobody makes an interface here.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod agent;
mod bounds;
mod command_line;
mod connect;
mod endpoint;
mod support;
