//! Looking after the hooks of the underlay.

use super::{Bpf, BpfError, Role, State};

impl Bpf {
    /// Whether the programs hang where they should, each in its direction, on every interface of [`Self::interfaces`]. What somebody
    /// took off or displaced is put back, and the log says so. The result is what could not be mended: empty when all is well.
    ///
    /// Takes some 50 µs an interface while nothing is to be mended. An interface that is gone is a fault only where the configuration
    /// names it; one that comes back under its name gets the programs.
    pub fn look_after_hooks(&self) -> Vec<BpfError> {
        // Under one lock: an agent that lets the programs go waits for this, and finds nothing hooked behind its back.
        let state = &mut *self.state();
        let interfaces = state.attachments.interfaces(Role::Underlay);
        let tended = interfaces.into_iter().map(|name| tend(state, &name));
        tended
            .filter_map(Result::err)
            .filter(|fault| {
                !self.finds_interfaces || !matches!(fault, BpfError::NoInterface { .. })
            })
            .collect()
    }
}

fn tend(state: &mut State, interface: &str) -> Result<(), BpfError> {
    let State {
        ebpf,
        pins,
        attachments,
        ..
    } = state;
    if attachments.hangs(ebpf, Role::Underlay, interface)? {
        return Ok(());
    }
    attachments.attach(ebpf, pins, Role::Underlay, interface)?;
    tracing::warn!(
        interface,
        "the BPF programs were gone from an interface of the underlay, and hang there again"
    );
    Ok(())
}
