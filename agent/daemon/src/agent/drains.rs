//! Requests to close everything and end, from the admin socket to the part that ends the agent.

use tokio::sync::{mpsc, oneshot};

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Drained {
    /// Connections that were closed.
    pub(crate) closed: usize,
    /// Those whose close took too long.
    pub(crate) left: usize,
}

/// Asks for the agent's end.
#[derive(Debug, Clone)]
pub(crate) struct Drains {
    sender: mpsc::Sender<oneshot::Sender<Drained>>,
}

/// The requests.
pub(crate) struct Asked {
    receiver: mpsc::Receiver<oneshot::Sender<Drained>>,
}

/// Both ends.
pub(crate) fn channel() -> (Drains, Asked) {
    let (sender, receiver) = mpsc::channel(1);
    (Drains { sender }, Asked { receiver })
}

impl Drains {
    /// Has everything closed, and waits for that. None: the agent is ending already.
    pub(crate) async fn ask(&self) -> Option<Drained> {
        let (answer, answered) = oneshot::channel();
        self.sender.try_send(answer).ok()?;
        answered.await.ok()
    }
}

impl Asked {
    /// The next request: where its outcome goes. Pends for ever where none can come any more.
    pub(crate) async fn next(&mut self) -> oneshot::Sender<Drained> {
        match self.receiver.recv().await {
            Some(answer) => answer,
            None => std::future::pending().await,
        }
    }
}
