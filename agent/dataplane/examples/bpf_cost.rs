//! What the BPF programs cost a packet, in nanoseconds, as JSON on standard output. Needs root.
//!
//! It pins below the directory that it is given, or one of its own, and leaves nothing there.

use std::{env, path::PathBuf, process};

use nsm_dataplane::bpf::{BpfError, cost};

fn main() -> Result<(), BpfError> {
    let own = || format!("/sys/fs/bpf/proxy-nsmgr-cost-{}", process::id()).into();
    let pin_dir = env::args_os().nth(1).map_or_else(own, PathBuf::from);
    for cost in cost::measure(&pin_dir)? {
        println!(
            r#"{{"packet":"{}","direction":"{}","run_time_ns":{:.1},"alone_ns":{:.1},"rounds":{}}}"#,
            cost.packet, cost.direction, cost.run_time_ns, cost.alone_ns, cost.rounds
        );
    }
    Ok(())
}
