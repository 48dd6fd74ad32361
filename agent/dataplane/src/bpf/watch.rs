//! Repair of the hooks of the underlay.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::{Bpf, BpfError, Role, State};

impl Bpf {
    /// Checks that the maps are pinned, and that the programs hang on every interface of [`Self::interfaces`], each in its direction. A
    /// pin that was removed is made again; a program that was taken off or displaced is attached again; each with a log line. The result is what could not be repaired, and what does not stay repaired: empty
    /// when all is well.
    ///
    /// Takes some 50 µs an interface while nothing is to be mended. An interface that is gone is a fault only where the configuration
    /// names it; one that comes back under its name gets the programs.
    pub fn look_after_hooks(&self) -> Vec<BpfError> {
        // Under one lock: an agent that lets the programs go waits for this, and no hook is set after its removal.
        let state = &mut *self.state();
        let pinned = mend_pins(state).err();
        let interfaces = state.attachments.interfaces(Role::Underlay);
        let tended = interfaces.into_iter().map(|name| tend(state, &name));
        pinned
            .into_iter()
            .chain(tended.filter_map(Result::err))
            .filter(|fault| {
                !self.finds_interfaces || !matches!(fault, BpfError::NoInterface { .. })
            })
            .collect()
    }
}

fn mend_pins(state: &mut State) -> Result<(), BpfError> {
    if state.pins.mend()? {
        tracing::warn!("pins of BPF maps were gone, and are there again");
    }
    Ok(())
}

fn tend(state: &mut State, interface: &str) -> Result<(), BpfError> {
    let was_gone = state.put_back(interface)?;
    if state.repairs.are_frequent(interface, Instant::now()) {
        return Err(BpfError::TakenOff {
            interface: interface.to_owned(),
        });
    }
    if was_gone {
        tracing::warn!(
            interface,
            "the BPF programs were gone from an interface of the underlay, and hang there again"
        );
    }
    let State {
        ebpf, attachments, ..
    } = state;
    attachments.check_order(ebpf, Role::Underlay, interface)
}

impl State {
    /// Attaches the programs to an interface of the underlay from which they were taken off; whether that was so.
    ///
    /// What cannot be attached is tried again at each look, for as long as the source of what comes in is not checked there.
    pub(super) fn put_back(&mut self, interface: &str) -> Result<bool, BpfError> {
        let Self {
            ebpf,
            pins,
            attachments,
            repairs,
            ..
        } = self;
        if attachments.hangs(ebpf, Role::Underlay, interface)? {
            return Ok(false);
        }
        attachments.attach(ebpf, pins, Role::Underlay, interface)?;
        repairs.note(interface, Instant::now());
        Ok(true)
    }
}

/// This many repairs of one interface within [`Repairs::PERIOD`] are a fault of its own.
const FREQUENT: usize = 3;

/// When the programs of each interface were put back.
#[derive(Default)]
pub(super) struct Repairs {
    /// The last [`FREQUENT`] of each, oldest first.
    of: BTreeMap<String, VecDeque<Instant>>,
}

impl Repairs {
    const PERIOD: Duration = Duration::from_secs(60);

    /// The programs were put back.
    fn note(&mut self, interface: &str, now: Instant) {
        let times = self.of.entry(interface.to_owned()).or_default();
        if times.len() == FREQUENT {
            times.pop_front();
        }
        times.push_back(now);
    }

    /// Whether the last repairs lie close together. One that is a period ago does not count any more.
    fn are_frequent(&self, interface: &str, now: Instant) -> bool {
        let Some(times) = self.of.get(interface) else {
            return false;
        };
        let recent = times
            .iter()
            .filter(|time| now.duration_since(**time) < Self::PERIOD);
        recent.count() == FREQUENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_repairs_within_a_minute_are_frequent_until_the_first_is_a_minute_ago() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let mut repairs = Repairs::default();
        assert!(!repairs.are_frequent("u0", start));
        for second in [0, 40, 59] {
            assert!(!repairs.are_frequent("u0", at(second)), "{second} s");
            repairs.note("u0", at(second));
        }
        assert!(repairs.are_frequent("u0", at(59)));
        assert!(!repairs.are_frequent("u1", at(59)));
        assert!(!repairs.are_frequent("u0", at(60)));
        repairs.note("u0", at(61));
        assert!(repairs.are_frequent("u0", at(99)));
        assert!(!repairs.are_frequent("u0", at(100)));
    }
}
