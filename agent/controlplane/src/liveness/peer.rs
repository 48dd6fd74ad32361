//! The peer's report on a path, on their way to this node's prober.
//!
//! They stand in the path segment of the agent at the other end of the tunnel: in the answer to each Request, and from then on in the
//! events of the next hop's monitor stream. All connections to a peer share its session, and each brings the report; a connection
//! whose stream is lost withdraws its own.

use nsm_core::{
    liveness::{LostHop, Published},
    mechanism::RemoteMechanism,
};
use nsm_proto::connection::PathSegment;

use super::Liveness;
use crate::connection::model::Established;

impl Liveness {
    /// Passes the report of the hops behind ours to the prober; no hops withdraw them. The first hop that watches a path is the
    /// other end of our tunnel: the hops between are passed through.
    pub(super) fn report_evidence(&self, established: &Established, below: &[PathSegment]) {
        // The peer of the server's end is above it, and its endpoint below.
        let is_clients_end = established
            .next_mechanism
            .as_ref()
            .is_some_and(|mechanism| RemoteMechanism::of_type(&mechanism.r#type).is_some());
        let Some(watched) = established.path.watched.filter(|_| is_clients_end) else {
            return;
        };
        if let Some(prober) = self.prober() {
            let report = below.iter().find_map(|hop| {
                let report = Published::read(&hop.metrics).report();
                // What is behind a lost hop was published before it was lost.
                let is_last = report.is_some() || LostHop::read(&hop.metrics).is_some();
                is_last.then_some(report)
            });
            prober.report(&established.view.id, &watched, report.flatten());
        }
    }
}
