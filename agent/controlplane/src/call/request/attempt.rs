//! Step: one next hop is asked, and what it grants is taken or taken back.

use std::sync::{Arc, atomic::Ordering};

use nsm_core::{
    link::LinkAlias,
    mechanism::{MechanismError, SRC_IP},
};
use nsm_proto::connection::{Connection, Mechanism};

use super::{
    MAX_KEYS,
    ask::{Ask, Attempt},
    reply::{source, undo_connection},
};
use crate::{
    call::{
        Calls,
        case::{Case, Terminated},
        ends::Ends,
    },
    connection::model::Established,
    error::RequestError,
    ports::ForwarderError,
    route::{addresses::Crossing, next::Route},
};

impl Calls {
    /// Prepares the Request to one next hop.
    ///
    /// # Errors
    /// Those of the previous hop's message, which no other next hop would mend.
    pub(super) async fn attempt<'a>(
        &self,
        ask: &'a Ask,
        route: &'a Route,
        prior: Option<&'a Established>,
        strict: bool,
    ) -> Result<Attempt<'a>, RequestError> {
        if route.crossing != Crossing::Inside {
            self.lookup.addresses.known(ask.deadline).await;
        }
        let case = Case::of(
            ask.arrival,
            self.forwarder.is_some(),
            &ask.connection,
            &ask.preferences,
            &ask.named,
            route,
        )?;
        if !matches!(case, Case::Through)
            && let Some(context) = &ask.connection.context
        {
            Ends::parse(self.alias(&ask.connection.id)?, context)?.check()?;
        }
        let around_client = match &case {
            Case::LocalPair(client) | Case::Initiate(client, _) => {
                let alias = self.alias(&ask.connection.id)?;
                Some(self.around(&client.pod.netns, &alias).await?)
            }
            Case::Terminate(tunnel) => {
                self.check_client(tunnel).await?;
                None
            }
            Case::Through => None,
        };
        Ok(Attempt {
            ask,
            route,
            peer: self.lookup.peers.get(&route.url),
            case,
            around_client,
            prior,
            strict,
        })
    }

    /// A tunnel whose other end is this node would reach what listens here.
    async fn check_client(&self, tunnel: &Terminated) -> Result<(), RequestError> {
        let client = tunnel.asked.client.address;
        let own = self.forwarder()?.own_addresses().await?;
        if self.lookup.addresses.is_one_of(&own, client) {
            return Err(MechanismError::OwnAddress {
                key: SRC_IP,
                value: client,
            }
            .into());
        }
        Ok(())
    }

    /// Asks one next hop, and makes our part of what it grants; again where it chooses a key that another tunnel of this node has.
    pub(super) async fn try_route(
        self: &Arc<Self>,
        attempt: &Attempt<'_>,
    ) -> Result<Established, RequestError> {
        let mut standing = attempt.standing();
        let mut tries = 0;
        loop {
            tries += 1;
            match self.try_once(attempt, standing.take()).await {
                Err(RequestError::Forwarder(ForwarderError::KeyTaken(key)))
                    if matches!(attempt.case, Case::Initiate(..)) =>
                {
                    if tries == MAX_KEYS {
                        return Err(RequestError::KeyTaken {
                            url: attempt.route.url.to_string(),
                            key,
                            tries,
                        });
                    }
                }
                outcome => return outcome,
            }
        }
    }

    async fn try_once(
        self: &Arc<Self>,
        attempt: &Attempt<'_>,
        standing: Option<Mechanism>,
    ) -> Result<Established, RequestError> {
        let request = self.offer(attempt, standing).await?;
        let sent_source = source(&request);
        let stands = attempt.is_same_hop() && !attempt.ask.is_moved();
        let deadline = attempt.ask.deadline;
        let (peer, server) = (&attempt.peer, attempt.route.expected.server());
        let asked = self.lookup.peers.request(peer, server, request, deadline);
        let granted = match asked.await {
            Ok(granted) => granted,
            Err(error) => {
                self.undo_failed(attempt, stands, &error);
                return Err(error);
            }
        };
        let proved = self.lookup.peers.prove(&granted);
        let mut reply = granted.connection;
        let accepted = match proved {
            Ok(()) => {
                let accepted = self.accept(attempt, &mut reply, sent_source.as_deref());
                accepted.await
            }
            Err(error) => Err(error),
        };
        match accepted {
            Ok(established) => Ok(established),
            Err(error) => {
                self.undo_refused(attempt, stands, reply, &error).await;
                Err(error)
            }
        }
    }

    /// The next hop has not granted the Request, and may have done its part all the same. A hop that refuses another endpoint keeps
    /// what stands there; were the refusal a broken stream, its monitor would break too.
    fn undo_failed(self: &Arc<Self>, attempt: &Attempt<'_>, stands: bool, error: &RequestError) {
        let is_granted = if stands {
            !attempt.is_same_route() && matches!(error, RequestError::Silent { .. })
        } else {
            error.may_have_been_granted()
        };
        if is_granted {
            self.undo(attempt, Connection::default());
        }
    }

    /// We do not take what the next hop has granted. The next try may be at the same hop, under the same id: it waits for this.
    async fn undo_refused(
        self: &Arc<Self>,
        attempt: &Attempt<'_>,
        stands: bool,
        reply: Connection,
        error: &RequestError,
    ) {
        let is_refresh = stands && attempt.is_same_route();
        if !is_refresh || error.is_key_taken() {
            let undone = self.undo(attempt, reply);
            let _ = tokio::time::timeout_at(attempt.ask.deadline, undone).await;
        }
    }

    fn undo(
        self: &Arc<Self>,
        attempt: &Attempt<'_>,
        reply: Connection,
    ) -> tokio::task::JoinHandle<()> {
        let is_moved = &attempt.ask.is_moved;
        is_moved.fetch_or(attempt.is_same_hop(), Ordering::Relaxed);
        let undo = undo_connection(attempt, reply);
        self.undo_at(&attempt.peer, undo, &attempt.ask.turn)
    }

    /// The alias of the links of our segment `id`.
    pub(in crate::call) fn alias(&self, id: &str) -> Result<LinkAlias, RequestError> {
        LinkAlias::new(self.config.domain.as_str(), id).map_err(|error| RequestError::Field {
            field: "id of our path segment",
            value: id.to_owned(),
            reason: error.to_string(),
        })
    }
}
