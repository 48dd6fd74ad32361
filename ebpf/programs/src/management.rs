//! The programs of the management link: what leaves is stamped, answers are matched to their stamps, probes are turned round
//! and sent back. What they decide is in [`nsm_ebpf_common::management`].
//!
//! The link carries S-BFD and nothing else: everything but an answer that user space waits for ends here, so that no packet of
//! the management VNI ever reaches the node's IP stack (RFC 8971, section 3).

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    btf_maps::{Array, HashMap},
    helpers::generated::{bpf_ktime_get_ns, bpf_redirect},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use nsm_ebpf_common::{
    Reason,
    management::{MAX_SESSIONS, Node, NodeState, Session, Verdict, egress, ingress},
    sbfd::{
        Flags,
        frame::{self, ETHERTYPE_IPV4, ETHERTYPE_IPV6, HEAD_V4, HEAD_V6},
    },
};

use crate::{bump, load_by_helper};

/// BPF_F_MMAPABLE of linux/bpf.h: user space reads and writes the values in place.
const MMAPABLE: usize = 1 << 10;

/// The reflector.
#[btf_map]
static NODE: Array<NodeState, 1, MMAPABLE> = Array::new();

/// The sessions, by slot.
#[btf_map]
static SESSIONS: Array<Session, { MAX_SESSIONS as usize }, MMAPABLE> = Array::new();

/// The Ethernet address of a peer and the link that it is on, as a number, to the slot of the session with it.
#[btf_map]
static SESSION_INDEX: HashMap<u64, u32, { MAX_SESSIONS as usize }> = HashMap::new();

/// From the peers to us.
#[classifier]
pub fn management_ingress(ctx: TcContext) -> i32 {
    match ethertype(&ctx) {
        Some(ETHERTYPE_IPV4) => receive::<HEAD_V4>(&ctx),
        Some(ETHERTYPE_IPV6) => receive::<HEAD_V6>(&ctx),
        _ => refuse(Reason::SbfdMalformed),
    }
}

/// From us to the peers.
#[classifier]
pub fn management_egress(ctx: TcContext) -> i32 {
    let ours = match ethertype(&ctx) {
        Some(ETHERTYPE_IPV4) => send::<HEAD_V4>(&ctx),
        Some(ETHERTYPE_IPV6) => send::<HEAD_V6>(&ctx),
        _ => false,
    };
    if ours { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

#[inline(always)]
fn ethertype(ctx: &TcContext) -> Option<u16> {
    load_by_helper(ctx, 12).map(u16::from_be_bytes)
}

#[inline(always)]
fn receive<const N: usize>(ctx: &TcContext) -> i32 {
    let Some(head) = head::<N>(ctx) else {
        return refuse(Reason::SbfdMalformed);
    };
    let length = ctx.len();
    let packet = frame::parse(head, length);
    // The answers do not depend on the agent.
    let flags = Flags::CONTROL_PLANE_INDEPENDENT;
    match ingress(packet.as_ref(), length, flags, now(), &Maps) {
        Ok(Verdict::Reflect { reflector, is_new }) => {
            if !is_new {
                bump(Reason::SbfdReplayed);
            }
            if let Some(packet) = packet {
                frame::reflect(head, &packet.control, reflector);
            }
            // SAFETY: the kernel hands a valid __sk_buff to a classifier; the helper takes numbers.
            unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) as i32 }
        }
        Ok(Verdict::Answered { wake: true }) => TC_ACT_UNSPEC,
        Ok(Verdict::Answered { wake: false }) => TC_ACT_SHOT,
        Err(reason) => refuse(reason),
    }
}

#[inline(always)]
fn send<const N: usize>(ctx: &TcContext) -> bool {
    let Some(head) = head::<N>(ctx) else {
        return false;
    };
    egress(frame::parse(head, ctx.len()).as_ref(), now(), &Maps)
}

/// The first bytes of a packet, in place: a copy would not fit the stack, for the compiler keeps each byte by itself.
#[inline(always)]
fn head<const N: usize>(ctx: &TcContext) -> Option<&mut [u8; N]> {
    // Makes them linear and writable. Where they are, this is a comparison or two.
    ctx.pull_data(N as u32).ok()?;
    let start = ctx.data();
    if start + N > ctx.data_end() {
        return None;
    }
    // SAFETY: within the linear part, as just compared; the verifier proves it again. Nothing else points there: each program
    // asks once. Alignment 1.
    Some(unsafe { &mut *(start as *mut [u8; N]) })
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: takes no argument, reads a clock.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn refuse(reason: Reason) -> i32 {
    bump(reason);
    TC_ACT_SHOT
}

/// The maps, as the decision sees them.
struct Maps;

impl Node for Maps {
    #[inline(always)]
    fn state(&self) -> Option<&NodeState> {
        NODE.get(0)
    }

    #[inline(always)]
    fn session(&self, mac: u64) -> Option<&Session> {
        // SAFETY: a number, read at once. User space that gives the slot to another peer meanwhile lets this packet fail that
        // one's checks.
        let slot = unsafe { SESSION_INDEX.get(&mac) }.copied()?;
        SESSIONS.get(slot)
    }
}
