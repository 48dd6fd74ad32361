//! A netlink socket that asks and waits for the answers: of rtnetlink, or of nftables.
//!
//! The kernel works inside the `send` call: when it returns, the answers lie in the receive queue. An asynchronous socket would gain
//! nothing and cost hops between tasks, so this one blocks, and its user has a thread of its own: a namespace is entered by a thread,
//! and a socket belongs to the one where it was opened. Several requests can go in one call; the kernel works on each and
//! acknowledges each, whatever became of the others.
//!
//! The socket asks for extended acknowledgements and keeps the kernel's own message ([`Refusal`]): often only that has the reason. netlink-packet-core leaves their attributes undecoded, hence the few lines that read them.
//!
//! The crate `rtnetlink` builds most messages (`links::message`), but its `Handle` does not send them: it is asynchronous, with a task
//! that drives the socket; it never asks for extended acknowledgements, and of a refusal it hands on the number and undecoded bytes
//! without the flags that show where the kernel's message (NLMSGERR_ATTR_MSG) is in them.

use std::{fmt, io, marker::PhantomData};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NLMSG_OVERRUN, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterProtoFamily, NetfilterSubsystem,
    none::ControlMessage,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use nix::errno::Errno;

/// The length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// The length of the number that an error message starts with.
const CODE: usize = 4;

/// NLMSGERR_ATTR_MSG of linux/netlink.h: the kernel's message.
const ATTR_MSG: u16 = 1;

/// Room for one answer. The kernel fills dumps up to what the last call offered, 32 KiB at most; single answers are smaller.
const BUFFER: usize = 64 * 1024;

/// Requests sent in one call. Each acknowledgement takes about 1 KiB of the receive queue, which has 208 KiB by default.
const BATCH: usize = 64;

/// How often a dump is repeated that was inconsistent because things changed meanwhile.
const DUMP_ATTEMPTS: usize = 8;

/// An error of the kernel, with its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The error number.
    pub errno: Errno,
    /// The kernel's message, if there is one (NETLINK_EXT_ACK).
    pub text: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The kernel's message first: the number alone is often unclear ("Math result not representable" for a bad length).
        let text = self.text.as_deref().unwrap_or(self.errno.desc());
        write!(f, "{text} ({:?})", self.errno)
    }
}

/// A failure of the talk itself, not of what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket failed.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// An answer that cannot be read.
    #[error("netlink answer of the kernel cannot be read: {0}")]
    Malformed(String),
    /// A dump was refused.
    #[error("netlink dump: {0}")]
    Dump(Refusal),
    /// Things changed during every attempt.
    #[error(
        "netlink dump was interrupted by changes {DUMP_ATTEMPTS} times: too much happens in the namespace, try again"
    )]
    Interrupted,
}

/// What a request got: the messages that it asked for, none for most; or a refusal.
pub(crate) type Answer<M = RouteNetlinkMessage> = Result<Vec<M>, Refusal>;

/// A request with its flags beyond REQUEST and ACK.
pub(crate) type Request<M = RouteNetlinkMessage> = (M, u16);

/// The messages of one of netlink's protocols.
pub(crate) trait Protocol: NetlinkSerializable + NetlinkDeserializable + Clone {
    /// Its number, as socket(2) takes it.
    const NUMBER: isize;
}

impl Protocol for RouteNetlinkMessage {
    const NUMBER: isize = NETLINK_ROUTE;
}

impl Protocol for NetfilterMessage {
    const NUMBER: isize = NETLINK_NETFILTER;
}

/// A socket in the namespace where it was opened.
pub(crate) struct Netlink<M = RouteNetlinkMessage> {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    messages: PhantomData<M>,
}

impl Netlink<NetfilterMessage> {
    /// Sends requests that change rules, as one transaction: all are carried out, or none because of the refusal.
    pub(crate) fn commit(
        &mut self,
        requests: Vec<Request<NetfilterMessage>>,
    ) -> Result<Result<(), Refusal>, NetlinkError> {
        let control = |message: ControlMessage| {
            // The batch is for the subsystem that is named in the place of a resource.
            let header = NetfilterHeader::new(
                NetfilterProtoFamily::Unspec,
                0,
                u8::from(NetfilterSubsystem::NfTables).into(),
            );
            NetfilterMessage::new(header, message)
        };
        let (first, mut bytes) = (self.sequence.wrapping_add(1), Vec::new());
        let count = requests.len();
        self.serialize(
            control(ControlMessage::BatchBegin),
            NLM_F_REQUEST,
            &mut bytes,
        );
        for (at, (message, flags)) in requests.into_iter().enumerate() {
            let acknowledge = if at + 1 == count { NLM_F_ACK } else { 0 };
            self.serialize(message, NLM_F_REQUEST | flags | acknowledge, &mut bytes);
        }
        self.serialize(control(ControlMessage::BatchEnd), NLM_F_REQUEST, &mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut outcome = None;
        while outcome.is_none() {
            self.receive(|message| {
                let at = message.sequence.wrapping_sub(first) as usize;
                // A refusal may be of the batch as a whole. What does not belong to this call is left of an earlier one.
                if at <= count + 1 && message.kind == NLMSG_ERROR && outcome.is_none() {
                    outcome = Some(message.acknowledgement()?);
                }
                Ok(())
            })?;
        }
        Ok(outcome.unwrap_or(Ok(())))
    }
}

impl<M: Protocol> Netlink<M> {
    /// Opens a socket in the namespace of the calling thread.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(M::NUMBER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        // The kernel then checks dump requests and filters by their fields (Linux 4.20).
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: Vec::with_capacity(BUFFER),
            messages: PhantomData,
        })
    }

    /// Sends the requests and waits for all answers, one a request in the same order.
    pub(crate) fn transact(
        &mut self,
        requests: Vec<Request<M>>,
    ) -> Result<Vec<Answer<M>>, NetlinkError> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter();
        loop {
            let batch: Vec<Request<M>> = requests.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                return Ok(answers);
            }
            self.transact_batch(batch, &mut answers)?;
        }
    }

    /// One request.
    pub(crate) fn ask(&mut self, message: M, flags: u16) -> Result<Answer<M>, NetlinkError> {
        let answer = self.transact(vec![(message, flags)])?.pop();
        answer.ok_or_else(|| NetlinkError::Malformed("no answer".to_owned()))
    }

    /// All that match.
    pub(crate) fn dump(&mut self, message: &M) -> Result<Vec<M>, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(found) = self.dump_once(message.clone())? {
                return Ok(found);
            }
        }
        Err(NetlinkError::Interrupted)
    }

    fn transact_batch(
        &mut self,
        batch: Vec<Request<M>>,
        answers: &mut Vec<Answer<M>>,
    ) -> Result<(), NetlinkError> {
        let (first, count) = (self.sequence.wrapping_add(1), batch.len());
        let mut bytes = Vec::new();
        for (message, flags) in batch {
            self.serialize(message, NLM_F_REQUEST | NLM_F_ACK | flags, &mut bytes);
        }
        self.socket.send(&bytes, 0)?;

        let mut open: Vec<Option<Answer<M>>> = vec![None; count];
        let mut found: Vec<Vec<M>> = vec![Vec::new(); count];
        while open.iter().any(Option::is_none) {
            self.receive(|message| {
                let at = message.sequence.wrapping_sub(first) as usize;
                // What does not belong to this call is left of one that was given up.
                if at >= count {
                    return Ok(());
                }
                match message.kind {
                    NLMSG_ERROR => {
                        open[at] = Some(
                            message
                                .acknowledgement()?
                                .map(|()| std::mem::take(&mut found[at])),
                        )
                    }
                    _ => found[at].extend(message.decode()),
                }
                Ok(())
            })?;
        }
        answers.extend(open.into_iter().flatten());
        Ok(())
    }

    /// None: interrupted.
    fn dump_once(&mut self, message: M) -> Result<Option<Vec<M>>, NetlinkError> {
        let mut bytes = Vec::new();
        self.serialize(message, NLM_F_REQUEST | NLM_F_DUMP, &mut bytes);
        self.socket.send(&bytes, 0)?;

        let sequence = self.sequence;
        let (mut found, mut done, mut interrupted) = (Vec::new(), false, false);
        while !done {
            self.receive(|message| {
                if message.sequence != sequence {
                    return Ok(());
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    // The end of a dump carries its result as an acknowledgement does.
                    NLMSG_DONE | NLMSG_ERROR => {
                        done = true;
                        message.acknowledgement()?.map_err(NetlinkError::Dump)?;
                    }
                    _ => found.extend(message.decode()),
                }
                Ok(())
            })?;
        }
        Ok((!interrupted).then_some(found))
    }

    fn serialize(&mut self, message: M, flags: u16, bytes: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = bytes.len();
        // Every message starts at a multiple of four (NLMSG_ALIGNTO).
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    /// Reads one datagram and hands on its messages.
    fn receive(
        &mut self,
        mut handle: impl FnMut(Raw<'_>) -> Result<(), NetlinkError>,
    ) -> Result<(), NetlinkError> {
        self.buffer.clear();
        loop {
            match self.socket.recv(&mut self.buffer, nix::libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => {
                    return Err(NetlinkError::Malformed(format!(
                        "{length} bytes, more than the buffer's {BUFFER}"
                    )));
                }
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut rest = self.buffer.as_slice();
        while !rest.is_empty() {
            let (message, after) = Raw::split(rest)?;
            if message.kind == NLMSG_OVERRUN {
                return Err(NetlinkError::Malformed("answers were lost".to_owned()));
            }
            handle(message)?;
            rest = after;
        }
        Ok(())
    }
}

/// One message of a datagram.
struct Raw<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    /// With the header.
    bytes: &'a [u8],
}

impl<'a> Raw<'a> {
    fn split(datagram: &'a [u8]) -> Result<(Self, &'a [u8]), NetlinkError> {
        let short =
            || NetlinkError::Malformed(format!("a message of {} bytes is cut off", datagram.len()));
        let length = u32_at(datagram, 0).ok_or_else(short)? as usize;
        let bytes = datagram
            .get(..length)
            .filter(|bytes| bytes.len() >= HEADER)
            .ok_or_else(short)?;
        let message = Self {
            kind: u16_at(bytes, 4).ok_or_else(short)?,
            flags: u16_at(bytes, 6).ok_or_else(short)?,
            sequence: u32_at(bytes, 8).ok_or_else(short)?,
            bytes,
        };
        Ok((
            message,
            datagram
                .get(length.next_multiple_of(4)..)
                .unwrap_or_default(),
        ))
    }

    /// The message, or nothing when the decoder cannot read all of it: it is then about something that is not ours, such as a device of
    /// a kind newer than the decoder, and must not stop the rest.
    fn decode<M: Protocol>(&self) -> Option<M> {
        match NetlinkMessage::<M>::deserialize(self.bytes) {
            Ok(NetlinkMessage {
                payload: NetlinkPayload::InnerMessage(message),
                ..
            }) => Some(message),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(%error, kind = self.kind, "netlink message left out: it cannot be decoded");
                None
            }
        }
    }

    /// Reads an NLMSG_ERROR or NLMSG_DONE.
    fn acknowledgement(&self) -> Result<Result<(), Refusal>, NetlinkError> {
        let code = u32_at(self.bytes, HEADER).ok_or_else(|| {
            NetlinkError::Malformed("an acknowledgement without its number".to_owned())
        })?;
        let code = code.cast_signed();
        if code >= 0 {
            return Ok(Ok(()));
        }
        Ok(Err(Refusal {
            errno: Errno::from_raw(code.saturating_neg()),
            text: self.kernel_text(),
        }))
    }

    /// The kernel's message: attributes behind the number and, in an NLMSG_ERROR, behind the request that it repeats, all of it or
    /// (NLM_F_CAPPED) its header alone.
    fn kernel_text(&self) -> Option<String> {
        if self.flags & NLM_F_ACK_TLVS == 0 {
            return None;
        }
        let repeated = match self.kind {
            NLMSG_ERROR if self.flags & NLM_F_CAPPED != 0 => HEADER,
            NLMSG_ERROR => (u32_at(self.bytes, HEADER + CODE)? as usize).next_multiple_of(4),
            _ => 0,
        };
        let mut attributes = self.bytes.get(HEADER + CODE + repeated..)?;
        loop {
            let (length, kind) = (usize::from(u16_at(attributes, 0)?), u16_at(attributes, 2)?);
            let value = attributes.get(4..length)?;
            if kind == ATTR_MSG {
                let text = value.split(|&byte| byte == 0).next()?;
                return Some(String::from_utf8_lossy(text).into_owned());
            }
            attributes = attributes.get(length.next_multiple_of(4)..)?;
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};
    use proptest::prelude::*;

    use super::*;

    /// An NLMSG_ERROR as Linux sends it with NETLINK_CAP_ACK and NETLINK_EXT_ACK.
    fn refusal(errno: Errno, text: &str) -> Vec<u8> {
        let value = [text.as_bytes(), b"\0"].concat();
        // First an attribute that is not the text: the offset of the bad attribute.
        let mut attributes = [
            &8u16.to_ne_bytes()[..],
            &2u16.to_ne_bytes(),
            &36u32.to_ne_bytes(),
        ]
        .concat();
        attributes.extend(u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
        attributes.extend(ATTR_MSG.to_ne_bytes());
        attributes.extend(&value);
        attributes.resize(attributes.len().next_multiple_of(4), 0);
        let length = u32::try_from(HEADER + CODE + HEADER + attributes.len()).unwrap();
        [
            &length.to_ne_bytes()[..],
            &NLMSG_ERROR.to_ne_bytes(),
            &(NLM_F_ACK_TLVS | NLM_F_CAPPED).to_ne_bytes(),
            &7u32.to_ne_bytes(),
            &0u32.to_ne_bytes(),
            &(-(errno as i32)).to_ne_bytes(),
            &[0; HEADER],
            &attributes,
        ]
        .concat()
    }

    #[test]
    fn keeps_the_kernels_words() {
        let bytes = refusal(
            Errno::EEXIST,
            "A VXLAN device with the specified VNI already exists",
        );
        let (message, rest) = Raw::split(&bytes).unwrap();
        assert!(rest.is_empty());
        assert_eq!(message.sequence, 7);
        let refusal = message.acknowledgement().unwrap().unwrap_err();
        assert_eq!(refusal.errno, Errno::EEXIST);
        assert_eq!(
            refusal.to_string(),
            "A VXLAN device with the specified VNI already exists (EEXIST)"
        );
    }

    #[test]
    fn the_kernel_answers() {
        let mut netlink = Netlink::<RouteNetlinkMessage>::open().unwrap();
        let lookup = |name: &str| {
            let mut message = LinkMessage::default();
            message
                .attributes
                .push(LinkAttribute::IfName(name.to_owned()));
            (RouteNetlinkMessage::GetLink(message), 0)
        };
        let answers = netlink
            .transact(vec![lookup("lo"), lookup("no-such-link"), lookup("lo")])
            .unwrap();
        assert_eq!(answers.len(), 3);
        assert!(
            matches!(answers[0].as_deref(), Ok([RouteNetlinkMessage::NewLink(_)])),
            "{answers:?}"
        );
        assert_eq!(answers[1].as_ref().unwrap_err().errno, Errno::ENODEV);
        assert!(answers[2].is_ok());
        // More than one call's worth.
        let many = netlink
            .transact((0..3 * BATCH + 1).map(|_| lookup("lo")).collect())
            .unwrap();
        assert_eq!(
            many.iter().filter(|answer| answer.is_ok()).count(),
            3 * BATCH + 1
        );

        let all = netlink
            .dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))
            .unwrap();
        assert!(!all.is_empty());
    }

    proptest! {
        #[test]
        fn no_datagram_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), flags: u16) {
            if let Ok((mut message, _)) = Raw::split(&bytes) {
                message.flags = flags;
                let _ = message.acknowledgement();
                let _ = message.decode::<RouteNetlinkMessage>();
                let _ = message.decode::<NetfilterMessage>();
            }
        }

        #[test]
        fn no_cut_refusal_panics(cut in 0usize..200, at in 0usize..200, byte: u8) {
            let mut bytes = refusal(Errno::EEXIST, "words");
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len() - cut % bytes.len());
            if let Ok((message, _)) = Raw::split(&bytes) {
                let _ = message.acknowledgement();
            }
        }
    }
}
