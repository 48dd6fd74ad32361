//! Why a connection is DOWN.

use std::fmt;

use nsm_core::{
    liveness::{BadLink, Health, LostHop, Published, Verdict},
    net::PeerUrl,
};
use nsm_proto::connection::State;

use super::model::{Established, below};

/// Why a connection is DOWN. As text: a sentence.
#[derive(Debug, Clone, PartialEq)]
pub enum DownReason {
    /// The link of its pod on this node is not as it must be.
    Link(BadLink),
    /// The path of its packets is down.
    Path(Health),
    /// The monitor stream from the next hop is lost, or the last refresh was refused.
    LostHop {
        /// Which hop, and how that was noticed.
        lost: LostHop,
        /// What is known of the path meanwhile.
        path: Option<Verdict>,
    },
    /// A hop behind us reports its path down, the link of its pod bad, or its next hop lost.
    Reported {
        /// The name of its segment.
        hop: String,
        /// Its sentence.
        reason: String,
    },
    /// The next hop reports DOWN without a reason, or has the connection no more.
    NextHop(PeerUrl),
}

impl Established {
    /// Why it is DOWN, with `path` the health of its path now; none where it is not DOWN.
    pub(crate) fn down_reason(&self, path: Option<Health>) -> Option<DownReason> {
        if self.view.state() != State::Down {
            return None;
        }
        if let Some(bad) = &self.path.bad_link {
            return Some(DownReason::Link(bad.clone()));
        }
        if let Some(health) = path.filter(Health::is_down) {
            return Some(DownReason::Path(health));
        }
        if let Some(lost) = self.missed_hop() {
            return Some(DownReason::LostHop {
                lost: lost.clone(),
                path: path.map(|health| health.verdict()),
            });
        }
        let reported = below(&self.view).iter().find_map(|hop| {
            let down = Some(Published::read(&hop.metrics)).filter(Published::is_down);
            let bad = || Some(BadLink::read(&hop.metrics)?.reason.to_string());
            let lost = || Some(LostHop::read(&hop.metrics)?.reason.to_string());
            Some(DownReason::Reported {
                hop: hop.name.clone(),
                reason: down.and_then(|it| it.reason).or_else(bad).or_else(lost)?,
            })
        });
        Some(reported.unwrap_or_else(|| DownReason::NextHop(self.route.url.clone())))
    }
}

impl fmt::Display for DownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(bad) => f.write_str(&bad.reason),
            Self::Path(health) => health.fmt(f),
            Self::LostHop { lost, path } => {
                let path = match path {
                    Some(Verdict::Up) => "the path is good",
                    _ => "of the path nothing is known",
                };
                write!(f, "{}; {path}", lost.reason)
            }
            Self::Reported { hop, reason } => write!(f, "{hop} reports: {reason}"),
            Self::NextHop(url) => write!(f, "{url} reports it, or has the connection no more"),
        }
    }
}
