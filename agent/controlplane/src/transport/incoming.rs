//! Messages on their way in: what has arrived of one that is not whole is charged to who sends it.
//!
//! A message is read when it is whole. A caller may open a thousand streams on each of its connections and leave every message one byte
//! short; without a limit all of that would be kept.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http_body::Frame;
use nsm_core::identity::share::Holder;
use tonic::{Status, body::Body, codegen::Bytes, transport::server::TcpConnectInfo};

use crate::{
    places::{Place, Places},
    transport::{
        clients::{Clients, Origin},
        unix::NodePeer,
    },
};

/// Charges the messages of one listener.
#[derive(Debug, Clone)]
pub(crate) struct Incoming {
    clients: Clients,
    bytes: Places,
}

impl Incoming {
    /// The callers are those of `clients`.
    pub(crate) const fn of(clients: Clients, bytes: Places) -> Self {
        Self { clients, bytes }
    }

    /// The same call; its message is charged as it arrives, until it has been read.
    pub(crate) fn charge(&self, request: http::Request<Body>) -> http::Request<Body> {
        let extensions = request.extensions();
        let process = extensions
            .get::<NodePeer>()
            .map(|peer| peer.process.origin());
        let address = || extensions.get::<TcpConnectInfo>()?.remote_addr();
        let origin = process.or_else(|| Some(Origin::Address(address()?.ip())));
        let holder = self.clients.holder(origin);
        request.map(|body| {
            Body::new(Charged {
                body,
                place: None,
                holder,
                bytes: self.bytes.clone(),
            })
        })
    }
}

/// The body of a call.
struct Charged {
    body: Body,
    /// None before the first byte.
    place: Option<Place>,
    holder: Holder,
    bytes: Places,
}

impl Charged {
    fn grow(&mut self, amount: usize) -> Result<(), Status> {
        let taken = match &mut self.place {
            Some(place) => place.grow(amount),
            None => {
                let taken = self.bytes.take(self.holder, amount);
                taken.map(|place| self.place = Some(place))
            }
        };
        taken.map_err(|full| Status::resource_exhausted(full.to_string()))
    }
}

impl http_body::Body for Charged {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context)?);
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            self.grow(data.len())?;
        }
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}
