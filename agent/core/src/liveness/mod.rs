//! Whether packets reach a peer and come back.
//!
//! [`sbfd`] runs the session with a peer, [`plpmtu`] the search for the path MTU, [`Card`] checks the counts of the network card. Their
//! results are [`Evidence`]; [`judge`] makes [`Health`] of it: a [`Verdict`] and a [`Reason`] for each [`Direction`]. [`PathUsers`] holds
//! which connections take a path. [`Published`] is what agents exchange of health in the metrics of path segments.

mod card;
mod evidence;
mod judge;
mod metrics;
mod path;
mod peer_report;
pub mod plpmtu;
mod reason;
pub mod sbfd;
mod users;
mod verdict;

pub use self::{
    card::{Card, Look},
    evidence::{Evidence, Stages},
    judge::{PEER_INSISTS, judge},
    metrics::{BadLink, ForeignVnis, LostHop, Published},
    path::{PathEvent, PathId, Reflector},
    peer_report::{PEER_NOTICES, PeerReport, ReceivedReport},
    reason::Reason,
    users::{MtuRange, PathUsers},
    verdict::{Direction, Finding, Health, Verdict},
};
