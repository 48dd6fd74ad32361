//! The program of pod links: one filter on a block of filters that the clsact qdiscs of all pod links share.
//!
//! A connection then costs one qdisc, and a new agent replaces the program of all links in one step. The kernel removes the block with
//! its last link, so each attachment enters the filter again; on a block that has it, that changes nothing.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use aya::programs::SchedClassifier;
use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, Nla as _};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption},
};
use nix::errno::Errno;
use sha2::{Digest as _, Sha256};

use super::clsact::{BPF, CLSACT, HANDLE, PRIORITY, kind, options};
use crate::{
    bpf::BpfError,
    netlink::{Netlink, NetlinkError, Request},
};

/// TCA_INGRESS_BLOCK of linux/rtnetlink.h.
const INGRESS_BLOCK: u16 = 13;

/// ETH_P_ALL of linux/if_ether.h: frames of every protocol.
const ALL_PROTOCOLS: u16 = 3;

/// The block of one agent, by its number in the network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Block(u32);

/// What was found at the pod links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockFound {
    /// Whether the program is on the block.
    pub(crate) has_program: bool,
    /// Interface indexes of the links that share the block.
    pub(crate) links: HashSet<u32>,
}

impl Block {
    /// The block of the agent that pins in this directory: there is one for each agent of a machine.
    pub(crate) fn of(pin_dir: &Path) -> Self {
        let digest: [u8; 32] = Sha256::digest(pin_dir.as_os_str().as_encoded_bytes()).into();
        let [a, b, c, d, ..] = digest;
        // 0 is no block, and the number with all bits is "a block follows" to the kernel.
        Self(u32::from_be_bytes([a & 0x7f, b, c, d | 1]))
    }

    /// Puts a pod link under the program.
    pub(crate) fn attach(
        self,
        netlink: &mut Netlink,
        program: &SchedClassifier,
        link: u32,
    ) -> Result<(), BpfError> {
        let failed = |source| BpfError::PodLink { link, source };
        let filter = self.filter(program).map_err(failed)?;
        let requests = vec![self.qdisc(link), filter.clone()];
        let mut answers = transact(netlink, requests).map_err(failed)?.into_iter();
        match answers.next() {
            Some(Err(Errno::EEXIST)) if !is_on(netlink, program, link).map_err(failed)? => {
                // Somebody gave our link a qdisc of another kind or without the block.
                let again = vec![remove_qdisc(link), self.qdisc(link), filter];
                let answers = transact(netlink, again).map_err(failed)?;
                answers
                    .into_iter()
                    .skip(1)
                    .try_for_each(refused)
                    .map_err(failed)
            }
            Some(Ok(()) | Err(Errno::EEXIST)) => answers.try_for_each(refused).map_err(failed),
            Some(Err(errno)) => Err(failed(errno.into())),
            None => Err(failed(Errno::EIO.into())),
        }
    }

    /// Puts the program in place of an earlier agent's, on a block that is there; without one there is no pod link.
    pub(crate) fn replace(
        self,
        netlink: &mut Netlink,
        program: &SchedClassifier,
    ) -> Result<(), BpfError> {
        let failed = |source| BpfError::PodLink { link: 0, source };
        let filter = self.filter(program).map_err(failed)?;
        let answers = transact(netlink, vec![filter]).map_err(failed)?;
        match answers.into_iter().next() {
            Some(Err(Errno::EINVAL)) => Ok(()),
            answer => answer.into_iter().try_for_each(refused).map_err(failed),
        }
    }

    /// Which links share the block, and whether it has the program with this identifier.
    pub(crate) fn look(self, netlink: &mut Netlink, program: u32) -> Result<BlockFound, BpfError> {
        let failed = |error: NetlinkError| BpfError::PodLink {
            link: 0,
            source: io::Error::other(error),
        };
        let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        let qdiscs = netlink.dump(&request).map_err(failed)?;
        let links: HashSet<u32> = qdiscs
            .iter()
            .filter_map(|found| match found {
                RouteNetlinkMessage::NewQueueDiscipline(qdisc) if self.is_shared_by(qdisc) => {
                    Some(qdisc.header.index.cast_unsigned())
                }
                _ => None,
            })
            .collect();
        let has_program = !links.is_empty() && self.has(netlink, program).map_err(failed)?;
        Ok(BlockFound { has_program, links })
    }

    fn is_shared_by(self, qdisc: &TcMessage) -> bool {
        kind(qdisc).as_deref() == Some(CLSACT)
            && qdisc.attributes.iter().any(|attribute| match attribute {
                TcAttribute::Other(other) if other.kind() == INGRESS_BLOCK => {
                    let mut value = vec![0; other.value_len()];
                    other.emit_value(&mut value);
                    value == self.0.to_ne_bytes()
                }
                _ => false,
            })
    }

    fn has(self, netlink: &mut Netlink, program: u32) -> Result<bool, NetlinkError> {
        let request = RouteNetlinkMessage::GetTrafficFilter(self.message());
        has_program(netlink, &request, program)
    }

    /// A message about the block itself.
    fn message(self) -> TcMessage {
        let mut message = TcMessage::default();
        message.header.index = TcHeader::TCM_IFINDEX_MAGIC_BLOCK.cast_signed();
        message.header.parent = TcHandle::from(self.0);
        message
    }

    fn filter(self, program: &SchedClassifier) -> io::Result<Request> {
        let fd = program.fd().map_err(io::Error::other)?.as_fd().as_raw_fd();
        let mut message = self.message();
        message.header.handle = TcHandle::from(u32::from(HANDLE));
        message.header.info = u32::from(PRIORITY) << 16 | u32::from(ALL_PROTOCOLS.to_be());
        message.attributes = vec![
            TcAttribute::Kind(BPF.to_owned()),
            TcAttribute::Options(vec![
                TcOption::Bpf(TcFilterBpfOption::ProgFd(fd.cast_unsigned())),
                TcOption::Bpf(TcFilterBpfOption::ProgName(super::POD_INGRESS.to_owned())),
                TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
            ]),
        ];
        Ok((RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE))
    }

    fn qdisc(self, link: u32) -> Request {
        let mut message = qdisc_of(link);
        message.attributes = vec![
            TcAttribute::Kind(CLSACT.to_owned()),
            TcAttribute::Other(DefaultNla::new(
                INGRESS_BLOCK,
                self.0.to_ne_bytes().to_vec(),
            )),
        ];
        let request = RouteNetlinkMessage::NewQueueDiscipline(message);
        (request, NLM_F_CREATE | NLM_F_EXCL)
    }
}

/// Whether a program is asked for what comes in by a link.
fn is_on(netlink: &mut Netlink, program: &SchedClassifier, link: u32) -> io::Result<bool> {
    let id = program.info().map_err(io::Error::other)?.id();
    let mut message = TcMessage::with_index(link.cast_signed());
    message.header.parent = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: TcHandle::MIN_INGRESS,
    };
    let request = RouteNetlinkMessage::GetTrafficFilter(message);
    has_program(netlink, &request, id).map_err(io::Error::other)
}

fn has_program(
    netlink: &mut Netlink,
    request: &RouteNetlinkMessage,
    program: u32,
) -> Result<bool, NetlinkError> {
    let ours = TcFilterBpfOption::ProgId(program);
    Ok(netlink.dump(request)?.iter().any(|found| match found {
        RouteNetlinkMessage::NewTrafficFilter(filter) => {
            options(filter).any(|option| matches!(option, TcOption::Bpf(it) if *it == ours))
        }
        _ => false,
    }))
}

fn qdisc_of(link: u32) -> TcMessage {
    let mut message = TcMessage::with_index(link.cast_signed());
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    message
}

fn remove_qdisc(link: u32) -> Request {
    (RouteNetlinkMessage::DelQueueDiscipline(qdisc_of(link)), 0)
}

fn transact(netlink: &mut Netlink, requests: Vec<Request>) -> io::Result<Vec<Result<(), Errno>>> {
    let answers = netlink.transact(requests).map_err(io::Error::other)?;
    let answers = answers.into_iter();
    Ok(answers
        .map(|answer| answer.map(drop).map_err(|refusal| refusal.errno))
        .collect())
}

fn refused(answer: Result<(), Errno>) -> io::Result<()> {
    answer.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_that_pin_elsewhere_have_another_block() {
        let blocks = ["/sys/fs/bpf/a", "/sys/fs/bpf/b"].map(|dir| Block::of(Path::new(dir)));
        assert_ne!(blocks[0], blocks[1]);
        assert!(blocks.iter().all(|block| block.0 != 0 && block.0 < 1 << 31));
    }
}
