//! Listening to what becomes of the connection.

use nsm_proto::connection::{
    ConnectionEvent, ConnectionEventType, State, monitor_connection_client::MonitorConnectionClient,
};
use tokio::{sync::mpsc, task::AbortHandle};
use tonic::Code;

use super::session::Session;

/// What the monitor told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum News {
    /// The path or the endpoint is gone.
    Down(String),
    /// Nothing is heard any more: the agent is gone, or its stream ended.
    Lost(String),
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
                Err(status) => status.message().to_owned(),
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
                            Err(status) => break status.message().to_owned(),
                        }
                    }
                }
            };
            let lost = News::Lost(format!("{url} is not heard any more: {reason}"));
            // The receiver is gone when the connection is not wanted any more.
            let _ = sender.send(lost).await;
        })
        .abort_handle();
        Self { news, task }
    }

    /// The next news. After [`News::Lost`] none comes.
    pub(crate) async fn next(&mut self) -> News {
        match self.news.recv().await {
            Some(news) => news,
            None => std::future::pending().await,
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
/// NSM keys the connections of an event by the id of the hop that tells; the path is the same for
/// all hops, so that is what is looked at.
fn interpret(event: &ConnectionEvent, id: &str) -> Option<News> {
    let ours = event.connections.values().find(|connection| {
        let path = connection.path.as_ref();
        let first = path.and_then(|path| path.path_segments.first());
        first.is_some_and(|segment| segment.id == id)
    })?;
    if event.r#type() == ConnectionEventType::Delete {
        return Some(News::Down("it was closed by the other side".to_owned()));
    }
    match ours.state() {
        State::Up => None,
        State::RefreshRequested => Some(News::RefreshRequested),
        State::Down => Some(News::Down("the path or the endpoint is down".to_owned())),
        State::ReselectRequested => Some(News::Down("another endpoint is wanted".to_owned())),
    }
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
        assert!(matches!(heard(Update, State::Down), Some(News::Down(_))));
        assert!(matches!(
            heard(Update, State::ReselectRequested),
            Some(News::Down(_))
        ));
        assert!(matches!(
            heard(InitialStateTransfer, State::Down),
            Some(News::Down(_))
        ));
        assert_eq!(
            heard(Update, State::RefreshRequested),
            Some(News::RefreshRequested)
        );
        assert!(matches!(heard(Delete, State::Up), Some(News::Down(_))));
    }

    #[test]
    fn events_of_others_mean_nothing() {
        let down = event(ConnectionEventType::Delete, State::Down);
        assert_eq!(interpret(&down, "other"), None);
        assert_eq!(interpret(&ConnectionEvent::default(), "nsc-id"), None);
    }
}
