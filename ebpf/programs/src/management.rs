//! Probes and their answers: what leaves is stamped, answers are matched to their stamps, probes are turned round and sent back. What they
//! decide is in [`nsm_ebpf_common::management`].
//!
//! Probes take the way of data: the prober's frames leave by the probe link, a device that carries nothing, whose program sends them
//! through the external device; what comes with the probe VNI from a peer is handed over by the external device's program.
//!
//! Everything but an answer that user space waits for ends here, so that no packet of the probe VNI ever reaches the node's IP stack
//! (RFC 8971, section 3).

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT},
    btf_maps::{Array, HashMap},
    helpers::generated::{bpf_ktime_get_ns, bpf_redirect},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use nsm_ebpf_common::{
    Reason,
    forward::{ProbePath, key_halves},
    management::{MAX_SESSIONS, Node, NodeState, Session, Verdict, egress, ingress, reflected},
    sbfd::{
        Flags,
        frame::{self, ETHERTYPE_IPV4, ETHERTYPE_IPV6, HEAD_V4, HEAD_V6},
    },
};

use crate::{
    bump,
    link::{Route, encapsulate, refuse},
    load_by_helper,
};

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

/// The destination of a probe or an answer, and the family of its underlay, to where it goes. A node has an entry for each path to it, and
/// one more where its own probes are answered on a path with another address.
#[btf_map]
static PROBE_PATHS: HashMap<u64, ProbePath, { 2 * MAX_SESSIONS as usize }> = HashMap::new();

/// From the prober to the peers.
#[classifier]
pub fn probe_egress(ctx: TcContext) -> i32 {
    match ethertype(&ctx) {
        Some(ETHERTYPE_IPV4) => send::<HEAD_V4>(&ctx),
        Some(ETHERTYPE_IPV6) => send::<HEAD_V6>(&ctx),
        _ => TC_ACT_SHOT,
    }
}

/// What the external device's program does with a packet of the probe VNI. It hangs nowhere: BPF_PROG_TEST_RUN has no tunnel key to give to
/// that program, so the tests run this one.
#[classifier]
pub fn probe_ingress(ctx: TcContext) -> i32 {
    receive(&ctx)
}

/// From the peers to us.
#[inline(always)]
pub(crate) fn receive(ctx: &TcContext) -> i32 {
    match ethertype(ctx) {
        Some(ETHERTYPE_IPV4) => receive_of::<HEAD_V4>(ctx),
        Some(ETHERTYPE_IPV6) => receive_of::<HEAD_V6>(ctx),
        _ => refuse(Reason::SbfdMalformed),
    }
}

#[inline(always)]
fn ethertype(ctx: &TcContext) -> Option<u16> {
    load_by_helper(ctx, 12).map(u16::from_be_bytes)
}

#[inline(always)]
fn receive_of<const N: usize>(ctx: &TcContext) -> i32 {
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
            let Some(packet) = packet else {
                return TC_ACT_SHOT;
            };
            frame::reflect(head, &packet.control, reflector);
            let action = to_peer(ctx, packet.sender);
            reflected(packet.sender, now(), &Maps);
            action
        }
        Ok(Verdict::Answered { wake: true }) => to_prober::<N>(),
        Ok(Verdict::Answered { wake: false }) => TC_ACT_SHOT,
        Err(reason) => refuse(reason),
    }
}

#[inline(always)]
fn send<const N: usize>(ctx: &TcContext) -> i32 {
    let Some(head) = head::<N>(ctx) else {
        return TC_ACT_SHOT;
    };
    match frame::parse(head, ctx.len()) {
        Some(packet) if egress(Some(&packet), now(), &Maps) => to_peer(ctx, packet.receiver),
        _ => TC_ACT_SHOT,
    }
}

/// Sends a frame to the peer with this Ethernet address.
#[inline(always)]
fn to_peer(ctx: &TcContext, receiver: u64) -> i32 {
    // SAFETY: read only. While it is, user space may remove the entry and fill its memory for another path: see below.
    let Some(path) = (unsafe { PROBE_PATHS.get(&receiver) }) else {
        return refuse(Reason::ProbeUnknownPath);
    };
    let route = Route {
        device: path.device,
        vni: path.vni,
        local: &path.local,
        remote: &path.remote,
    };
    let action = encapsulate(ctx, &route);
    // SAFETY: a field of the entry, volatile for user space writes it. The last of all reads: what was read before was this path's.
    let key = unsafe { (&raw const path.key).read_volatile() };
    match action {
        Ok(action) if key == key_halves(receiver) => action,
        Ok(_) => refuse(Reason::ProbeUnknownPath),
        Err(reason) => refuse(reason),
    }
}

/// Hands an answer to the prober's socket, on the probe link of its family.
#[inline(always)]
fn to_prober<const N: usize>() -> i32 {
    let Some(node) = NODE.get(0) else {
        return TC_ACT_SHOT;
    };
    let [v4, v6] = &node.links;
    let link = if N == HEAD_V4 { v4 } else { v6 }.load();
    if link == 0 {
        return TC_ACT_SHOT;
    }
    // SAFETY: the helper takes numbers.
    unsafe { bpf_redirect(link as u32, BPF_F_INGRESS.into()) as i32 }
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
