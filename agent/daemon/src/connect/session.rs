//! One connection as its client sees it: what is asked, what was answered, how it is closed.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use nsm_core::{
    mechanism::{KERNEL, LOCAL, NAME, Parameters},
    net::IfName,
};
use nsm_proto::{
    connection::{Connection, Mechanism, MonitorScopeSelector, Path, PathSegment, State},
    networkservice::{NetworkServiceRequest, network_service_client::NetworkServiceClient},
};

use super::identity::Identity;
use crate::{
    netns::Netns,
    tool::{Agent, CallError},
    view::{Facts, View},
};

/// How long the Close of a connection that is about to be replaced may take: its endpoint is gone
/// most likely, and the agent has forgotten it or will when its token expires.
const CLOSE_BEFORE_RESELECT: Duration = Duration::from_secs(2);

/// What is asked for.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The service, with its domain.
    pub(crate) service: String,
    /// The client's labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// The interface's name.
    pub(crate) interface: IfName,
    /// Where the interface is to be.
    pub(crate) netns: Netns,
}

/// A Request that was granted.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The connection, for people and programs.
    pub(crate) view: View,
    /// What the agent reports beside it.
    pub(crate) facts: Facts,
    /// When the first hop's token expires.
    pub(crate) expires: SystemTime,
    /// From the question to the answer.
    pub(crate) took: Duration,
}

/// A connection of ours.
#[derive(Debug)]
pub(crate) struct Session {
    agent: Agent,
    identity: Identity,
    wanted: Wanted,
    /// What was answered last; until then, and after a Close, what is asked for.
    connection: Connection,
    /// Whether a next hop may hold something of this connection.
    is_open: bool,
}

impl Session {
    /// A connection before its first Request.
    pub(crate) fn begin(agent: Agent, identity: Identity, wanted: Wanted) -> Self {
        let connection = question(&identity, &wanted, State::Up);
        Self {
            agent,
            identity,
            wanted,
            connection,
            is_open: false,
        }
    }

    /// Whether there is something to close.
    pub(crate) fn is_open(&self) -> bool {
        self.is_open
    }

    /// The agent that is asked.
    pub(super) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Which events are about this connection: those with our segment on their path.
    pub(super) fn selector(&self) -> MonitorScopeSelector {
        MonitorScopeSelector {
            path_segments: vec![PathSegment {
                name: self.identity.name.clone(),
                id: self.identity.id.clone(),
                ..PathSegment::default()
            }],
            network_services: Vec::new(),
        }
    }

    /// Whether an event's connection is this one.
    pub(super) fn id(&self) -> &str {
        &self.identity.id
    }

    /// Asks, for the first time or to refresh.
    ///
    /// # Errors
    ///
    /// A refusal, no answer, or an answer that is not about this connection.
    pub(crate) async fn request(&mut self) -> Result<Answer, CallError> {
        self.sign();
        let mut preference = preference(&self.wanted);
        // A namespace that cannot be opened any more is refused as one that is only claimed.
        if self.agent.wants_descriptor()
            && let Ok(descriptor) = self.wanted.netns.descriptor()
        {
            self.wanted.netns.write_passed(&mut preference.parameters);
            self.agent.pass(descriptor);
        }
        let request = self.agent.request(NetworkServiceRequest {
            connection: Some(self.connection.clone()),
            mechanism_preferences: vec![preference],
        });
        let mut client = NetworkServiceClient::new(self.agent.channel.clone());
        // Until it answers, the agent may have begun to make something.
        let was_open = std::mem::replace(&mut self.is_open, true);
        let began = Instant::now();
        let answered = self.agent.answer(client.request(request)).await;
        if let Err(CallError::Refused { .. }) = answered {
            // A hop that refuses undoes its part.
            self.is_open = was_open;
        }
        let response = answered?;
        let took = began.elapsed();
        let facts = Facts::read(response.metadata());
        let connection = response.into_inner();
        let expires = check(&connection, &self.identity.id)
            .map_err(|reason| self.agent.bad_answer(reason))?;
        self.connection = connection;
        Ok(Answer {
            view: View::of(&self.connection, &facts),
            facts,
            expires,
            took,
        })
    }

    /// Asks again for the same endpoint, after a loss.
    ///
    /// # Errors
    ///
    /// As [`Self::request`].
    pub(crate) async fn same_again(&mut self) -> Result<Answer, CallError> {
        self.connection.set_state(State::Up);
        self.request().await
    }

    /// Asks for any endpoint, after a loss; `closes`: what there was is of no use meanwhile.
    ///
    /// # Errors
    ///
    /// As [`Self::request`].
    pub(crate) async fn reselect(&mut self, closes: bool) -> Result<Answer, CallError> {
        if closes {
            // What it holds is freed now or when its tokens expire; either way we go on.
            let _ = tokio::time::timeout(CLOSE_BEFORE_RESELECT, self.close()).await;
        }
        self.connection = question(&self.identity, &self.wanted, State::ReselectRequested);
        self.request().await
    }

    /// Closes what may be open. Nothing is asked where nothing is.
    ///
    /// # Errors
    ///
    /// The agent refuses or gives no answer; what it holds is freed when our token expires.
    pub(crate) async fn close(&mut self) -> Result<(), CallError> {
        if !self.is_open {
            return Ok(());
        }
        self.sign();
        let request = self.agent.request(self.connection.clone());
        let mut client = NetworkServiceClient::new(self.agent.channel.clone());
        self.agent.answer(client.close(request)).await?;
        self.is_open = false;
        Ok(())
    }

    /// Puts a token that is valid now into our segment.
    fn sign(&mut self) {
        let Identity { name, id, .. } = &self.identity;
        let own = self.agent.segment(name, id);
        let path = self.connection.path.get_or_insert_default();
        path.index = 0;
        match path.path_segments.first_mut() {
            Some(segment) => *segment = own,
            None => path.path_segments.push(own),
        }
    }
}

/// A connection that is asked for and not agreed yet.
fn question(identity: &Identity, wanted: &Wanted, state: State) -> Connection {
    let Identity { name, id, .. } = identity;
    Connection {
        id: id.clone(),
        network_service: wanted.service.clone(),
        labels: wanted.labels.clone(),
        path: Some(Path {
            index: 0,
            path_segments: vec![PathSegment {
                name: name.clone(),
                id: id.clone(),
                ..PathSegment::default()
            }],
        }),
        state: state.into(),
        ..Connection::default()
    }
}

fn preference(wanted: &Wanted) -> Mechanism {
    let mut parameters = Parameters::from([(NAME.to_owned(), wanted.interface.to_string())]);
    wanted.netns.write(&mut parameters);
    Mechanism {
        cls: LOCAL.to_owned(),
        r#type: KERNEL.to_owned(),
        parameters,
    }
}

/// Checks that the answer is about our connection; gives the first expiry on its path.
fn check(connection: &Connection, id: &str) -> Result<SystemTime, String> {
    let path = connection
        .path
        .as_ref()
        .ok_or("a connection without a path")?;
    let first = path
        .path_segments
        .first()
        .map(|segment| segment.id.as_str());
    if connection.id != id || first != Some(id) || path.index != 0 {
        return Err(format!(
            "connection {:?} at index {} of a path that begins with {first:?}; ours is {id:?}",
            connection.id, path.index
        ));
    }
    let expiries = path
        .path_segments
        .iter()
        .filter_map(|segment| segment.expires);
    let times = expiries.filter_map(|expires| SystemTime::try_from(expires).ok());
    times
        .min()
        .ok_or_else(|| "a path without the time when it expires".to_owned())
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;

    use super::*;

    fn answered(id: &str, first: &str, index: u32, seconds: &[i64]) -> Connection {
        let mut path_segments: Vec<_> = seconds
            .iter()
            .map(|&seconds| PathSegment {
                expires: Some(Timestamp { seconds, nanos: 0 }),
                ..PathSegment::default()
            })
            .collect();
        if let Some(segment) = path_segments.first_mut() {
            segment.id = first.to_owned();
        }
        Connection {
            id: id.to_owned(),
            path: Some(Path {
                index,
                path_segments,
            }),
            ..Connection::default()
        }
    }

    #[test]
    fn an_answer_expires_with_the_first_hop() {
        let connection = answered("a", "a", 0, &[30, 10, 20]);
        let expected = SystemTime::UNIX_EPOCH + Duration::from_secs(10);
        assert_eq!(check(&connection, "a"), Ok(expected));
    }

    #[test]
    fn an_answer_about_something_else_is_refused() {
        for wrong in [
            answered("b", "a", 0, &[1]),
            answered("a", "b", 0, &[1]),
            answered("a", "a", 1, &[1]),
            answered("a", "a", 0, &[]),
            Connection::default(),
        ] {
            assert!(check(&wrong, "a").is_err(), "{wrong:?}");
        }
        let mut connection = answered("a", "a", 0, &[1]);
        connection.path.as_mut().unwrap().path_segments[0].expires = None;
        assert!(check(&connection, "a").unwrap_err().contains("expires"));
    }
}
