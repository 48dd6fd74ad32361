//! The connections of the endpoint: granted, refused, expired, published to monitors.
//!
//! Everything here is a function of the message, the token and `now`; [`super::server`] puts it behind gRPC. The key of a connection is
//! the id of the hop that asks: a Request of the same hop is a refresh, whatever else it lacks.

use std::{
    collections::{BTreeMap, HashMap},
    time::SystemTime,
};

use nsm_core::{
    mechanism::{KERNEL, Kernel, LOCAL, MechanismError, NAME, choose},
    net::IfName,
    nsm::path::{Path, PathError, Segment, selector_matches},
};
use nsm_proto::{
    connection::{
        self as wire, Connection, ConnectionEvent, ConnectionEventType, Mechanism,
        MonitorScopeSelector, State,
    },
    networkservice::NetworkServiceRequest,
};
use prost_types::Timestamp;
use tokio::sync::mpsc;
use tonic::{Code, Status};
use uuid::Uuid;

use super::addresses::{AddressError, Addresses, Lease};
use crate::netns::Netns;
use nsm_controlplane::identity::token::Token;

/// Events that a monitor may leave unread before it is cut off; it then opens a new stream and gets the whole state.
const BACKLOG: usize = 256;

/// What the endpoint is.
#[derive(Debug)]
pub(crate) struct Identity {
    /// Its name on paths and in the registry.
    pub(crate) name: String,
    /// The services it offers.
    pub(crate) services: Vec<String>,
    /// What they carry.
    pub(crate) payload: &'static str,
    /// Where their interfaces are.
    pub(crate) netns: Netns,
}

/// The receiving end of a monitor's stream.
pub(crate) type Events = mpsc::Receiver<Result<ConnectionEvent, Status>>;

/// Why a Request is not granted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The Request has no connection in it.
    #[error("the Request has no connection")]
    NoConnection,
    /// The connection's path is wrong.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The mechanisms do not fit, or their parameters are wrong.
    #[error(transparent)]
    Mechanism(#[from] MechanismError),
    /// No addresses.
    #[error(transparent)]
    Addresses(#[from] AddressError),
    /// Another endpoint's service.
    #[error("endpoint {endpoint} offers {offered:?}, not {asked:?}")]
    OtherService {
        /// The endpoint.
        endpoint: String,
        /// What it offers.
        offered: Vec<String>,
        /// What was asked for.
        asked: String,
    },
    /// The caller's token is over.
    #[error("the caller's token expired {ago_ms} ms ago: compare the clocks of the two machines")]
    Expired {
        /// How long ago, in milliseconds.
        ago_ms: u128,
    },
    /// The endpoint ends.
    #[error("endpoint {0} is shutting down")]
    Ending(String),
}

impl Refusal {
    fn code(&self) -> Code {
        match self {
            Self::NoConnection | Self::Path(_) => Code::InvalidArgument,
            Self::Mechanism(_) | Self::Addresses(AddressError::BadExclusion(_)) => {
                Code::InvalidArgument
            }
            Self::Addresses(AddressError::Pool(_)) => Code::ResourceExhausted,
            Self::OtherService { .. } => Code::NotFound,
            Self::Expired { .. } => Code::Unauthenticated,
            Self::Ending(_) => Code::Unavailable,
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.code(), refusal.to_string())
    }
}

/// A connection that was granted.
#[derive(Debug)]
struct Held {
    /// As this hop sees it: our id, the index at our segment.
    view: Connection,
    lease: Lease,
    interface: String,
    /// When the caller's token, and with it the connection, is over.
    expires: SystemTime,
}

/// A connection that was granted, for the caller.
#[derive(Debug)]
pub(crate) struct Granted {
    /// As the caller sees it.
    pub(crate) answer: Connection,
    /// Whether it is new; else it was refreshed.
    pub(crate) is_new: bool,
}

#[derive(Debug)]
struct Watcher {
    selector: MonitorScopeSelector,
    events: mpsc::Sender<Result<ConnectionEvent, Status>>,
}

/// All connections of the endpoint.
#[derive(Debug)]
pub(crate) struct Book {
    identity: Identity,
    addresses: Addresses,
    /// By the id of the hop that asked.
    held: HashMap<String, Held>,
    watchers: Vec<Watcher>,
    is_ending: bool,
}

impl Identity {
    /// Marks a granted connection UP and fills in what the request left open.
    fn complete(&self, connection: &mut Connection) {
        connection.set_state(State::Up);
        if connection.payload.is_empty() {
            self.payload.clone_into(&mut connection.payload);
        }
        let endpoint = &mut connection.network_service_endpoint_name;
        if endpoint.is_empty() {
            endpoint.clone_from(&self.name);
        }
    }
}

impl Book {
    /// A book without connections.
    pub(crate) fn new(identity: Identity, addresses: Addresses) -> Self {
        Self {
            identity,
            addresses,
            held: HashMap::new(),
            watchers: Vec::new(),
            is_ending: false,
        }
    }

    /// Grants a Request, or refreshes what was granted before. `theirs` is the caller's token,
    /// `ours` the endpoint's own.
    ///
    /// # Errors
    ///
    /// The refusal; what the connection had before stays.
    pub(crate) fn grant(
        &mut self,
        request: NetworkServiceRequest,
        theirs: Token,
        ours: Token,
        now: SystemTime,
    ) -> Result<Granted, Refusal> {
        if self.is_ending {
            return Err(Refusal::Ending(self.identity.name.clone()));
        }
        let mut connection = request.connection.ok_or(Refusal::NoConnection)?;
        if let Ok(ago) = now.duration_since(theirs.expires) {
            let ago_ms = ago.as_millis();
            return Err(Refusal::Expired { ago_ms });
        }
        self.check_service(&connection.network_service)?;
        let sender_id = connection.id.clone();
        if connection.state() == State::ReselectRequested {
            self.close(&sender_id);
        }
        let held = self.held.get(&sender_id);
        let is_new = held.is_none();
        let expires = theirs.expires;
        let mut path = typed(connection.path.take().unwrap_or_default());
        let own_id =
            || held.map_or_else(|| Uuid::new_v4().to_string(), |held| held.view.id.clone());
        let sender = usize::try_from(path.index).ok();
        sign(&mut path, sender, theirs);
        let hop = path.descend(&sender_id, &self.identity.name, own_id)?;
        sign(&mut path, Some(hop.index as usize), ours);
        let (mechanism, interface) = self.mechanism(
            connection.mechanism.take(),
            &request.mechanism_preferences,
            held,
            &hop.id,
        )?;
        let context = connection.context.get_or_insert_default();
        let ip = context.ip_context.get_or_insert_default();
        let lease = self.addresses.assign(held.map(|held| &held.lease), ip)?;
        connection.mechanism = Some(mechanism);
        self.identity.complete(&mut connection);
        let view = Connection {
            id: hop.id.clone(),
            path: Some(wire_path(path.clone())),
            ..connection.clone()
        };
        self.publish(ConnectionEventType::Update, &view);
        let held = Held {
            view,
            lease,
            interface,
            expires,
        };
        self.held.insert(sender_id, held);
        path.ascend(&hop);
        connection.path = Some(wire_path(path));
        Ok(Granted {
            answer: connection,
            is_new,
        })
    }

    /// Closes the connection that this hop asked for. `None` where there is none: it is closed then.
    pub(crate) fn close(&mut self, sender_id: &str) -> Option<Connection> {
        let held = self.held.remove(sender_id)?;
        self.addresses.release(&held.lease);
        self.publish(ConnectionEventType::Delete, &held.view);
        Some(held.view)
    }

    /// Closes what was not refreshed in time.
    pub(crate) fn close_expired(&mut self, now: SystemTime) -> Vec<Connection> {
        let over = self.held.iter().filter(|(_, held)| held.expires <= now);
        let over: Vec<String> = over.map(|(id, _)| id.clone()).collect();
        over.iter().filter_map(|id| self.close(id)).collect()
    }

    /// When the next connection expires.
    pub(crate) fn next_expiry(&self) -> Option<SystemTime> {
        self.held.values().map(|held| held.expires).min()
    }

    /// Opens a monitor of the connections that it selects, beginning with those that exist.
    pub(crate) fn watch(&mut self, selector: MonitorScopeSelector) -> Events {
        let (sender, events) = mpsc::channel(BACKLOG);
        let views = self.held.values().map(|held| &held.view);
        let connections = views
            .filter(|view| selects(&selector, view))
            .map(|view| (view.id.clone(), view.clone()))
            .collect();
        let first = ConnectionEvent {
            r#type: ConnectionEventType::InitialStateTransfer.into(),
            connections,
        };
        // The channel is empty: there is room.
        let _ = sender.try_send(Ok(first));
        self.watchers.retain(|watcher| !watcher.events.is_closed());
        if !self.is_ending {
            self.watchers.push(Watcher {
                selector,
                events: sender,
            });
        }
        events
    }

    /// The end: every connection is closed and its end published, every monitor's stream ends, and no Request is granted any more.
    pub(crate) fn end(&mut self) {
        self.is_ending = true;
        let open: Vec<String> = self.held.keys().cloned().collect();
        for id in open {
            self.close(&id);
        }
        self.watchers.clear();
    }

    fn publish(&mut self, kind: ConnectionEventType, view: &Connection) {
        self.watchers.retain(|watcher| {
            if !selects(&watcher.selector, view) {
                return !watcher.events.is_closed();
            }
            let event = ConnectionEvent {
                r#type: kind.into(),
                connections: BTreeMap::from([(view.id.clone(), view.clone())]),
            };
            watcher.events.try_send(Ok(event)).is_ok()
        });
    }

    /// A service with a domain is ours too: proxies may pass names on as they are.
    fn check_service(&self, asked: &str) -> Result<(), Refusal> {
        let target = asked.split('@').next().unwrap_or_default();
        if self
            .identity
            .services
            .iter()
            .any(|service| service == target)
        {
            return Ok(());
        }
        Err(Refusal::OtherService {
            endpoint: self.identity.name.clone(),
            offered: self.identity.services.clone(),
            asked: asked.to_owned(),
        })
    }

    /// The KERNEL mechanism with our namespace and the interface's name in it.
    fn mechanism(
        &self,
        agreed: Option<Mechanism>,
        preferences: &[Mechanism],
        held: Option<&Held>,
        own_id: &str,
    ) -> Result<(Mechanism, String), Refusal> {
        let supported = [(LOCAL, KERNEL)];
        fn kind(mechanism: &Mechanism) -> (&str, &str) {
            (&mechanism.cls, &mechanism.r#type)
        }
        let agreed = agreed.filter(|agreed| choose([kind(agreed)].into_iter(), &supported).is_ok());
        let mut mechanism = match agreed {
            Some(agreed) => agreed,
            None => preferences[choose(preferences.iter().map(kind), &supported)?].clone(),
        };
        let asked = Kernel::parse(&mechanism.parameters)?.name;
        let interface = match held {
            Some(held) => held.interface.clone(),
            None => self.interface(asked, own_id),
        };
        LOCAL.clone_into(&mut mechanism.cls);
        self.identity.netns.write(&mut mechanism.parameters);
        mechanism
            .parameters
            .insert(NAME.to_owned(), interface.clone());
        Ok((mechanism, interface))
    }

    /// The name that was asked for where no other connection has it, else one made of an id.
    fn interface(&self, asked: Option<IfName>, own_id: &str) -> String {
        let is_free = |name: &str| self.held.values().all(|held| held.interface != name);
        if let Some(name) = asked.filter(|name| is_free(name.as_str())) {
            return name.to_string();
        }
        let mut id = own_id.to_owned();
        loop {
            let digits: String = id
                .chars()
                .filter(char::is_ascii_alphanumeric)
                .take(8)
                .collect();
            let name = format!("nsm-{digits}");
            if digits.len() == 8 && is_free(&name) {
                return name;
            }
            id = Uuid::new_v4().to_string();
        }
    }
}

fn selects(selector: &MonitorScopeSelector, view: &Connection) -> bool {
    let services = &selector.network_services;
    if !services.is_empty() && !services.contains(&view.network_service) {
        return false;
    }
    fn names(segments: &[wire::PathSegment]) -> Vec<(&str, &str)> {
        segments
            .iter()
            .map(|segment| (segment.name.as_str(), segment.id.as_str()))
            .collect()
    }
    let path = view
        .path
        .as_ref()
        .map_or(&[][..], |path| &path.path_segments);
    selector_matches(&names(&selector.path_segments), &names(path))
}

/// Puts the token of a hop's caller or of the hop itself into its segment.
fn sign(path: &mut Path, segment: Option<usize>, token: Token) {
    if let Some(segment) = segment.and_then(|at| path.segments.get_mut(at)) {
        (segment.token, segment.expires) = (token.text, Some(token.expires));
    }
}

fn typed(path: wire::Path) -> Path {
    let segment = |segment: wire::PathSegment| Segment {
        expires: segment
            .expires
            .and_then(|time| SystemTime::try_from(time).ok()),
        name: segment.name,
        id: segment.id,
        token: segment.token,
        metrics: segment.metrics,
    };
    Path {
        index: path.index,
        segments: path.path_segments.into_iter().map(segment).collect(),
    }
}

fn wire_path(path: Path) -> wire::Path {
    let segment = |segment: Segment| wire::PathSegment {
        expires: segment.expires.map(Timestamp::from),
        name: segment.name,
        id: segment.id,
        token: segment.token,
        metrics: segment.metrics,
    };
    wire::Path {
        index: path.index,
        path_segments: path.segments.into_iter().map(segment).collect(),
    }
}

#[cfg(test)]
mod tests;
