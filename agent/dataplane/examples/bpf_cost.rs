//! What the BPF programs cost a packet, in nanoseconds, as JSON on standard output. Needs root.

use std::{path::PathBuf, process};

use nsm_dataplane::bpf::{BpfError, cost};

fn main() -> Result<(), BpfError> {
    let pin_dir = PathBuf::from(format!("/sys/fs/bpf/proxy-nsmgr-cost-{}", process::id()));
    for cost in cost::measure(&pin_dir)? {
        println!(
            r#"{{"packet":"{}","direction":"{}","run_time_ns":{:.1},"alone_ns":{:.1}}}"#,
            cost.packet, cost.direction, cost.run_time_ns, cost.alone_ns
        );
    }
    Ok(())
}
