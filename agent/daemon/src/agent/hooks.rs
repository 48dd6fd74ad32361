//! The hooks of the BPF programs, and the links that they are on. Other programs have filters on the same interfaces and may remove or
//! displace ours; anybody with the rights may change a link. The agent repairs what it can; where it cannot, it is degraded until the fault
//! is mended.

use std::{sync::Arc, time::Duration};

use nsm_dataplane::forward::Forwarding;
use tokio::time::{MissedTickBehavior, interval};

use super::{
    programs::{Programs, hook_faults},
    readiness::Readiness,
};

/// How long a hook may be without its program before that is noticed: as long as for the probe links.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Checks hooks and links for as long as the agent runs, and keeps the degradations of `readiness` true about them.
pub(crate) async fn look_after(
    programs: Arc<Programs>,
    forwarding: Arc<Forwarding>,
    readiness: Readiness,
) {
    let mut known = programs.hook_faults().to_vec();
    let mut turns = interval(LOOK_AGAIN);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        let bpf = Arc::clone(programs.bpf());
        let found = tokio::task::spawn_blocking(move || hook_faults(&bpf)).await;
        let mut found = found.expect("checking the hooks does not panic");
        match forwarding.look_after().await {
            Ok(faults) => found.extend(faults),
            Err(error) => found.push(format!(
                "the links of connections cannot be checked: {error}"
            )),
        }
        if found == known {
            continue;
        }
        for fault in found.iter().filter(|fault| !known.contains(fault)) {
            tracing::warn!(reason = fault, "degraded");
        }
        for fault in known.iter().filter(|fault| !found.contains(fault)) {
            tracing::info!(fault, "mended");
        }
        readiness.replace_degradations(&known, found.clone());
        known = found;
    }
}
