//! The programs of forwarding: [`pod_ingress`] at the node's end of each pod link, [`external_ingress`] at the external VXLAN devices.
//!
//! Both fail closed: a frame that is not known to be of a connection is dropped and counted.

use core::mem::{MaybeUninit, offset_of};

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_DONT_FRAGMENT, BPF_F_TUNINFO_IPV6, TC_ACT_SHOT, bpf_tunnel_key,
        bpf_tunnel_key__bindgen_ty_1 as Remote, bpf_tunnel_key__bindgen_ty_2 as Extension,
        bpf_tunnel_key__bindgen_ty_3 as Local,
    },
    btf_maps::{Array, HashMap, PerCpuArray},
    helpers::generated::{
        bpf_redirect, bpf_redirect_peer, bpf_skb_change_type, bpf_skb_get_tunnel_key,
        bpf_skb_set_tunnel_key,
    },
    macros::{btf_map, classifier},
    programs::TcContext,
};
use nsm_ebpf_common::{
    Address, Counters, MAX_SLOTS, Reason, TUNNEL_MARK, Tunnel, TunnelKey, UNSPECIFIED,
    fast::{SECURED, Taken},
    forward::{Device, Forward, MAX_DEVICES, check_destination, check_source, tunnel_flags},
    mapped,
};
use nsm_ebpf_programs::{
    decide::Direction,
    packet,
    pod::{self, EthernetWords},
};

use crate::{Skb, add, bump, express, load_by_helper, look_up, management, set_mark, size};

/// Node's end of a pod link to where its frames go.
#[btf_map]
static FORWARD: HashMap<u32, Forward, { MAX_SLOTS as usize }> = HashMap::new();

/// The external VXLAN devices.
#[btf_map]
static DEVICES: Array<Device, { MAX_DEVICES as usize }> = Array::new();

/// Slot to what has passed the pod link.
#[btf_map]
static LINKS: PerCpuArray<Counters, { MAX_SLOTS as usize }> = PerCpuArray::new();

/// From a pod to its peer, or to the pod of this node at the other end of its connection.
#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    from_pod(&ctx).unwrap_or_else(refuse)
}

/// From the peers to the pods, and to the prober.
#[classifier]
pub fn external_ingress(ctx: TcContext) -> i32 {
    // It has come past the fence, and means nothing in a pod.
    let is_known = is_marked(&ctx);
    set_mark(&ctx, 0);
    let Some((key, tunnel)) = received(&ctx) else {
        return refuse(Reason::TunnelUnknown);
    };
    if is_known {
        express::accept(&key);
    }
    if tunnel.flags & tunnel_flags::PROBES != 0 {
        return management::receive(&ctx);
    }
    from_peer(&ctx, tunnel).unwrap_or_else(refuse)
}

/// A frame ends here.
#[inline(always)]
pub(crate) fn refuse(reason: Reason) -> i32 {
    bump(reason);
    TC_ACT_SHOT
}

#[inline(always)]
fn from_pod(ctx: &TcContext) -> Result<i32, Reason> {
    // SAFETY: the kernel hands a valid __sk_buff to a classifier; the verifier checks each access.
    let link = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: the entry is read only. While it is, user space may remove it and fill its memory for another link: see below.
    let forward = unsafe { FORWARD.get(&link) }.ok_or(Reason::PodUnknownLink)?;
    let frame = Skb::new(ctx);
    let header = ethernet(ctx, &frame).ok_or(Reason::PodWrongMac)?;
    pod::check(&frame, header, forward)?;
    let (packets, length) = packets(ctx, &frame);
    let action = if forward.pod.link == 0 {
        let route = Route {
            device: forward.device,
            vni: forward.vni,
            local: &forward.local,
            remote: &forward.remote,
        };
        match express::send(ctx, &frame, header, forward, port_of(&route)) {
            Some(sent) => sent?,
            None => {
                express::take(Taken::SlowOut);
                encapsulate(ctx, &route)?
            }
        }
    } else {
        // A mark of the sender's namespace means nothing in the other pod.
        set_mark(ctx, 0);
        to_pod(ctx, &forward.pod).map_err(|_| Reason::PodWrongDestination)?
    };
    count(Direction::Out, forward.slot, packets, length);
    // Last of all reads: what was read before was this link's.
    // SAFETY: a field of the entry, volatile for user space writes it.
    if unsafe { (&raw const forward.link).read_volatile() } == link {
        Ok(action)
    } else {
        Err(Reason::PodUnknownLink)
    }
}

/// Gives a frame that the kernel has decapsulated to its pod.
#[inline(always)]
fn from_peer(ctx: &TcContext, tunnel: &Tunnel) -> Result<i32, Reason> {
    let frame = Skb::new(ctx);
    let header = ethernet(ctx, &frame).ok_or(Reason::TunnelWrongMac)?;
    check_source(pod::source(header), tunnel.peer_mac)?;
    if packet::is_router_advertisement(&frame) {
        return Err(Reason::TunnelRouterAdvertisement);
    }
    let action = to_pod(ctx, tunnel)?;
    express::take(Taken::SlowIn);
    Ok(action)
}

#[inline(always)]
fn to_pod(ctx: &TcContext, tunnel: &Tunnel) -> Result<i32, Reason> {
    let frame = Skb::new(ctx);
    let header = ethernet(ctx, &frame).ok_or(Reason::TunnelWrongMac)?;
    check_destination(pod::destination(header), tunnel.mac)?;
    let (packets, length) = packets(ctx, &frame);
    count(Direction::In, tunnel.slot, packets, length);
    if tunnel.flags & tunnel_flags::SAME_NAMESPACE != 0 {
        // SAFETY: the helper takes numbers.
        return Ok(unsafe { bpf_redirect(tunnel.link, 0) } as i32);
    }
    be_received(ctx.skb.skb);
    // SAFETY: the helper takes numbers.
    Ok(unsafe { bpf_redirect_peer(tunnel.link, 0) } as i32)
}

/// A unicast frame is of another host to the device that it came by, whose address is not the pod's. Before Linux 6.15 the pod would see that.
#[inline(always)]
fn be_received(skb: *mut __sk_buff) {
    // linux/if_packet.h
    const PACKET_HOST: u32 = 0;
    const PACKET_OTHERHOST: u32 = 3;
    // SAFETY: as in `from_pod`.
    if unsafe { (*skb).pkt_type } == PACKET_OTHERHOST {
        // SAFETY: the context of this program, and a number. A refusal leaves the packet as it is.
        unsafe { bpf_skb_change_type(skb, PACKET_HOST) };
    }
}

/// The entry of the tunnel that a packet came through; none for a marker or a source that is no peer of this VNI.
#[inline(always)]
fn received(ctx: &TcContext) -> Option<(TunnelKey, &'static Tunnel)> {
    let key = tunnel_key(ctx)?;
    // The unspecified address is that of the markers.
    if key.peer == UNSPECIFIED || key.peer == mapped([0; 4]) {
        return None;
    }
    let tunnel = look_up(&key)?;
    (tunnel.link != 0 || tunnel.flags & tunnel_flags::PROBES != 0).then_some((key, tunnel))
}

/// VNI and outer source of a packet that the kernel has decapsulated, after the reassembly of fragments.
#[inline(always)]
fn tunnel_key(ctx: &TcContext) -> Option<TunnelKey> {
    // Both without the local address, which nobody asks for here.
    const SIZE: u32 = offset_of!(bpf_tunnel_key, __bindgen_anon_3) as u32;
    let mut key = MaybeUninit::<bpf_tunnel_key>::zeroed();
    let skb = ctx.skb.skb;
    // SAFETY: the context of this program; the helper writes SIZE bytes or fails.
    if unsafe { bpf_skb_get_tunnel_key(skb, key.as_mut_ptr(), SIZE, 0) } == 0 {
        // SAFETY: zeroed, and written by the helper; plain integers.
        let key = unsafe { key.assume_init() };
        // SAFETY: the family is IPv4, as the flags asked.
        let remote = unsafe { key.__bindgen_anon_1.remote_ipv4 };
        return Some(TunnelKey {
            vni: key.tunnel_id,
            peer: mapped(remote.to_be_bytes()),
        });
    }
    // SAFETY: as above.
    if unsafe { bpf_skb_get_tunnel_key(skb, key.as_mut_ptr(), SIZE, BPF_F_TUNINFO_IPV6.into()) }
        != 0
    {
        return None;
    }
    // SAFETY: as above.
    let key = unsafe { key.assume_init() };
    // SAFETY: the family is IPv6, as the flags asked.
    let remote = unsafe { key.__bindgen_anon_1.remote_ipv6 };
    Some(TunnelKey {
        vni: key.tunnel_id,
        peer: from_words(remote),
    })
}

/// Where a frame goes.
pub(crate) struct Route<'a> {
    /// Index into DEVICES.
    pub(crate) device: u32,
    pub(crate) vni: u32,
    pub(crate) local: &'a Address,
    pub(crate) remote: &'a Address,
}

/// Sends a frame through a tunnel: the action of the program.
///
/// Checksum, TTL and traffic class are those of a VXLAN device without options: a UDP checksum, the default TTL, the inner ECN bits.
#[inline(always)]
pub(crate) fn encapsulate(ctx: &TcContext, route: &Route<'_>) -> Result<i32, Reason> {
    let device = DEVICES.get(route.device).ok_or(Reason::NotEncapsulated)?;
    if device.index == 0 {
        return Err(Reason::NotEncapsulated);
    }
    let remote = to_words(route.remote);
    let local = to_words(route.local);
    let is_v4 = remote[0] | remote[1] == 0 && remote[2] == u32::from_ne_bytes([0, 0, 0xff, 0xff]);
    let mut key = bpf_tunnel_key {
        tunnel_id: route.vni,
        __bindgen_anon_1: Remote {
            remote_ipv6: remote,
        },
        tunnel_tos: 0,
        tunnel_ttl: 0,
        __bindgen_anon_2: Extension { tunnel_ext: 0 },
        tunnel_label: 0,
        __bindgen_anon_3: Local { local_ipv6: local },
    };
    let flags = if is_v4 {
        // The helper has IPv4 addresses in host order.
        key.__bindgen_anon_1.remote_ipv6 = [u32::from_be(remote[3]), 0, 0, 0];
        key.__bindgen_anon_3.local_ipv6 = [u32::from_be(local[3]), 0, 0, 0];
        BPF_F_DONT_FRAGMENT
    } else {
        BPF_F_TUNINFO_IPV6
    };
    // SAFETY: the context of this program, and a key with its size.
    let set = unsafe {
        bpf_skb_set_tunnel_key(
            ctx.skb.skb,
            &mut key,
            size_of::<bpf_tunnel_key>() as u32,
            flags.into(),
        )
    };
    if set != 0 {
        return Err(Reason::NotEncapsulated);
    }
    if is_v4 {
        express::ask(ctx, route.vni, route.remote);
    }
    // The fence lets nothing else of this node send to the tunnels' port.
    set_mark(ctx, TUNNEL_MARK);
    // SAFETY: the helper takes numbers.
    Ok(unsafe { bpf_redirect(device.index, 0) } as i32)
}

/// An address as the words of the helpers, in the order of the network.
#[inline(always)]
const fn to_words(address: &Address) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
        u32::from_ne_bytes([i, j, k, l]),
        u32::from_ne_bytes([m, n, o, p]),
    ]
}

#[inline(always)]
const fn from_words(words: [u32; 4]) -> Address {
    let ([a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]) = (
        words[0].to_ne_bytes(),
        words[1].to_ne_bytes(),
        words[2].to_ne_bytes(),
        words[3].to_ne_bytes(),
    );
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

#[inline(always)]
fn ethernet(ctx: &TcContext, frame: &Skb<'_>) -> Option<EthernetWords> {
    match frame.head() {
        Some(words) => Some(words),
        None => {
            let bytes: [u8; 14] = load_by_helper(ctx, 0)?;
            let (words, _) = bytes.as_chunks::<2>();
            let &[a, b, c, d, e, f, g] = words else {
                return None;
            };
            Some([a, b, c, d, e, f, g].map(u16::from_ne_bytes))
        }
    }
}

/// Packets that a frame stands for at the pod link, and its bytes: one that the kernel segments later counts as its segments.
#[inline(always)]
fn packets(ctx: &TcContext, frame: &Skb<'_>) -> (u64, u64) {
    let size = size(ctx);
    let headers = match (size.gso_segs, size.gso_size) {
        (0, 1..) => packet::inner_headers(frame, 0),
        _ => 0,
    };
    (size.segments(headers).into(), size.len.into())
}

/// Counts packets at the pod link.
#[inline(always)]
pub(crate) fn count(direction: Direction, slot: u32, packets: u64, bytes: u64) {
    if let Some(counters) = LINKS.get_ptr_mut(slot) {
        add(counters, direction, packets, bytes);
    }
}

/// The UDP port of a tunnel's device; 0: there is no device.
#[inline(always)]
fn port_of(route: &Route<'_>) -> u32 {
    DEVICES.get(route.device).map_or(0, |device| device.port)
}

/// Whether a packet has the mark that the program at the underlay has given it, and came without IPsec.
#[inline(always)]
fn is_marked(ctx: &TcContext) -> bool {
    // SAFETY: as in `from_pod`. Others may have set bits of their own meanwhile.
    unsafe { (*ctx.skb.skb).mark & (TUNNEL_MARK | SECURED) == TUNNEL_MARK }
}
