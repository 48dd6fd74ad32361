//! `proxy-nsmgr`: the interdomain node agent of Network Service Mesh, and its tools for people.

#![forbid(unsafe_code)]

mod config;
mod logging;

fn main() {}
