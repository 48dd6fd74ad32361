//! A Request, from the message to the connection that stands, as a list of steps:
//!
//! 1. [enter](crate::call::enter): the path rules;
//! 2. admit: one event at a time works on a connection;
//! 3. [route](mod@route): the next hops, in the order in which they are tried;
//! 4. [attempt]: one next hop, with
//!    1. [offer]: the Request to it,
//!    2. [accept]: its reply, checked and made real; [admit] decides what it may put into a pod, [initiate] and [terminate] make the
//!       ends of a tunnel;
//! 5. [commit]: the connection is stored, published and answered.

mod accept;
pub(super) mod admit;
mod around;
mod ask;
mod attempt;
mod commit;
mod initiate;
mod links;
mod offer;
mod reply;
mod route;
mod terminate;

use std::sync::{Arc, atomic::AtomicBool};

use nsm_proto::{
    connection::{Connection, State},
    networkservice::NetworkServiceRequest,
};
use tokio::time::Instant;

use self::ask::Ask;
use crate::{
    call::{
        Answer, Call, Calls, add_missing,
        close::Cause,
        enter::{Entered, Entering},
    },
    connection::store::{Claim, Turn},
    error::RequestError,
    route::{next::Route, router::Arrival},
};

/// Keys of tunnels asked for in one Request. A server chooses a VNI among eight million at random: a second collision in a row means
/// that something else is wrong.
const MAX_KEYS: u32 = 4;

impl Calls {
    /// Makes or refreshes a connection. The work goes on when the caller goes away, so that it
    /// either stands, to be closed by its token's expiry, or leaves nothing behind.
    ///
    /// # Errors
    /// See [`RequestError`]: nothing of a Request that fails is left on either side.
    pub(crate) async fn request(
        self: &Arc<Self>,
        call: Call<NetworkServiceRequest>,
    ) -> Result<Answer, RequestError> {
        let calls = Arc::clone(self);
        // Boxed, so that what is moved into the task is a pointer and not some ten kilobytes.
        tokio::spawn(Box::pin(calls.serve_request(call)))
            .await
            .unwrap_or(Err(RequestError::Internal))
    }

    async fn serve_request(
        self: Arc<Self>,
        call: Call<NetworkServiceRequest>,
    ) -> Result<Answer, RequestError> {
        let mut connection = call
            .message
            .connection
            .ok_or(RequestError::Missing("connection"))?;
        let preferences = call.message.mechanism_preferences;
        let bytes = admit::check_sizes(&connection, &preferences)?;
        let asked_id = connection.id.clone();
        if call.arrival == Arrival::Local {
            add_missing(&mut connection.labels, &self.config.client_info);
        }
        let entering = Entering {
            token: call.token,
            arrival: call.arrival,
            shown: call.shown,
            session: call.session,
        };
        let entered = self.enter(&mut connection, entering)?;
        let caller = entered.name(call.caller);
        let Entered {
            path,
            hop,
            expires,
            guest,
            ..
        } = entered;
        let claim = Claim {
            holder: call.holder,
            bytes,
            deadline: call.deadline,
        };
        let turn = self.held.connections.admit(&hop.id, claim).await?;
        if let Some(current) = turn.current() {
            current.is_open_to(&caller, &path)?;
        }
        let avoid = self.reselect(&mut connection, &turn, call.deadline).await;
        let mechanisms = connection.mechanism.iter().chain(&preferences);
        let descriptors = call.descriptors.as_deref();
        let owner = caller.owner();
        let named = self.named_netns(caller, descriptors, mechanisms).await;
        let mut ask = Ask {
            arrival: call.arrival,
            source: call.source,
            holder: call.holder,
            owner,
            guest,
            named,
            connection,
            path,
            preferences,
            expires,
            deadline: call.deadline,
            avoid,
            is_moved: AtomicBool::new(false),
            turn: Arc::new(turn),
        };
        let prior = ask.turn.current();
        if let Some(prior) = &prior {
            ask.resume(&prior.view);
        }
        match self.establish(&ask, prior.as_deref()).await {
            Ok(established) => Ok(self.commit(&ask.turn, prior, established, &hop, asked_id)),
            Err(error) => {
                self.keep_prior(&ask, &error);
                Err(error)
            }
        }
    }

    /// A client may ask for another endpoint than the one it has. The route to leave, where the old tunnel stands until another one
    /// does: its next hop may not even get a Close. Otherwise the old connection is closed first. An agent that does not have it passes
    /// the wish on: hops behind it may have it still.
    async fn reselect(
        &self,
        connection: &mut Connection,
        turn: &Turn,
        deadline: Instant,
    ) -> Option<Route> {
        if connection.state() != State::ReselectRequested {
            connection.set_state(State::Up);
            return None;
        }
        let current = turn.current()?;
        connection.set_state(State::Up);
        if current.is_left_standing() {
            return Some(current.route.clone());
        }
        self.tear_down(turn, deadline, Cause::Asked).await;
        None
    }
}
