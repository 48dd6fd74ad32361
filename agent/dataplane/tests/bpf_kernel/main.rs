//! The BPF programs in the live kernel. Each test has network and mount namespaces of its own.

mod fast;
mod forward;
mod hooks;
mod lifecycle;
mod management;
mod programs;
mod support;
mod traffic;
mod verdicts;
