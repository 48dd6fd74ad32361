//! Listening to what becomes of the connection.

use nsm_core::{
    liveness::{Published, Verdict},
    nsm::heal::Loss,
};
use nsm_proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, State,
    monitor_connection_client::MonitorConnectionClient,
};
use tokio::{sync::mpsc, task::AbortHandle};
use tonic::Code;

use super::session::Session;
use crate::{
    tool::shown,
    view::{bad_link, health, lost_hop, path_down},
};

/// What a monitor reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum News {
    /// This is lost, and why.
    Lost(Loss, String),
    /// The path is known to be good.
    PathUp,
    /// The other side wants the connection to be refreshed.
    RefreshRequested,
}

/// A stream of news about one connection; dropped, it ends.
#[derive(Debug)]
pub(crate) struct Watch {
    news: mpsc::Receiver<News>,
    task: AbortHandle,
}

impl Watch {
    /// Listens from here on.
    pub(crate) fn start(session: &Session) -> Self {
        let agent = session.agent();
        let mut client = MonitorConnectionClient::new(agent.channel.clone());
        let request = agent.stream_request(session.selector());
        let id = session.id().to_owned();
        let url = agent.url.clone();
        let (sender, news) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            let reason = match client.monitor_connections(request).await {
                // An NSMgr without monitors: the refresh is what is left to notice a loss.
                Err(status) if status.code() == Code::Unimplemented => {
                    return pending(sender).await;
                }
                Err(status) => shown(status.message()),
                Ok(response) => {
                    let mut events = response.into_inner();
                    loop {
                        match events.message().await {
                            Ok(Some(event)) => {
                                if let Some(news) = interpret(&event, &id)
                                    && sender.send(news).await.is_err()
                                {
                                    return;
                                }
                            }
                            Ok(None) => break "its stream ended".to_owned(),
                            Err(status) => break shown(status.message()),
                        }
                    }
                }
            };
            let words = format!("{url} is not heard any more: {reason}");
            let lost = News::Lost(Loss::Agent, words);
            // The receiver is gone when the connection is not wanted any more.
            let _ = sender.send(lost).await;
        })
        .abort_handle();
        Self { news, task }
    }

    /// The next news. After the loss of our agent none comes.
    pub(crate) async fn next(&mut self) -> News {
        match self.news.recv().await {
            Some(news) => news,
            None => std::future::pending().await,
        }
    }

    /// The next loss; other events do not matter to a caller that waits for one.
    pub(crate) async fn next_loss(&mut self) -> (Loss, String) {
        loop {
            if let News::Lost(loss, reason) = self.next().await {
                return (loss, reason);
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pending(sender: mpsc::Sender<News>) {
    sender.closed().await;
}

/// What an event means for the connection whose first segment has this id.
///
/// NSM keys the connections of an event by the id of the hop that sends it; the path is the same for
/// all hops, so that is what is looked at.
fn interpret(event: &ConnectionEvent, id: &str) -> Option<News> {
    let ours = event.connections.values().find(|connection| {
        let path = connection.path.as_ref();
        let first = path.and_then(|path| path.path_segments.first());
        first.is_some_and(|segment| segment.id == id)
    })?;
    let lost = |words: &str| Some(News::Lost(Loss::Endpoint, words.to_owned()));
    if event.r#type() == ConnectionEventType::Delete {
        return lost("it was closed by the other side");
    }
    match ours.state() {
        State::Up => is_path_up(ours).then_some(News::PathUp),
        State::RefreshRequested => Some(News::RefreshRequested),
        State::Down => match (path_down(ours), bad_link(ours), lost_hop(ours)) {
            (Some(reason), ..) => Some(News::Lost(Loss::Path, reason)),
            // Another endpoint is of no use where our own link is bad.
            (None, Some((reason, true)), _) => Some(News::Lost(Loss::Link, reason)),
            (None, Some((reason, false)), _) => Some(News::Lost(Loss::Path, reason)),
            (None, None, Some((reason, is_path_good))) => {
                Some(News::Lost(Loss::ControlPlane { is_path_good }, reason))
            }
            (None, None, None) => lost("the path or the endpoint is down"),
        },
        State::ReselectRequested => lost("another endpoint is wanted"),
    }
}

/// Whether some hop publishes that its path is good, and none that it is down.
fn is_path_up(connection: &Connection) -> bool {
    let mut hops = health(connection);
    let is_up = |hop: &Published| hop.outward == Some(Verdict::Up);
    path_down(connection).is_none() && hops.any(|hop| is_up(&hop))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::connection;

    fn event(kind: ConnectionEventType, state: State) -> ConnectionEvent {
        let mut connection = connection();
        connection.set_state(state);
        ConnectionEvent {
            r#type: kind.into(),
            // Another hop's id as the key.
            connections: [("agent-1-id".to_owned(), connection)].into(),
        }
    }

    #[test]
    fn events_mean_something_or_nothing() {
        use ConnectionEventType::{Delete, InitialStateTransfer, Update};
        let heard = |kind, state| interpret(&event(kind, state), "nsc-id");
        assert_eq!(heard(InitialStateTransfer, State::Up), None);
        assert_eq!(heard(Update, State::Up), None);
        assert!(matches!(
            heard(Update, State::Down),
            Some(News::Lost(Loss::Endpoint, _))
        ));
        assert!(matches!(
            heard(Update, State::ReselectRequested),
            Some(News::Lost(Loss::Endpoint, _))
        ));
        assert!(matches!(
            heard(InitialStateTransfer, State::Down),
            Some(News::Lost(Loss::Endpoint, _))
        ));
        assert_eq!(
            heard(Update, State::RefreshRequested),
            Some(News::RefreshRequested)
        );
        assert!(matches!(
            heard(Delete, State::Up),
            Some(News::Lost(Loss::Endpoint, _))
        ));
    }

    #[test]
    fn a_path_tells_by_its_metrics() {
        let mut event = event(ConnectionEventType::Update, State::Down);
        let tell = |event: &mut ConnectionEvent, pairs: &[(&str, &str)]| {
            let connection = event.connections.values_mut().next().expect("one");
            let path = connection.path.as_mut().expect("a path");
            let told = pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            path.path_segments[1].metrics = told.collect();
        };
        tell(
            &mut event,
            &[("sbfd_state_out", "down"), ("sbfd_reason", "why")],
        );
        let lost = News::Lost(Loss::Path, "why".to_owned());
        assert_eq!(interpret(&event, "nsc-id"), Some(lost.clone()));
        let unheard = [("next_hop", "lost"), ("next_hop_reason", "who")];
        let down = [("sbfd_state_out", "down"), ("sbfd_reason", "why")];
        tell(&mut event, &[unheard, down].concat());
        assert_eq!(
            interpret(&event, "nsc-id"),
            Some(lost),
            "the worse of the two"
        );
        // A link that is repaired by the next Request.
        let bad = [("link_state", "down"), ("link_reason", "what")];
        tell(&mut event, &[unheard, bad].concat());
        let lost = News::Lost(Loss::Link, "what".to_owned());
        assert_eq!(interpret(&event, "nsc-id"), Some(lost));
        // A good path both ways, and those of which less is known.
        for (inward, outward) in [
            ("up", "up"),
            ("unknown", "up"),
            ("up", "unverified"),
            ("unverified", "unverified"),
            ("", ""),
        ] {
            let ways = [("sbfd_state_in", inward), ("sbfd_state_out", outward)];
            tell(&mut event, &[unheard, ways].concat());
            let is_path_good = (inward, outward) == ("up", "up");
            let lost = News::Lost(Loss::ControlPlane { is_path_good }, "who".to_owned());
            let heard = interpret(&event, "nsc-id");
            assert_eq!(heard, Some(lost), "{inward:?}, {outward:?}");
        }
        // Old reports of the hops behind the lost one are no evidence.
        tell(&mut event, &unheard);
        let connection = event.connections.values_mut().next().expect("one");
        let path = connection.path.as_mut().expect("a path");
        let ways = ["sbfd_state_in", "sbfd_state_out"].map(|key| (key.to_owned(), "up".to_owned()));
        path.path_segments[2].metrics = ways.into();
        let is_path_good = false;
        let lost = News::Lost(Loss::ControlPlane { is_path_good }, "who".to_owned());
        assert_eq!(interpret(&event, "nsc-id"), Some(lost));
        let connection = event.connections.values_mut().next().expect("one");
        let path = connection.path.as_mut().expect("a path");
        path.path_segments[2].metrics.clear();
        // Whatever stands there: an endpoint that is gone is gone, and what is up is up.
        event.set_type(ConnectionEventType::Delete);
        let news = interpret(&event, "nsc-id");
        assert!(matches!(news, Some(News::Lost(Loss::Endpoint, _))));
        event.set_type(ConnectionEventType::Update);
        tell(&mut event, &[("sbfd_state_out", "up")]);
        let news = interpret(&event, "nsc-id");
        assert!(matches!(news, Some(News::Lost(Loss::Endpoint, _))));
        let connection = event.connections.values_mut().next().expect("one");
        connection.set_state(State::Up);
        assert_eq!(interpret(&event, "nsc-id"), Some(News::PathUp));
    }

    #[test]
    fn events_of_others_mean_nothing() {
        let down = event(ConnectionEventType::Delete, State::Down);
        assert_eq!(interpret(&down, "other"), None);
        assert_eq!(interpret(&ConnectionEvent::default(), "nsc-id"), None);
    }
}
