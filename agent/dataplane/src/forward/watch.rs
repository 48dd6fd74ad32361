//! The look at both ends of pod links, and at the program on them.
//!
//! The nodes' ends are repaired here. What a pod's end must have is known to whoever asked for it: here is only noticed which may lack
//! something.

use std::collections::{BTreeMap, HashMap};

use nsm_core::link::NodeLink;

use super::ForwardError;
use crate::{
    bpf::Bpf,
    links::{Changed, Mended, NodeWatch, PodEndPlaces, PodWatch},
    netlink::{Netlink, NetlinkError},
};

/// What the kernel announces instead of an interface for a block of filters that several share.
const SHARED_BLOCK: u32 = u32::MAX;

/// How many pods' ends are looked at in a row where any may have changed. With two looks a second, a node of 10,000 connections is through
/// in five minutes and uses some percents of a processor meanwhile.
const AT_ONCE: usize = 16;

/// What was found so far.
#[derive(Default)]
pub(super) struct Watch {
    links: Option<NodeWatch>,
    pods: Option<PodWatch>,
    /// The nodes' ends of links whose pods' ends are still to be looked at.
    rest: Vec<u32>,
    /// Whether any may have changed since that began.
    is_any: bool,
    /// What could not be repaired, by link.
    faults: BTreeMap<u32, String>,
}

/// What a look found.
pub(super) struct Found {
    /// What is amiss, a sentence each.
    pub(super) faults: Vec<String>,
    /// Links that are gone, by index.
    pub(super) gone: Vec<u32>,
}

impl Watch {
    /// Repairs links that others have changed.
    pub(super) fn look(
        &mut self,
        netlink: &mut Netlink,
        bpf: &Bpf,
        made: &HashMap<u32, NodeLink>,
    ) -> Result<Found, ForwardError> {
        let links = match &mut self.links {
            Some(links) => links,
            none => none.insert(NodeWatch::open()?),
        };
        let looked = links.look(made)?;
        // A fault is looked at again with each change of its link, and where a program is missing, each time.
        let was_amiss = !self.faults.is_empty();
        self.faults
            .retain(|link, _| made.contains_key(link) && !looked.changed.includes(*link));
        let mut gone = Vec::new();
        for (link, mended) in looked.mended {
            if matches!(mended, Mended::Gone) {
                gone.push(link);
            }
            self.note(link, &made[&link].name, mended);
        }
        let filters_changed = match &looked.changed {
            Changed::Unknown => true,
            Changed::Links(changed) => changed
                .iter()
                .any(|link| *link == SHARED_BLOCK || made.contains_key(link)),
        };
        if !made.is_empty() && (filters_changed || was_amiss) {
            let there = made.keys().copied().filter(|link| !gone.contains(link));
            self.mend_programs(netlink, bpf, made, there.collect())?;
        }
        let faults = self.faults.values().cloned().collect();
        Ok(Found { faults, gone })
    }

    /// The nodes' ends of links whose pods' ends may lack something.
    pub(super) fn suspects(&mut self, ends: &PodEndPlaces) -> Result<Vec<u32>, ForwardError> {
        let pods = match &mut self.pods {
            Some(pods) => pods,
            none => none.insert(PodWatch::open().map_err(NetlinkError::from)?),
        };
        let found = pods.suspects(ends).map_err(NetlinkError::from)?;
        let places = found.ends.iter().filter_map(|place| ends.get(place));
        let mut suspects: Vec<u32> = places.map(|end| end.node).collect();
        self.is_any |= found.any;
        // A round that is under way goes to its end first, for those that it has not reached yet; then there is another one.
        if self.rest.is_empty() && std::mem::take(&mut self.is_any) {
            self.rest = ends.values().map(|end| end.node).collect();
        }
        let first = self.rest.len().saturating_sub(AT_ONCE);
        suspects.extend(self.rest.drain(first..));
        Ok(suspects)
    }

    fn note(&mut self, link: u32, interface: &str, mended: Mended) {
        match mended {
            Mended::Repaired(steps) => {
                tracing::warn!(
                    interface,
                    steps,
                    "the node's end of a pod link was changed, and is right again"
                );
            }
            Mended::Gone => {}
            Mended::Refused(error) => {
                self.faults
                    .insert(link, format!("pod link `{interface}`: {error}"));
            }
        }
    }

    /// Puts the program on pod links again that lost it.
    fn mend_programs(
        &mut self,
        netlink: &mut Netlink,
        bpf: &Bpf,
        made: &HashMap<u32, NodeLink>,
        there: Vec<u32>,
    ) -> Result<(), ForwardError> {
        for link in bpf.bare_pod_links(netlink, there)? {
            let interface = &made[&link].name;
            match bpf.hook_pod_link(netlink, link) {
                Ok(()) => {
                    tracing::warn!(
                        interface,
                        "the BPF program was gone from a pod link, and is there again"
                    );
                }
                Err(error) if error.is_of_missing_link() => {}
                Err(error) => {
                    self.faults
                        .insert(link, format!("pod link `{interface}`: {error}"));
                }
            }
        }
        Ok(())
    }
}
