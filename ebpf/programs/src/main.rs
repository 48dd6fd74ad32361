//! The BPF programs: tcx (or clsact) classifiers for ingress and egress of the underlay, ([`link`]) of pod links and external devices,
//! ([`express`]) of the fast path between the two, and ([`management`]) of the probe link. The decisions are in the library; here are the maps, the access to a packet, and the one
//! place where a decision becomes an action.
//!
//! Those of the underlay return TC_ACT_UNSPEC, which is also TCX_NEXT: other programs on the hook have their say. Only our VNI from a wrong
//! source (and what could hide it) is dropped, and only on the way in.

#![no_std]
#![no_main]
#![expect(
    missing_docs,
    unreachable_pub,
    reason = "the macros of aya-ebpf export each program under a second, undocumented name"
)]

mod express;
mod link;
mod management;

use core::mem::MaybeUninit;

use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray},
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns, bpf_skb_load_bytes},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use nsm_ebpf_common::{
    Clock, Counters, Fate, Foreign, MAX_FOREIGN, MAX_SLOTS, MAX_TUNNEL_ENTRIES, NO_SLOT,
    PEER_MARKER, PORT_WORDS, REASONS, RECENT_ENTRIES, Reason, Recent, TUNNEL_MARK, Tunnel,
    TunnelKey, fast::SECURED, port_bit, recent_place,
};
use nsm_ebpf_programs::{
    Bytes,
    decide::{Direction, Miss, Node, Size, Traffic, attribute, decide},
    packet::{self, Header, NotVxlan, PlainV4, PlainV6, Step, Vxlan},
};

/// Bit for each UDP destination port that tunnels use.
#[btf_map]
static PORTS: Array<u64, { PORT_WORDS as usize }> = Array::new();

/// (VNI, peer) to slot; (VNI, unspecified) marks a VNI as ours, (PEER_MARKER, peer) an address as a peer's.
#[btf_map]
static TUNNELS: HashMap<TunnelKey, Tunnel, { MAX_TUNNEL_ENTRIES as usize }> = HashMap::new();

/// Slot to what has passed.
#[btf_map]
static COUNTERS: PerCpuArray<Counters, { MAX_SLOTS as usize }> = PerCpuArray::new();

/// Reason to how often.
#[btf_map]
static DROPS: PerCpuArray<u64, { REASONS as usize }> = PerCpuArray::new();

/// Another number after each change of TUNNELS, by user space.
#[btf_map]
static GENERATION: Array<u64, 1> = Array::new();

/// What this CPU has looked up in TUNNELS.
#[btf_map]
static RECENT: PerCpuArray<Recent, { RECENT_ENTRIES as usize }> = PerCpuArray::new();

/// What this CPU knows of the time.
#[btf_map]
static CLOCK: PerCpuArray<Clock, 1> = PerCpuArray::new();

/// (VNI, peer): what came of VNIs that are not ours from addresses that are our peers'.
#[btf_map]
static FOREIGN: LruHashMap<TunnelKey, Foreign, { MAX_FOREIGN as usize }> = LruHashMap::new();

/// Written by user space: [`nsm_ebpf_common::LAYOUT`] of the agent that made the maps.
#[btf_map]
static LAYOUT: Array<u32, 1> = Array::new();

/// From the peers to us.
#[classifier]
pub fn underlay_ingress(ctx: TcContext) -> i32 {
    handle(&ctx, Direction::In)
}

/// From us to the peers.
#[classifier]
pub fn underlay_egress(ctx: TcContext) -> i32 {
    handle(&ctx, Direction::Out)
}

#[inline(always)]
fn handle(ctx: &TcContext, direction: Direction) -> i32 {
    let frame = Skb::new(ctx);
    if let Some(plain) = frame.head().map(PlainV4)
        && plain.is_plain()
    {
        let vxlan = plain.vxlan(is_tunnel_port);
        if direction == Direction::In
            && vxlan.is_ok()
            && let Some(action) = express::receive(ctx)
        {
            return action;
        }
        return handle_plain(ctx, direction, vxlan);
    }
    if let Some(plain) = frame.head().map(PlainV6)
        && plain.is_plain()
    {
        return handle_plain(ctx, direction, plain.vxlan(is_tunnel_port));
    }
    match direction {
        Direction::In => not_plain_ingress(ctx.skb.skb),
        Direction::Out => not_plain_egress(ctx.skb.skb),
    }
}

#[inline(always)]
fn handle_plain(ctx: &TcContext, direction: Direction, vxlan: Result<Vxlan, NotVxlan>) -> i32 {
    // Read anew: the fast path may have moved the frame.
    let decided = attribute(direction, &Skb::new(ctx), vxlan, || size(ctx), &Maps);
    if direction == Direction::Out && decided.is_ok() && !express::unmark(ctx) {
        express::learn(ctx);
    }
    conclude(ctx, direction, decided)
}

/// Exported, so that it is a global function to the verifier and the frames above have all registers for themselves.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn not_plain_ingress(skb: *mut __sk_buff) -> i32 {
    handle_any(&TcContext::new(skb), Direction::In)
}

/// Likewise.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn not_plain_egress(skb: *mut __sk_buff) -> i32 {
    handle_any(&TcContext::new(skb), Direction::Out)
}

#[inline(always)]
fn handle_any(ctx: &TcContext, direction: Direction) -> i32 {
    let decided = decide(direction, &Skb::new(ctx), size(ctx), &Maps);
    conclude(ctx, direction, decided)
}

#[inline(always)]
fn size(ctx: &TcContext) -> Size {
    Size {
        len: ctx.len(),
        // SAFETY: the kernel hands a valid __sk_buff to a classifier; the verifier checks each access.
        gso_segs: unsafe { (*ctx.skb.skb).gso_segs },
        // SAFETY: as above.
        gso_size: unsafe { (*ctx.skb.skb).gso_size },
    }
}

#[inline(always)]
fn conclude(ctx: &TcContext, direction: Direction, decided: Result<Traffic, Miss>) -> i32 {
    match decided {
        Ok(traffic) => {
            count(direction, &traffic);
            if direction == Direction::In {
                let secured = if express::is_secured(ctx.skb.skb) {
                    SECURED
                } else {
                    0
                };
                set_mark(ctx, TUNNEL_MARK | secured);
            }
            TC_ACT_UNSPEC
        }
        Err(miss) => act(direction, miss),
    }
}

#[inline(always)]
fn is_tunnel_port(port: u16) -> bool {
    let (word, mask) = port_bit(port);
    PORTS.get(word).is_some_and(|bits| bits & mask != 0)
}

#[inline(always)]
fn count(direction: Direction, traffic: &Traffic) {
    if let Some(counters) = COUNTERS.get_ptr_mut(traffic.slot) {
        add(counters, direction, traffic.packets, traffic.bytes);
    }
}

/// Adds to this CPU's value of COUNTERS or LINKS.
#[inline(always)]
fn add(counters: *mut Counters, direction: Direction, packets: u64, bytes: u64) {
    // SAFETY: a pointer into this CPU's value, not null; classifiers of one CPU do not interrupt each other.
    let counters = unsafe { &mut *counters };
    let now = coarse_now();
    match direction {
        Direction::In => {
            counters.in_packets += packets;
            counters.in_bytes += bytes;
            counters.last_in_ns = now;
        }
        Direction::Out => {
            counters.out_packets += packets;
            counters.out_bytes += bytes;
            counters.last_out_ns = now;
        }
    }
}

/// CLOCK_MONOTONIC at the resolution of a timer tick. The kernel is asked once a tick: the number of the tick is one load, while the
/// clock costs more than all else that counting does.
#[inline(always)]
fn coarse_now() -> u64 {
    let Some(clock) = CLOCK.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: as in `add`.
    let clock = unsafe { &mut *clock };
    // SAFETY: takes no argument, reads a counter.
    let tick = unsafe { bpf_jiffies64() };
    if clock.tick != tick {
        // SAFETY: takes no argument, reads a clock.
        clock.now_ns = unsafe { bpf_ktime_get_coarse_ns() };
        clock.tick = tick;
    }
    clock.now_ns
}

/// Sets the mark by which the fence knows packets of tunnels.
#[inline(always)]
fn set_mark(ctx: &TcContext, mark: u32) {
    // SAFETY: the kernel hands a valid __sk_buff to a classifier; the verifier checks each access.
    unsafe { (*ctx.skb.skb).mark = mark };
}

/// What happens to a frame that is not a tunnel's.
#[inline(always)]
fn act(direction: Direction, miss: Miss) -> i32 {
    let Some(reason) = miss.reason(direction) else {
        return TC_ACT_UNSPEC;
    };
    bump(reason);
    match reason.fate() {
        Fate::Dropped => TC_ACT_SHOT,
        Fate::Passed => TC_ACT_UNSPEC,
    }
}

#[inline(always)]
fn bump(reason: Reason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: as in `add`.
        unsafe { *count += 1 };
    }
}

/// The maps, as the decision sees them.
struct Maps;

impl Node for Maps {
    #[inline(always)]
    fn is_tunnel_port(&self, port: u16) -> bool {
        is_tunnel_port(port)
    }

    #[inline(always)]
    fn tunnel(&self, key: &TunnelKey) -> Option<&Tunnel> {
        look_up(key)
    }

    #[inline(always)]
    fn foreign(&self, direction: Direction, packet: &TunnelKey) {
        if direction == Direction::In {
            note_foreign(packet);
        }
    }
}

/// Notes a packet of a VNI that is not ours when its source is a peer's address.
#[inline(always)]
fn note_foreign(packet: &TunnelKey) {
    let peer = TunnelKey {
        vni: PEER_MARKER,
        peer: packet.peer,
    };
    if look_up(&peer).is_none() {
        return;
    }
    let now = coarse_now();
    if let Some(known) = FOREIGN.get_ptr_mut(packet) {
        // SAFETY: a pointer into the map, not null. What two CPUs, or user space that removes the entry, do at once costs a count.
        let known = unsafe { &mut *known };
        known.packets += 1;
        known.last_ns = now;
    } else {
        let first = Foreign {
            packets: 1,
            last_ns: now,
        };
        // Full of newer ones: the DROPS counter has it all the same.
        let _ = FOREIGN.insert(packet, &first, 0);
    }
}

/// The entry of TUNNELS, from what this CPU remembers where that still holds. User space changes GENERATION after it has changed TUNNELS,
/// and we read it before we look: what was found before a change is never taken for what holds after it.
#[inline(always)]
fn look_up(key: &TunnelKey) -> Option<&'static Tunnel> {
    let generation = generation()?;
    // SAFETY: as in `add`.
    let recent = unsafe { &mut *RECENT.get_ptr_mut(recent_place(key))? };
    if recent.generation != generation || !is_same(&recent.key, key) {
        if !find(recent, key)? && !find(recent, key)? {
            recent.tunnel.slot = NO_SLOT;
        }
        recent.key = *key;
        recent.generation = generation;
    }
    (recent.tunnel.slot != NO_SLOT).then_some(&recent.tunnel)
}

#[inline(always)]
fn generation() -> Option<u64> {
    // SAFETY: the pointer is to a value of the map and not null; volatile, for user space writes it.
    Some(unsafe { GENERATION.get_ptr(0)?.read_volatile() })
}

/// Looks in TUNNELS; whether what was found is whole. An entry that user space removes meanwhile may be filled for another tunnel while it is
/// copied. Between the two user space changes GENERATION, so a copy counts only if that is the same before and after.
///
/// It is copied to where it stays: on the stack of 512 bytes there is no room for it.
#[inline(always)]
fn find(recent: &mut Recent, key: &TunnelKey) -> Option<bool> {
    let before = generation()?;
    // SAFETY: this program never changes the map; for what user space does, see above.
    match unsafe { TUNNELS.get(key) } {
        Some(tunnel) => recent.tunnel = *tunnel,
        None => recent.tunnel.slot = NO_SLOT,
    }
    Some(generation()? == before)
}

/// Equality by words: of byte arrays the compiler compares bytes.
#[inline(always)]
fn is_same(one: &TunnelKey, other: &TunnelKey) -> bool {
    let words = |key: &TunnelKey| {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = key.peer;
        [
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ]
    };
    let ([a, b, c, d], [e, f, g, h]) = (words(one), words(other));
    one.vni == other.vni && (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
}

/// A packet. Its linear part is read in place; what lies in fragments of the buffer by a helper.
struct Skb<'a> {
    ctx: &'a TcContext,
    data: usize,
    data_end: usize,
}

impl<'a> Skb<'a> {
    #[inline(always)]
    fn new(ctx: &'a TcContext) -> Self {
        Self {
            ctx,
            data: ctx.data(),
            data_end: ctx.data_end(),
        }
    }
}

impl Skb<'_> {
    /// The first words of the frame, where its linear part has so many.
    #[inline(always)]
    fn head<const WORDS: usize>(&self) -> Option<[u16; WORDS]> {
        if self.data + 2 * WORDS > self.data_end {
            return None;
        }
        // SAFETY: within the linear part, as just compared; the verifier proves it again. A frame begins at an even address: the
        // kernel's buffers are aligned, and an Ethernet header is moved by 0 or NET_IP_ALIGN = 2.
        Some(unsafe { (self.data as *const [u16; WORDS]).read() })
    }

    /// The first words of the frame, in place: they are valid until a helper changes the frame, which the verifier ensures.
    #[inline(always)]
    fn head_ref<const WORDS: usize>(&self) -> Option<&[u16; WORDS]> {
        self.words_at::<0, WORDS>()
    }

    /// Words from an even offset on, likewise.
    #[inline(always)]
    fn words_at<const OFFSET: usize, const WORDS: usize>(&self) -> Option<&[u16; WORDS]> {
        let start = self.data + OFFSET;
        if start + 2 * WORDS > self.data_end {
            return None;
        }
        // SAFETY: as in `head`. Nothing writes there while the reference is used.
        Some(unsafe { &*(start as *const [u16; WORDS]) })
    }
}

/// Offsets up to here are read in place: the verifier must see a bound, and headers in front of VXLAN end far before.
const MAX_DIRECT_OFFSET: u32 = 1024;

impl Bytes for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if offset <= MAX_DIRECT_OFFSET {
            let start = self.data + offset as usize;
            if start + N <= self.data_end {
                // SAFETY: within the linear part, as just compared; the verifier proves it again. Alignment 1.
                return Some(unsafe { (start as *const [u8; N]).read() });
            }
        }
        load_by_helper(self.ctx, offset)
    }

    #[inline(always)]
    fn next_header(&self, at: Header) -> Step {
        Step::unpack(extension_header(self.ctx.skb.skb, at.pack()))
    }
}

/// Exported, so that it is a global function to the verifier: checked once, by itself, instead of on every way through the
/// loop that calls it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn extension_header(skb: *mut __sk_buff, at: u64) -> u64 {
    let ctx = TcContext::new(skb);
    packet::next_header(&ByHelper { ctx: &ctx }, Header::unpack(at)).pack()
}

/// A packet at offsets that nobody bounded.
struct ByHelper<'a> {
    ctx: &'a TcContext,
}

impl Bytes for ByHelper<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        load_by_helper(self.ctx, offset)
    }
}

/// Reads from a packet, wherever its bytes lie.
#[inline(always)]
fn load_by_helper<const N: usize>(ctx: &TcContext, offset: u32) -> Option<[u8; N]> {
    let mut bytes = MaybeUninit::<[u8; N]>::uninit();
    // SAFETY: the helper writes N bytes or fails.
    let result = unsafe {
        bpf_skb_load_bytes(
            ctx.as_ptr().cast(),
            offset,
            bytes.as_mut_ptr().cast(),
            N as u32,
        )
    };
    // SAFETY: written by the helper.
    (result == 0).then(|| unsafe { bytes.assume_init() })
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing above can panic; if something did, the verifier would refuse this loop at load time.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
