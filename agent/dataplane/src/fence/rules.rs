//! The chains and rules of the fence: as they are wanted, and whether what the kernel shows is that.
//!
//! The kernel shows a rule as the attributes that it was made of, sometimes with more: those are not compared.

use std::collections::BTreeSet;

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions,
    Hook, HookNumber, Immediate, InetHookNumber, ListAttribute, Meta, MetaKey, Operator, Payload,
    Register, RuleAttribute, RuleMessage, Verdict, VerdictAttribute,
};
use nsm_core::link::{NODE_GROUP, NODE_GROUP_MASK};
use nsm_ebpf_common::TUNNEL_MARK;

/// NF_IP_PRI_RAW_BEFORE_DEFRAG of linux/netfilter_ipv4.h, which is the same for IPv6: before fragments are reassembled and connections
/// are tracked.
const PRIORITY: i32 = -450;

/// NF_ACCEPT and NF_DROP of linux/netfilter.h.
const ACCEPT: u32 = 1;
const DROP: u32 = 0;

/// The kind of a chain that drops or accepts.
const FILTER: &str = "filter";

/// The name of the expression that counts. Its attributes are what it has counted.
const COUNTER: &str = "counter";

/// NFTA_COUNTER_PACKETS of linux/netfilter/nf_tables.h.
const COUNTER_PACKETS: u16 = 2;

/// NFT_PAYLOAD_TRANSPORT_HEADER.
const TRANSPORT_HEADER: u32 = 2;

/// Where a UDP header has the source port, bytes.
const SOURCE_PORT: u32 = 0;

/// Where it has the destination port, bytes.
const DESTINATION_PORT: u32 = 2;

/// The length of a port, bytes.
const PORT_LENGTH: u32 = 2;

/// A chain of the table.
pub(super) struct Chain {
    pub(super) name: &'static str,
    hook: InetHookNumber,
    pub(super) rules: Vec<Rule>,
}

/// A rule: what it matches, and what becomes of that.
pub(super) struct Rule(Vec<Expressions>);

/// The chains of the table, in the order of the fields of [`Dropped`](super::Dropped).
pub(super) fn chains(ports: &BTreeSet<u16>) -> [Chain; 5] {
    [
        Chain {
            name: "incoming",
            hook: InetHookNumber::PreRouting,
            rules: vec![Rule::drop_group(MetaKey::Iifgroup)],
        },
        Chain {
            name: "outgoing",
            hook: InetHookNumber::PostRouting,
            rules: vec![Rule::drop_group(MetaKey::Oifgroup)],
        },
        Chain {
            name: "sending",
            hook: InetHookNumber::LocalOut,
            rules: ports
                .iter()
                .flat_map(|port| [Rule::drop_unmarked(*port), Rule::unmark(*port)])
                .collect(),
        },
        Chain {
            name: "arriving",
            hook: InetHookNumber::LocalIn,
            rules: ports.iter().map(|port| Rule::drop_astray(*port)).collect(),
        },
        Chain {
            name: "forwarding",
            hook: InetHookNumber::Forward,
            rules: ports
                .iter()
                .flat_map(|port| [DESTINATION_PORT, SOURCE_PORT].map(|side| (*port, side)))
                .map(|(port, side)| Rule::drop_forwarded(port, side))
                .collect(),
        },
    ]
}

/// A comment as `nft` shows it: an attribute of kind 0 (NFTNL_UDATA_TABLE_COMMENT), with its length and a closing zero.
pub(super) fn comment(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len() + 1).expect("a comment has less than 255 bytes");
    [&[0, length], text.as_bytes(), &[0]].concat()
}

/// The port that a rule guards.
pub(super) fn guarded(rule: &RuleMessage) -> Option<u16> {
    expressions_of(rule).find_map(|expression| {
        let Expressions::Cmp(attributes) = expression else {
            return None;
        };
        attributes.iter().find_map(|attribute| match attribute {
            Cmp::Data(DataAttribute::Value(bytes)) => {
                let port: [u8; 2] = bytes.as_slice().try_into().ok()?;
                Some(u16::from_be_bytes(port))
            }
            _ => None,
        })
    })
}

/// How many packets a rule has counted.
pub(super) fn counted(rule: &RuleMessage) -> u64 {
    let counters = expressions_of(rule).filter_map(|expression| match expression {
        Expressions::Other {
            expression_type,
            attributes,
        } if expression_type == COUNTER => Some(attributes),
        _ => None,
    });
    counters.flatten().filter_map(packets).sum()
}

fn packets(attribute: &DefaultNla) -> Option<u64> {
    use netlink_packet_core::Nla as _;
    let mut bytes = [0; 8];
    if attribute.kind() != COUNTER_PACKETS || attribute.value_len() != bytes.len() {
        return None;
    }
    attribute.emit_value(&mut bytes);
    Some(u64::from_be_bytes(bytes))
}

impl Chain {
    /// What makes it a chain that packets pass.
    pub(super) fn hooked(&self) -> [ChainAttribute; 3] {
        [
            ChainAttribute::Hook(vec![
                Hook::Number(HookNumber::Inet(self.hook)),
                Hook::Priority(PRIORITY.cast_unsigned()),
            ]),
            ChainAttribute::Type(FILTER.to_owned()),
            ChainAttribute::Policy(ACCEPT),
        ]
    }

    /// Whether this chain is shown.
    pub(super) fn is(&self, shown: &ChainMessage) -> bool {
        self.hooked().iter().all(|wanted| match wanted {
            ChainAttribute::Hook(wanted) => shown
                .attributes
                .iter()
                .any(|it| matches!(it, ChainAttribute::Hook(shown) if contains_all(shown, wanted))),
            wanted => shown.attributes.contains(wanted),
        })
    }
}

impl Rule {
    /// Drops what comes in, or goes out, by a link of ours on the node.
    fn drop_group(key: MetaKey) -> Self {
        Self(vec![
            load(key),
            masked(NODE_GROUP_MASK),
            compare(Operator::Equal, &NODE_GROUP.to_ne_bytes()),
            counter(),
            verdict(DROP),
        ])
    }

    /// Drops UDP to the tunnels' port that has not the mark of our programs.
    fn drop_unmarked(port: u16) -> Self {
        let mut expressions = to_port(port);
        expressions.extend([
            load(MetaKey::Mark),
            compare(Operator::NotEqual, &TUNNEL_MARK.to_ne_bytes()),
            counter(),
            verdict(DROP),
        ]);
        Self(expressions)
    }

    /// Takes the mark off, so that it means nothing to the rules of others.
    fn unmark(port: u16) -> Self {
        let mut expressions = to_port(port);
        expressions.extend([
            Expressions::Immediate(vec![
                Immediate::DestinationRegister(Register::Reg1),
                Immediate::Data(value(&0u32.to_ne_bytes())),
            ]),
            Expressions::Meta(vec![
                Meta::Key(MetaKey::Mark),
                Meta::SourceRegister(Register::Reg1),
            ]),
        ]);
        Self(expressions)
    }

    /// Drops UDP to the tunnels' port that came in by an interface which is none of the underlay: our program there has not marked it, and
    /// its source is not reached by that interface. A peer's packets may well come by another way than ours go. What the node sends to
    /// itself is left to [`Self::drop_unmarked`]: no route leads back through the loopback.
    fn drop_astray(port: u16) -> Self {
        let mut expressions = to_port(port);
        expressions.extend([
            load(MetaKey::Iftype),
            compare(Operator::NotEqual, &LOOPBACK.to_ne_bytes()),
            load(MetaKey::Mark),
            // Others may have set bits of their own meanwhile.
            masked(TUNNEL_MARK),
            compare(Operator::NotEqual, &TUNNEL_MARK.to_ne_bytes()),
            route_back(),
            compare(Operator::Equal, &0u32.to_ne_bytes()),
            counter(),
            verdict(DROP),
        ]);
        Self(expressions)
    }

    /// Drops UDP to the tunnels' port, or from it, that the node would pass on for a pod. Where the node gives such packets its own address
    /// (masquerade), as most networks of clusters do, those to the port would be the node's to its peers, and those from it would have the
    /// peers' answers, which are the packets of tunnels, led to the pod.
    fn drop_forwarded(port: u16, side: u32) -> Self {
        let mut expressions = with_port(port, side);
        expressions.extend([counter(), verdict(DROP)]);
        Self(expressions)
    }

    pub(super) fn expressions(&self) -> Vec<ListAttribute<ExpressionAttribute>> {
        self.0.iter().cloned().map(ListAttribute::from).collect()
    }

    /// Whether this rule is shown.
    pub(super) fn is(&self, shown: &RuleMessage) -> bool {
        let mut shown = expressions_of(shown);
        self.0.iter().all(|wanted| {
            shown
                .next()
                .is_some_and(|shown| is_expression(wanted, shown))
        }) && shown.next().is_none()
    }
}

fn is_expression(wanted: &Expressions, shown: &Expressions) -> bool {
    match (wanted, shown) {
        (Expressions::Bitwise(wanted), Expressions::Bitwise(shown)) => contains_all(shown, wanted),
        (Expressions::Cmp(wanted), Expressions::Cmp(shown)) => contains_all(shown, wanted),
        (Expressions::Immediate(wanted), Expressions::Immediate(shown)) => {
            contains_all(shown, wanted)
        }
        (Expressions::Meta(wanted), Expressions::Meta(shown)) => contains_all(shown, wanted),
        (Expressions::Payload(wanted), Expressions::Payload(shown)) => contains_all(shown, wanted),
        (
            Expressions::Other {
                expression_type: wanted,
                attributes: wanted_attributes,
            },
            Expressions::Other {
                expression_type: shown,
                attributes: shown_attributes,
            },
        ) => wanted == shown && contains_all(shown_attributes, wanted_attributes),
        _ => false,
    }
}

fn contains_all<T: PartialEq>(shown: &[T], wanted: &[T]) -> bool {
    wanted.iter().all(|attribute| shown.contains(attribute))
}

fn expressions_of(rule: &RuleMessage) -> impl Iterator<Item = &Expressions> {
    let lists = rule.attributes.iter().filter_map(|it| match it {
        RuleAttribute::Expressions(list) => Some(list),
        _ => None,
    });
    let elements = lists.flatten().filter_map(|it| match it {
        ListAttribute::Element(attributes) => Some(attributes),
        _ => None,
    });
    elements.flatten().filter_map(|it| match it {
        ExpressionAttribute::Data(expression) => Some(expression),
        _ => None,
    })
}

/// UDP to this port. Fragments get by no rule: what the node sends is not fragmented yet, and IPv4 for the node is reassembled before. Of
/// IPv6 the first fragment is judged, without which nothing is reassembled; the kernel drops one that does not reach to the port.
fn to_port(port: u16) -> Vec<Expressions> {
    with_port(port, DESTINATION_PORT)
}

/// UDP with this port at a place of the header.
fn with_port(port: u16, offset: u32) -> Vec<Expressions> {
    vec![
        load(MetaKey::L4Proto),
        compare(Operator::Equal, &[UDP]),
        Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Reg1),
            Payload::Base(TRANSPORT_HEADER),
            Payload::Offset(offset),
            Payload::Len(PORT_LENGTH),
        ]),
        compare(Operator::Equal, &port.to_be_bytes()),
    ]
}

/// IPPROTO_UDP.
const UDP: u8 = 17;

/// ARPHRD_LOOPBACK of linux/if_arp.h.
const LOOPBACK: u16 = 772;

/// Loads whether the packet's source is reached by the interface that the packet came in by. Attributes and values are those of enum nft_fib_attributes, nft_fib_result and nft_fib_flags of
/// linux/netfilter/nf_tables.h.
fn route_back() -> Expressions {
    const DESTINATION_REGISTER: u16 = 1;
    const RESULT: u16 = 2;
    const FLAGS: u16 = 3;
    const OUTGOING_INDEX: u32 = 1;
    const OF_SOURCE: u32 = 1 << 0;
    const BY_INCOMING: u32 = 1 << 3;
    const IS_PRESENT: u32 = 1 << 5;
    let attribute = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    Expressions::Other {
        expression_type: "fib".to_owned(),
        attributes: vec![
            attribute(DESTINATION_REGISTER, Register::Reg1.into()),
            attribute(RESULT, OUTGOING_INDEX),
            attribute(FLAGS, OF_SOURCE | BY_INCOMING | IS_PRESENT),
        ],
    }
}

fn load(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![
        Meta::Key(key),
        Meta::DestinationRegister(Register::Reg1),
    ])
}

fn compare(operator: Operator, bytes: &[u8]) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(operator),
        Cmp::Data(value(bytes)),
    ])
}

/// Leaves of what was loaded the bits of a mask.
fn masked(mask: u32) -> Expressions {
    Expressions::Bitwise(vec![
        Bitwise::SourceRegister(Register::Reg1),
        Bitwise::DestinationRegister(Register::Reg1),
        Bitwise::Length(size_of::<u32>() as u32),
        Bitwise::Mask(value(&mask.to_ne_bytes())),
        Bitwise::Xor(value(&0u32.to_ne_bytes())),
    ])
}

fn counter() -> Expressions {
    Expressions::Other {
        expression_type: COUNTER.to_owned(),
        attributes: vec![],
    }
}

fn verdict(code: u32) -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(vec![VerdictAttribute::Code(
            Verdict::Other(code),
        )])),
    ])
}

fn value(bytes: &[u8]) -> DataAttribute {
    DataAttribute::Value(bytes.to_vec())
}
