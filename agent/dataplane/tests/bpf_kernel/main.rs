//! The BPF programs in the live kernel. Each test has network and mount namespaces of its own.

mod lifecycle;
mod management;
mod support;
mod traffic;
mod verdicts;
