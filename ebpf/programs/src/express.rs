//! The fast path in the kernel: [`send`] for `pod_ingress`, [`receive`] for `underlay_ingress`, and what both have learned from the slow one
//! ([`nsm_ebpf_common::fast`]).
//!
//! A frame is changed only after all that could say no; whatever says no leaves it to the slow path as it was.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_CSUM_LEVEL_QUERY, BPF_F_ADJ_ROOM_DECAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L2_ETH,
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
        bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_xfrm_state,
    },
    btf_maps::{Array, PerCpuArray},
    helpers::generated::{
        bpf_csum_level, bpf_get_hash_recalc, bpf_redirect, bpf_redirect_peer, bpf_skb_adjust_room,
        bpf_skb_get_xfrm_state,
    },
    macros::btf_map,
    programs::TcContext,
};
use nsm_ebpf_common::{
    Reason, Tunnel, TunnelKey,
    fast::{
        ACCEPTED as ACCEPTED_PLACES, Asked, FAST_MARK, HOPS as HOP_PLACES, Hop, OVERHEAD, Settings,
        Taken, accepted, accepted_place, hop_place, is_accepted, settings_flags,
    },
    forward::{Forward, tunnel_flags},
    mapped,
};
use nsm_ebpf_programs::{
    decide::{Direction, Traffic, on_the_wire},
    fast,
    packet::{PlainV4, PlainV4Words},
    pod::EthernetWords,
};

use crate::{Skb, coarse_now, count, link, look_up, set_mark, size};

/// Bytes of the Ethernet header.
const ETHERNET: usize = 14;

/// Where the inner frame begins.
const INNER: usize = OVERHEAD as usize;

/// What is read of a packet at most: its outer headers, and those of Ethernet and IPv6 inside.
const HEADERS: u32 = OVERHEAD + 54;

/// linux/if_packet.h: to this host.
const PACKET_HOST: u32 = 0;

/// How the fast path is set, by user space.
#[btf_map]
static SETTINGS: Array<Settings, 1> = Array::new();

/// What this CPU has seen of the way to its peers.
#[btf_map]
static HOPS: PerCpuArray<Hop, { HOP_PLACES as usize }> = PerCpuArray::new();

/// Whose packets the kernel has accepted.
#[btf_map]
static ACCEPTED: Array<u64, { ACCEPTED_PLACES as usize }> = Array::new();

/// What this CPU has just handed to the external device.
#[btf_map]
static ASKED: PerCpuArray<Asked, 1> = PerCpuArray::new();

/// Which way frames of connections took, by [`Taken`].
#[btf_map]
static TAKEN: PerCpuArray<u64, { Taken::ALL.len() }> = PerCpuArray::new();

/// Counts a frame that takes this way.
#[inline(always)]
pub(crate) fn take(way: Taken) {
    if let Some(count) = TAKEN.get_ptr_mut(way as u32) {
        // SAFETY: a pointer into this CPU's value, not null; classifiers of one CPU do not interrupt each other.
        unsafe { *count += 1 };
    }
}

/// Sends a pod's frame, whose source was checked, to its peer: the action of the program; none: it takes the slow path.
#[inline(always)]
pub(crate) fn send(
    ctx: &TcContext,
    frame: &Skb<'_>,
    ethernet: EthernetWords,
    forward: &Forward,
    port: u32,
) -> Option<Result<i32, Reason>> {
    let (local, remote) = (v4(&forward.local)?, v4(&forward.remote)?);
    // SAFETY: as in `take`.
    let hop = unsafe { &*HOPS.get_ptr_mut(hop_place(remote))? };
    let ecn = fast::leaving(frame.head_ref()?)?;
    if !hop.holds(local, remote, port, coarse_now()) || has_vlan(ctx.skb.skb) {
        return None;
    }
    let size = size(ctx);
    if fast::size_outside(frame, size, 0)? > hop.largest {
        return None;
    }
    let settings = SETTINGS.get(0)?;
    if settings.ports == 0 {
        return None;
    }
    // SAFETY: the context of this program. It reads the frame, or what a socket of the pod has left there.
    let hash = unsafe { bpf_get_hash_recalc(ctx.skb.skb) };
    let packet = fast::Packet {
        vni: forward.vni,
        length: size.len,
        ecn,
        source_port: fast::source_port(hash, settings),
        ethernet,
    };
    if !make_room(ctx.skb.skb) {
        return None;
    }
    let written = write(ctx, fast::outer(hop, &packet));
    set_mark(ctx, FAST_MARK);
    take(Taken::FastOut);
    // SAFETY: the helper takes numbers.
    Some(written.map(|()| unsafe { bpf_redirect(hop.interface, 0) } as i32))
}

/// Makes room behind the Ethernet header, and sets what the kernel keeps of a packet in a tunnel: where the inner headers are, and that segments
/// of it each need the outer ones. It refuses what is in a tunnel already, and what cannot be segmented so.
#[inline(always)]
fn make_room(skb: *mut __sk_buff) -> bool {
    // BPF_F_ADJ_ROOM_ENCAP_L2 of linux/bpf.h: the length of the inner Ethernet header.
    const ENCAP_L2: u64 = (ETHERNET as u64) << 56;
    const FLAGS: u64 = (BPF_F_ADJ_ROOM_FIXED_GSO
        | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
        | BPF_F_ADJ_ROOM_ENCAP_L4_UDP
        | BPF_F_ADJ_ROOM_ENCAP_L2_ETH) as u64
        | ENCAP_L2;
    // SAFETY: the context of this program, and numbers.
    unsafe { bpf_skb_adjust_room(skb, OVERHEAD as i32, BPF_ADJ_ROOM_MAC, FLAGS) == 0 }
}

/// Writes over the first words of a frame.
#[inline(always)]
fn write<const WORDS: usize>(ctx: &TcContext, words: [u16; WORDS]) -> Result<(), Reason> {
    let start = ctx.data();
    if start + 2 * WORDS > ctx.data_end() {
        // There is room: it was just made, or read before.
        return Err(Reason::NotEncapsulated);
    }
    // SAFETY: within the linear part, as just compared; the verifier proves it again. Alignment: see `Skb::head`.
    unsafe { (start as *mut [u16; WORDS]).write(words) };
    Ok(())
}

/// Takes the mark of the fast path off; whether it was there.
#[inline(always)]
pub(crate) fn unmark(ctx: &TcContext) -> bool {
    // SAFETY: the kernel hands a valid __sk_buff to a classifier; the verifier checks each access.
    let is_marked = unsafe { (*ctx.skb.skb).mark } == FAST_MARK;
    if is_marked {
        set_mark(ctx, 0);
    }
    is_marked
}

/// Notes a frame that is handed to the external device.
#[inline(always)]
pub(crate) fn ask(ctx: &TcContext, vni: u32, remote: &nsm_ebpf_common::Address) {
    if let (Some(remote), Some(asked)) = (v4(remote), ASKED.get_ptr_mut(0)) {
        let now = Asked {
            at_ns: coarse_now(),
            remote,
            vni,
            length: ctx.len(),
            reserved: 0,
        };
        // SAFETY: as in `take`.
        unsafe { *asked = now };
    }
}

/// Learns the next hop from a packet of a tunnel that the kernel sends.
#[inline(always)]
pub(crate) fn learn(ctx: &TcContext) {
    learn_hop(ctx.skb.skb);
}

/// Exported, so that it is a global function to the verifier: checked once, by itself.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn learn_hop(skb: *mut __sk_buff) -> i32 {
    let ctx = TcContext::new(skb);
    learn_of(&ctx).is_some().into()
}

#[inline(always)]
fn learn_of(ctx: &TcContext) -> Option<()> {
    let frame = Skb::new(ctx);
    let plain = frame.head_ref()?;
    if !PlainV4(*plain).is_plain() || has_vlan(ctx.skb.skb) || is_slow_only()? {
        return None;
    }
    // SAFETY: as in `take`.
    let asked = unsafe { &mut *ASKED.get_ptr_mut(0)? };
    let (remote, vni) = (fast::destination(plain), fast::vni(plain));
    let is_answer = asked.is_answered(remote, vni, ctx.len(), coarse_now());
    asked.remote = 0;
    if !is_answer || is_secured(ctx.skb.skb) {
        return None;
    }
    let size = fast::size_outside(&frame, size(ctx), OVERHEAD)?;
    // SAFETY: the kernel hands a valid __sk_buff to a classifier; the verifier checks each access.
    let interface = unsafe { (*ctx.skb.skb).ifindex };
    let seen = fast::hop(plain, interface, size, coarse_now());
    // SAFETY: as in `take`.
    let hop = unsafe { &mut *HOPS.get_ptr_mut(hop_place(seen.remote))? };
    let is_known = hop.holds(seen.local, seen.remote, seen.port, seen.learned_ns);
    // What holds is left to end in its time: that smaller packets pass says nothing of larger ones.
    if !is_known || size > hop.largest {
        *hop = seen;
    }
    Some(())
}

/// Notes that the kernel has accepted a packet of this peer.
#[inline(always)]
pub(crate) fn accept(key: &TunnelKey) {
    let Some(peer) = v4(&key.peer) else {
        return;
    };
    if is_slow_only() != Some(false) {
        return;
    }
    let now = accepted(peer, coarse_now());
    if let Some(known) = ACCEPTED.get_ptr_mut(accepted_place(peer)) {
        // SAFETY: a number in the map, not null; volatile, for other CPUs write it. The processor does not split it.
        unsafe {
            if known.read_volatile() != now {
                known.write_volatile(now);
            }
        }
    }
}

#[inline(always)]
fn is_slow_only() -> Option<bool> {
    Some(SETTINGS.get(0)?.flags & settings_flags::SLOW_ONLY != 0)
}

/// Gives a packet of a tunnel, in a plain IPv4 frame of the underlay to a tunnel's port, to its pod: the action of the program; none: it takes
/// the slow path.
#[inline(always)]
pub(crate) fn receive(ctx: &TcContext) -> Option<i32> {
    match receive_plain(ctx.skb.skb) {
        NOT_TAKEN => None,
        action => Some(action),
    }
}

/// What [`receive_plain`] returns of a packet that takes the slow path; no action.
const NOT_TAKEN: i32 = i32::MIN;

/// Exported, so that it is a global function to the verifier, with registers and a stack of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn receive_plain(skb: *mut __sk_buff) -> i32 {
    receive_of(&TcContext::new(skb)).unwrap_or(NOT_TAKEN)
}

#[inline(always)]
fn receive_of(ctx: &TcContext) -> Option<i32> {
    let frame = Skb::new(ctx);
    let plain: &PlainV4Words = frame.head_ref()?;
    let tunnel = tunnel_of(plain)?;
    let size = size(ctx);
    if is_secured(ctx.skb.skb)
        || !is_for_us(ctx.skb.skb)
        || !fast::is_simple(plain, size.len)
        || !is_sound(ctx.skb.skb, plain)
    {
        return None;
    }
    let ethernet = inside(ctx, tunnel)?;
    if size.gso_size != 0 && !fast::is_tcp(Skb::new(ctx).words_at::<INNER, 17>()?) {
        // BPF leaves the marks of the tunnel on it, which a socket of TCP does not look at, and one of UDP does.
        return None;
    }
    let (packets, bytes) = on_the_wire(&Skb::new(ctx), size, OVERHEAD);
    let mut flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
    if fast::is_v6(ethernet) {
        // Before Linux 6.3 this is refused, and IPv6 takes the slow path.
        flags |= u64::from(BPF_F_ADJ_ROOM_DECAP_L3_IPV6);
    }
    let less = -(OVERHEAD as i32);
    // SAFETY: the context of this program, and numbers. That the card has checked the outer checksum says nothing of the inner one: the helper
    // takes that off, too.
    if unsafe { bpf_skb_adjust_room(ctx.skb.skb, less, BPF_ADJ_ROOM_MAC, flags) } != 0 {
        return None;
    }
    if let Err(reason) = write(ctx, ethernet) {
        return Some(link::refuse(reason));
    }
    let traffic = Traffic {
        slot: tunnel.slot,
        packets,
        bytes,
    };
    count(Direction::In, &traffic);
    link::count(Direction::In, tunnel.slot, packets, ctx.len().into());
    take(Taken::FastIn);
    // It means nothing in the pod.
    set_mark(ctx, 0);
    // SAFETY: the helper takes numbers.
    Some(unsafe { bpf_redirect_peer(tunnel.link, 0) } as i32)
}

/// The tunnel of a packet whose like the kernel has accepted, and that leads to a pod.
#[inline(always)]
fn tunnel_of(plain: &PlainV4Words) -> Option<&'static Tunnel> {
    let peer = fast::source(plain);
    // SAFETY: as in `accept`.
    let accepted = unsafe { ACCEPTED.get_ptr(accepted_place(peer))?.read_volatile() };
    if !is_accepted(accepted, peer, coarse_now()) {
        return None;
    }
    let tunnel = look_up(&TunnelKey {
        vni: fast::vni(plain),
        peer: mapped(peer.to_ne_bytes()),
    })?;
    let is_direct = tunnel.flags & (tunnel_flags::PROBES | tunnel_flags::SAME_NAMESPACE) == 0;
    (is_direct && tunnel.link != 0 && tunnel.local == fast::destination(plain)).then_some(tunnel)
}

/// The Ethernet header of the inner frame, where that is for the pod and simple. Reads the frame anew: the caller's view of it is no longer
/// valid.
#[inline(always)]
fn inside(ctx: &TcContext, tunnel: &Tunnel) -> Option<EthernetWords> {
    let mut frame = Skb::new(ctx);
    if frame.words_at::<INNER, 27>().is_none() && ctx.len() >= HEADERS {
        // Drivers leave in the linear part what they like; this makes room for the largest headers that are read.
        ctx.pull_data(HEADERS).ok()?;
        frame = Skb::new(ctx);
    }
    let words: &fast::HeadWords = frame.words_at::<INNER, 17>()?;
    let [a, b, c, d, e, f, g, ..] = *words;
    let ethernet = [a, b, c, d, e, f, g];
    if !fast::is_between_pods(ethernet, tunnel) {
        return None;
    }
    let is_for_pod = if fast::is_v6(ethernet) {
        fast::is_v6_for_pod(frame.words_at::<INNER, 27>()?, tunnel)
    } else {
        fast::is_v4_for_pod(words, tunnel)
    };
    is_for_pod.then_some(ethernet)
}

/// Whether a frame of the underlay is for this host, and in no VLAN that is not in its interface's name.
#[inline(always)]
fn is_for_us(skb: *mut __sk_buff) -> bool {
    // SAFETY: as in `unmark`.
    unsafe { (*skb).pkt_type == PACKET_HOST && !has_vlan(skb) }
}

/// Whether the outer UDP checksum needs no look: there is none, or the card has checked it. Else the kernel does.
#[inline(always)]
fn is_sound(skb: *mut __sk_buff, plain: &PlainV4Words) -> bool {
    // SAFETY: the context of this program; the query changes nothing, and fails where nothing was checked.
    !fast::has_checksum(plain) || unsafe { bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY.into()) } >= 0
}

/// Whether a packet came, or goes, by IPsec.
#[inline(always)]
pub(crate) fn is_secured(skb: *mut __sk_buff) -> bool {
    const SIZE: u32 = size_of::<bpf_xfrm_state>() as u32;
    let mut state = MaybeUninit::<bpf_xfrm_state>::zeroed();
    // SAFETY: the context of this program; the helper writes SIZE bytes, or fails where there is none.
    unsafe { bpf_skb_get_xfrm_state(skb, 0, state.as_mut_ptr(), SIZE, 0) == 0 }
}

/// Whether a frame has a VLAN tag beside its bytes.
#[inline(always)]
fn has_vlan(skb: *mut __sk_buff) -> bool {
    // SAFETY: as in `unmark`.
    unsafe { (*skb).vlan_present != 0 }
}

/// An IPv4 address as it lies in a packet.
#[inline(always)]
fn v4(address: &nsm_ebpf_common::Address) -> Option<u32> {
    let [.., a, b, c, d] = *address;
    (*address == mapped([a, b, c, d])).then_some(u32::from_ne_bytes([a, b, c, d]))
}
