//! One question to one server and its answer, by UDP or TCP.
//!
//! The messages are hickory's; the sockets are ours, because of what an operator wants to hear. A
//! UDP socket is connected to its server, so that "connection refused" arrives at once instead of
//! becoming a timeout, and so that the kernel drops what anybody else sends. An answer counts when
//! its id and question are those asked (RFC 5452 section 9); id and port are random.
//!
//! Nothing here has a time limit but the retransmission: who asks holds the deadline.

use std::{
    fmt, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use hickory_proto::{
    op::{Edns, Message, MessageType, Query, ResponseCode},
    rr::{Name, RecordType},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

/// A datagram may be lost: it is sent again when a slow resolver would have answered from its cache.
const RETRANSMIT: Duration = Duration::from_millis(400);

/// What fits the path without fragments almost everywhere (DNS flag day 2020).
const UDP_PAYLOAD: u16 = 1232;

/// Servers that ignore [`UDP_PAYLOAD`] send up to this much.
const RECEIVE_BUFFER: usize = 4096;

/// A question that is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) name: Name,
    pub(super) kind: RecordType,
}

/// Why one server gave no usable answer.
#[derive(Clone, Debug)]
pub(super) enum Cause {
    /// It answered with an error code.
    Code(ResponseCode),
    /// Nothing came back.
    Silent,
    /// The host or its network refused.
    Unreachable(String),
    /// Something came back that is no answer.
    Bad(String),
}

/// Asks by UDP and, when the answer does not fit, by TCP.
pub(super) async fn by_udp(server: SocketAddr, question: &Question) -> Result<Message, Cause> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let (id, bytes) = question.encode()?;
    let answer = loop {
        socket.send(&bytes).await?;
        if let Ok(answer) = timeout(RETRANSMIT, receive(&socket, id, question)).await {
            break answer?;
        }
    };
    if answer.metadata.truncation {
        return by_tcp(server, question).await;
    }
    Ok(answer)
}

/// Asks by TCP (RFC 7766), one connection a question.
pub(super) async fn by_tcp(server: SocketAddr, question: &Question) -> Result<Message, Cause> {
    let mut stream = TcpStream::connect(server).await?;
    let (id, bytes) = question.encode()?;
    let length = u16::try_from(bytes.len()).map_err(|_| Cause::bad("the question is too long"))?;
    let framed = [&length.to_be_bytes()[..], &bytes].concat();
    let exchange = async {
        stream.write_all(&framed).await?;
        let mut answer = vec![0; stream.read_u16().await?.into()];
        stream.read_exact(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    // It took the connection, so it is there: what breaks now is a bad answer.
    let answer = exchange.await.map_err(Cause::bad)?;
    question
        .judge(id, &answer)?
        .ok_or_else(|| Cause::bad("an answer to another question"))
}

/// Waits for the answer, past whatever does not belong to the question.
async fn receive(socket: &UdpSocket, id: u16, question: &Question) -> Result<Message, Cause> {
    let mut buffer = vec![0; RECEIVE_BUFFER];
    loop {
        socket.ready(Interest::READABLE | Interest::ERROR).await?;
        // An ICMP error makes the socket ready without making it readable.
        let refused: io::Result<()> =
            socket.try_io(Interest::ERROR, || match socket.take_error()? {
                Some(error) => Err(error),
                None => Err(io::ErrorKind::WouldBlock.into()),
            });
        would_block(refused)?;
        if let Some(length) = would_block(socket.try_recv(&mut buffer))?
            && let Some(answer) = question.judge(id, &buffer[..length])?
        {
            return Ok(answer);
        }
    }
}

fn would_block<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

impl Question {
    fn encode(&self) -> Result<(u16, Vec<u8>), Cause> {
        let mut message = Message::query();
        let id = rand::random();
        message.metadata.id = id;
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(self.name.clone(), self.kind));
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD);
        message.set_edns(edns);
        let bytes = message.to_vec().map_err(Cause::bad)?;
        Ok((id, bytes))
    }

    /// The answer in `bytes`; none when they belong to something else.
    pub(super) fn judge(&self, id: u16, bytes: &[u8]) -> Result<Option<Message>, Cause> {
        if bytes.first_chunk() != Some(&id.to_be_bytes()) {
            return Ok(None);
        }
        let message = Message::from_vec(bytes).map_err(Cause::bad)?;
        let code = message.metadata.response_code;
        let failed = !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain);
        let ours = match message.queries.as_slice() {
            [query] => query.name() == &self.name && query.query_type() == self.kind,
            // A server that cannot read the question need not repeat it.
            [] => failed,
            _ => false,
        };
        if !ours || message.metadata.message_type != MessageType::Response {
            return Ok(None);
        }
        if failed {
            return Err(Cause::Code(code));
        }
        Ok(Some(message))
    }
}

impl Cause {
    fn bad(why: impl fmt::Display) -> Self {
        Self::Bad(why.to_string())
    }
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::Unreachable(error.to_string()),
        }
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.to_ascii();
        write!(f, "{} {}", self.kind, name.trim_end_matches('.'))
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(ResponseCode::ServFail) => f.write_str("SERVFAIL"),
            Self::Code(ResponseCode::Refused) => f.write_str("REFUSED"),
            Self::Code(code) => write!(f, "error code {} ({code})", u16::from(*code)),
            Self::Silent => f.write_str("no answer"),
            Self::Unreachable(why) => write!(f, "cannot be reached: {why}"),
            Self::Bad(why) => write!(f, "no usable answer: {why}"),
        }
    }
}
