//! What the agent at the other end of a tunnel says of the path, on its way to this node's prober.
//!
//! It stands in that agent's path segment: in the answer to each Request, and in the events of the next hop's monitor stream from then
//! on. All connections to a peer share its session, and each brings the word; one whose stream is lost takes its own back.

use nsm_core::{
    liveness::health::{LostHop, Published},
    mechanism::VXLAN,
};
use nsm_proto::connection::PathSegment;

use crate::{connection::store::Established, plane::ControlPlane};

impl ControlPlane {
    /// Hands on what the hops behind ours say of the path to us; no hops, no word. The first that watches a path has the other end
    /// of our tunnel: those between are passed through.
    pub(crate) fn hear_peer(&self, established: &Established, below: &[PathSegment]) {
        // The server's end has its peer above, and its endpoint below.
        let is_clients_end = established
            .next_mechanism
            .as_ref()
            .is_some_and(|mechanism| mechanism.r#type == VXLAN);
        let Some(watched) = established.path.watched.filter(|_| is_clients_end) else {
            return;
        };
        if let Some(prober) = self.prober() {
            let word = below.iter().find_map(|hop| {
                let word = Published::read(&hop.metrics).word();
                // What is behind a hop that is not heard was said before.
                let is_last = word.is_some() || LostHop::read(&hop.metrics).is_some();
                is_last.then_some(word)
            });
            prober.told(&established.view.id, &watched, word.flatten());
        }
    }
}
