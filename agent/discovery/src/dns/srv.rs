//! The order in which the targets of service records are tried (RFC 2782, "Usage rules").

use hickory_resolver::proto::rr::rdata::SRV;

/// Targets that are looked at: more than a few are a mistake or an attack.
const MAX_TARGETS: usize = 16;

/// Orders by priority and, within one priority, at random in proportion to weight. `pick(n)` is a
/// random number from 0 to `n`, both included.
pub(super) fn order(mut records: Vec<SRV>, mut pick: impl FnMut(u32) -> u32) -> Vec<SRV> {
    // Weight 0 first within a priority: the RFC gives those a chance only when the draw is 0.
    records.sort_by_key(|srv| (srv.priority, srv.weight));
    records.truncate(MAX_TARGETS);
    let mut ordered = Vec::with_capacity(records.len());
    while let Some(first) = records.first() {
        let priority = first.priority;
        let peers = records.iter().take_while(|srv| srv.priority == priority);
        let total: u32 = peers.clone().map(|srv| u32::from(srv.weight)).sum();
        let draw = pick(total);
        let mut sum = 0;
        let chosen = peers
            .map(|srv| {
                sum += u32::from(srv.weight);
                sum
            })
            .position(|sum| sum >= draw)
            .unwrap_or(0);
        ordered.push(records.remove(chosen));
    }
    ordered
}
