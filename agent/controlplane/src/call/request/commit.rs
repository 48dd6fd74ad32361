//! Step: the connection is stored, published and answered; or the Request has failed, and what stood before stands on.

use std::sync::Arc;

use nsm_core::{liveness::LostHop, net::Vni, nsm::path::Hop};
use nsm_proto::connection::{ConnectionEventType, State};

use super::ask::Ask;
use crate::{
    call::{Answer, Calls, next_hop::downstream_view},
    connection::{model::Established, store::Turn},
    error::RequestError,
    peer::{
        peers::Peer,
        stream::{self, Report},
    },
};

impl Calls {
    /// Stores the connection, publishes it to the monitors, and answers. `asked_id` is its id in the previous hop's message.
    pub(super) fn commit(
        self: &Arc<Self>,
        turn: &Arc<Turn>,
        prior: Option<Arc<Established>>,
        established: Established,
        hop: &Hop,
        asked_id: String,
    ) -> Answer {
        let id = turn.id();
        let answer = answer(&established, hop, asked_id);
        if let Some(prior) = &prior {
            self.leave_prior(turn, prior, &established);
        }
        let established = Arc::new(established);
        let peer = self.lookup.peers.get(&established.route.url);
        turn.set(Some(Arc::clone(&established)));
        self.join_service(id, prior.as_deref(), &established);
        self.held.expiries.set(id, established.expires);
        peer.join(id, || self.monitor(&peer));
        self.held
            .monitors
            .publish_answered(ConnectionEventType::Update, &established);
        self.liveness.catch_up(&established);
        answer
    }

    /// Gives back what the connection had and does not need any more.
    fn leave_prior(
        self: &Arc<Self>,
        turn: &Arc<Turn>,
        prior: &Established,
        established: &Established,
    ) {
        let id = turn.id();
        if prior.route.url != established.route.url {
            let peer = self.lookup.peers.get(&prior.route.url);
            peer.leave(id);
            self.undo_at(&peer, downstream_view(prior), turn);
        }
        self.liveness.exchange(id, prior, established);
        if let Some(key) = prior.key
            && prior.key != established.key
        {
            self.held.keys.release(key);
        }
    }

    fn monitor(self: &Arc<Self>, peer: &Arc<Peer>) -> tokio::task::AbortHandle {
        let calls = Arc::clone(self);
        let contexts = self.passing_contexts();
        stream::watch(
            Arc::clone(&self.lookup.peers),
            Arc::clone(peer),
            self.config.name.clone(),
            move |peer, report| {
                if let Report::Event(event) = &report {
                    calls.follow_contexts(peer, event);
                }
                calls.liveness.on_report(peer, report, &contexts);
            },
        )
    }

    /// A Request has failed. What stood before stands and ends with the token of this Request, because the client is alive. It is
    /// DOWN for its monitors, as in NSM, so that clients heal: with the reason beside it where packets may still pass, and without one
    /// where the next hop does not have it any more.
    pub(super) fn keep_prior(&self, ask: &Ask, error: &RequestError) {
        let turn = &ask.turn;
        let Some(current) = turn.current() else {
            return;
        };
        let changed = if ask.is_moved() {
            let changed = current.with_reported(State::Down);
            changed.unwrap_or_else(|| (*current).clone())
        } else {
            let mut changed = current.with_refused(LostHop::refused(&error.to_string()));
            if changed.expires < ask.expires {
                changed.expires = ask.expires;
                self.held.expiries.set(turn.id(), ask.expires);
            }
            changed
        };
        let changed = Arc::new(changed);
        turn.set(Some(Arc::clone(&changed)));
        // A connection that was DOWN before is being healed already.
        if changed.view.state() != current.view.state() {
            let monitors = &self.held.monitors;
            monitors.publish_answered(ConnectionEventType::Update, &changed);
        }
    }
}

fn answer(established: &Established, hop: &Hop, asked_id: String) -> Answer {
    let mut connection = established.view.clone();
    connection.id = asked_id;
    // Granted, whatever is published of its path.
    connection.set_state(State::Up);
    if let Some(path) = &mut connection.path {
        path.index = hop.previous.unwrap_or_default();
    }
    Answer {
        connection,
        resolution: established.route.resolution.clone(),
        next_mechanism: established
            .next_mechanism
            .as_ref()
            .map(|mechanism| mechanism.r#type.clone()),
        vni: established.vni().map(Vni::get),
    }
}
