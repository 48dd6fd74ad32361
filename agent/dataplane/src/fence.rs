//! The fence: a table of nftables that keeps the node's IP stack and the links of connections apart.
//!
//! Frames from a pod link, and those that the external device decapsulates, are for BPF programs alone. Where a program is missing, the
//! kernel would take them for packets to the node, and route them. The table drops them before anything of the node's looks at them,
//! fragments included; it drops as well what the node's stack would send into such a link. ARP needs no rule: the links are without it.
//!
//! The same table guards the UDP ports of tunnels. What leaves the node for such a port was sent by the external device, on behalf of a
//! program that has marked it ([`nsm_ebpf_common::TUNNEL_MARK`]), or is dropped. A pod with CAP_NET_ADMIN can bind a VXLAN device of its
//! own to the node's namespace; the mark of its packets does not cross into the node's. And what arrives at the port came in by an
//! interface that leads to its source: a pod cannot send with a peer's address. Nor does the node pass on, for a pod, what goes to such a
//! port or comes from one: with the node's address on it, it would be the node's. A port is guarded only while an external device of ours
//! has it: another program that has it is not disturbed.
//!
//! The table is one of an agent: its name follows from the agent's pin directory, as agents may share a namespace. It is made, changed and replaced
//! in one transaction, so no packet meets half of it. It outlives the agent, as the links do.

mod rules;

use std::{
    collections::BTreeSet,
    io,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        ChainAttribute, ChainMessage, GenAttribute, GenMessage, NfTablesMessage, RuleAttribute,
        RuleMessage, TableAttribute, TableFlags, TableMessage,
    },
};
use nix::errno::Errno;

use sha2::{Digest as _, Sha256};

use self::rules::{Chain, Rule};
use crate::{
    bpf::DEFAULT_PIN_DIR,
    netlink::{Netlink, NetlinkError, Refusal, Request},
};

/// What a look at the fence found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// It stands as it was raised.
    Stands,
    /// It did not, and stands again.
    PutBack,
}

/// Packets that the fence has dropped since it was raised, or put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Dropped {
    /// Came in by a link of ours past its program.
    pub incoming: u64,
    /// Sent by the node's stack into a link of ours.
    pub outgoing: u64,
    /// Sent to a guarded port by somebody else on this node.
    pub foreign: u64,
    /// Arrived at a guarded port by an interface that does not lead to their source.
    pub astray: u64,
    /// To or from a guarded port, on their way through the node.
    pub forwarded: u64,
}

/// Why there is no fence, or why it is not known to stand. Without it no link may be made.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// A capability is missing.
    #[error(
        "not permitted to {action} nftables table `{table}` [{kernel}]: run the agent as root, or with CAP_NET_ADMIN"
    )]
    NotPermitted {
        /// What was tried.
        action: &'static str,
        /// The table.
        table: String,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// The kernel has no nftables, or lacks a part that the table needs.
    #[error(
        "this kernel cannot {action} nftables table `{table}` [{kernel}]: load the modules with `modprobe -a nf_tables nft_fib_inet`, or \
         enable CONFIG_NF_TABLES_INET and CONFIG_NFT_FIB_INET"
    )]
    Unsupported {
        /// What was tried.
        action: &'static str,
        /// The table.
        table: String,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// The kernel refused for another reason.
    #[error(
        "the kernel refused to {action} nftables table `{table}`: {kernel}; `nft list table inet {table}` shows what is there"
    )]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The table.
        table: String,
        /// The kernel's answer.
        kernel: Refusal,
    },
    /// Netlink itself failed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

impl From<io::Error> for FenceError {
    fn from(error: io::Error) -> Self {
        Self::Netlink(error.into())
    }
}

/// A fence that was raised in the namespace of the thread that raised it. Dropped, it stands on.
pub struct Fence {
    table: String,
    state: Mutex<State>,
}

struct State {
    netlink: Netlink<NetfilterMessage>,
    /// The ports that are guarded.
    ports: BTreeSet<u16>,
    /// The generation of the namespace's rules in which the table was last found right. Every change of any rule makes another.
    seen: Option<u32>,
}

impl Fence {
    /// Makes the table in the namespace of the calling thread, without guarding a port; or takes over that of an earlier agent, with the
    /// ports that it guards. `pin_dir` is the agent's: there is one for each agent of a machine.
    ///
    /// # Errors
    ///
    /// The kernel has no nftables, or refuses.
    pub fn raise(pin_dir: &Path) -> Result<Self, FenceError> {
        let fence = Self {
            table: table_of(pin_dir),
            state: Mutex::new(State {
                netlink: Netlink::open()?,
                ports: BTreeSet::new(),
                seen: None,
            }),
        };
        fence.take_over(&mut fence.state())?;
        Ok(fence)
    }

    fn take_over(&self, state: &mut State) -> Result<(), FenceError> {
        for chain in rules::chains(&state.ports) {
            let found = self.rules_of(state, &chain)?;
            state.ports.extend(found.iter().filter_map(rules::guarded));
        }
        self.look_with(state).map(drop)
    }

    /// Guards a port from now on: an external device of ours has it.
    ///
    /// # Errors
    ///
    /// The kernel refuses. The next look tries again.
    pub fn guard(&self, port: u16) -> Result<(), FenceError> {
        let mut state = self.state();
        if state.ports.insert(port) {
            state.seen = None;
        }
        self.look_with(&mut state).map(drop)
    }

    /// Guards a port no more: somebody else has it, or nobody.
    ///
    /// # Errors
    ///
    /// The kernel refuses. The next look tries again.
    pub fn release(&self, port: u16) -> Result<(), FenceError> {
        let mut state = self.state();
        if state.ports.remove(&port) {
            state.seen = None;
        }
        self.look_with(&mut state).map(drop)
    }

    /// Guards these ports from now on, and no others.
    ///
    /// # Errors
    ///
    /// The kernel refuses. The next look tries again.
    pub fn guard_only(&self, ports: impl IntoIterator<Item = u16>) -> Result<(), FenceError> {
        let mut state = self.state();
        let ports = ports.into_iter().collect();
        if state.ports != ports {
            state.ports = ports;
            state.seen = None;
        }
        self.look_with(&mut state).map(drop)
    }

    /// Checks that the fence stands, and puts it back where somebody has changed or removed it. Takes a few microseconds while no rule
    /// of the namespace has changed.
    ///
    /// # Errors
    ///
    /// It cannot be read, or the kernel refuses to put it back.
    pub fn look(&self) -> Result<Look, FenceError> {
        self.look_with(&mut self.state())
    }

    /// What it has dropped.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn dropped(&self) -> Result<Dropped, FenceError> {
        let state = &mut *self.state();
        let mut counts = [0; 5];
        for (count, chain) in counts.iter_mut().zip(rules::chains(&state.ports)) {
            let found = self.rules_of(state, &chain)?;
            *count = found.iter().map(rules::counted).sum();
        }
        let [incoming, outgoing, foreign, astray, forwarded] = counts;
        Ok(Dropped {
            incoming,
            outgoing,
            foreign,
            astray,
            forwarded,
        })
    }

    /// Removes the table: for an agent that has removed its links. A success when it is gone already.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn remove(&self) -> Result<(), FenceError> {
        let state = &mut *self.state();
        state.seen = None;
        let delete = NfTablesMessage::DeleteTable(self.table_message());
        match state.netlink.commit(vec![request(delete, 0)])? {
            Err(kernel) if kernel.errno != Errno::ENOENT => Err(self.refused("remove", kernel)),
            _ => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_with(&self, state: &mut State) -> Result<Look, FenceError> {
        let generation = self.generation(state)?;
        if generation.is_some() && state.seen == generation {
            return Ok(Look::Stands);
        }
        let look = if self.stands(state)? {
            Look::Stands
        } else {
            self.replace(state)?;
            Look::PutBack
        };
        // A change since the first question is found by the next look.
        state.seen = match look {
            Look::Stands => generation,
            Look::PutBack => None,
        };
        Ok(look)
    }

    /// The generation of the namespace's rules.
    fn generation(&self, state: &mut State) -> Result<Option<u32>, FenceError> {
        let get = NfTablesMessage::GetGen(GenMessage { attributes: vec![] });
        let found = self.ask(state, get)?;
        Ok(found.iter().find_map(|message| match message {
            NfTablesMessage::NewGen(generation) => {
                generation.attributes.iter().find_map(|it| match it {
                    GenAttribute::Id(id) => Some(*id),
                    _ => None,
                })
            }
            _ => None,
        }))
    }

    /// Whether table, chains and rules are as wanted.
    fn stands(&self, state: &mut State) -> Result<bool, FenceError> {
        let get = NfTablesMessage::GetTable(self.table_message());
        let table = self.ask(state, get)?;
        let is_active = table
            .iter()
            .any(|message| matches!(message, NfTablesMessage::NewTable(table) if is_active(table)));
        if !is_active {
            return Ok(false);
        }
        for chain in rules::chains(&state.ports) {
            let get = NfTablesMessage::GetChain(self.chain_message(chain.name));
            let found = self.ask(state, get)?;
            let is_hooked = found.iter().any(
                |message| matches!(message, NfTablesMessage::NewChain(found) if chain.is(found)),
            );
            if !is_hooked {
                return Ok(false);
            }
            let found = self.rules_of(state, &chain)?;
            if found.len() != chain.rules.len()
                || !chain
                    .rules
                    .iter()
                    .zip(&found)
                    .all(|(rule, found)| rule.is(found))
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn rules_of(&self, state: &mut State, chain: &Chain) -> Result<Vec<RuleMessage>, FenceError> {
        let get = NfTablesMessage::GetRule(RuleMessage {
            attributes: vec![
                RuleAttribute::Table(self.table.clone()),
                RuleAttribute::Chain(chain.name.to_owned()),
            ],
        });
        let found = match state.netlink.dump(&request(get, 0).0) {
            Ok(found) => found,
            Err(NetlinkError::Dump(kernel)) if kernel.errno == Errno::ENOENT => vec![],
            Err(NetlinkError::Dump(kernel)) => return Err(self.refused("read", kernel)),
            Err(error) => return Err(error.into()),
        };
        Ok(found
            .into_iter()
            .filter_map(|message| match message.inner {
                NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)) => Some(rule),
                _ => None,
            })
            .collect())
    }

    /// Puts the table as wanted in the place of what is there, in one transaction.
    fn replace(&self, state: &mut State) -> Result<(), FenceError> {
        let create = || {
            let mut table = self.table_message();
            let comment = rules::comment("proxy-nsmgr: see docs/operations.md");
            table.attributes.push(TableAttribute::UserData(comment));
            request(NfTablesMessage::NewTable(table), NLM_F_CREATE)
        };
        // One that is not there cannot be deleted; one that is there is as good as a new one for that.
        let delete = NfTablesMessage::DeleteTable(self.table_message());
        let mut requests = vec![create(), request(delete, 0), create()];
        for chain in rules::chains(&state.ports) {
            let mut message = self.chain_message(chain.name);
            message.attributes.extend(chain.hooked());
            requests.push(request(NfTablesMessage::NewChain(message), NLM_F_CREATE));
            let rules = chain.rules.iter();
            requests.extend(rules.map(|rule| self.rule_request(&chain, rule)));
        }
        let outcome = state.netlink.commit(requests)?;
        outcome.map_err(|kernel| self.refused("make", kernel))
    }

    fn rule_request(&self, chain: &Chain, rule: &Rule) -> Request<NetfilterMessage> {
        let message = RuleMessage {
            attributes: vec![
                RuleAttribute::Table(self.table.clone()),
                RuleAttribute::Chain(chain.name.to_owned()),
                RuleAttribute::Expressions(rule.expressions()),
            ],
        };
        request(
            NfTablesMessage::NewRule(message),
            NLM_F_CREATE | NLM_F_APPEND,
        )
    }

    /// What the kernel answers; nothing for what is not there.
    fn ask(
        &self,
        state: &mut State,
        message: NfTablesMessage,
    ) -> Result<Vec<NfTablesMessage>, FenceError> {
        let (message, flags) = request(message, 0);
        match state.netlink.ask(message, flags)? {
            Ok(found) => Ok(found
                .into_iter()
                .filter_map(|message| match message.inner {
                    NetfilterMessageInner::NfTables(message) => Some(message),
                    _ => None,
                })
                .collect()),
            Err(kernel) if kernel.errno == Errno::ENOENT => Ok(vec![]),
            Err(kernel) => Err(self.refused("read", kernel)),
        }
    }

    fn table_message(&self) -> TableMessage {
        TableMessage {
            attributes: vec![TableAttribute::Name(self.table.clone())],
        }
    }

    fn chain_message(&self, chain: &str) -> ChainMessage {
        ChainMessage {
            attributes: vec![
                ChainAttribute::Table(self.table.clone()),
                ChainAttribute::Name(chain.to_owned()),
            ],
        }
    }

    fn refused(&self, action: &'static str, kernel: Refusal) -> FenceError {
        let table = self.table.clone();
        match kernel.errno {
            Errno::EPERM => FenceError::NotPermitted {
                action,
                table,
                kernel,
            },
            // ENOENT: an expression or a family that the kernel does not have.
            Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT | Errno::ENOENT => {
                FenceError::Unsupported {
                    action,
                    table,
                    kernel,
                }
            }
            _ => FenceError::Refused {
                action,
                table,
                kernel,
            },
        }
    }
}

/// The name of an agent's table: plain for the usual pin directory, with a hash of it for another one.
fn table_of(pin_dir: &Path) -> String {
    const NAME: &str = "proxy-nsmgr";
    if pin_dir == Path::new(DEFAULT_PIN_DIR) {
        return NAME.to_owned();
    }
    let [a, b, c, d, ..]: [u8; 32] = Sha256::digest(pin_dir.as_os_str().as_encoded_bytes()).into();
    format!("{NAME}-{a:02x}{b:02x}{c:02x}{d:02x}")
}

/// A table that somebody has put to sleep drops nothing.
fn is_active(table: &TableMessage) -> bool {
    !table
        .attributes
        .iter()
        .any(|it| matches!(it, TableAttribute::Flags(flags) if flags.contains(TableFlags::Dormant)))
}

fn request(message: NfTablesMessage, flags: u16) -> Request<NetfilterMessage> {
    let header = NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0);
    (NetfilterMessage::new(header, message), flags)
}
