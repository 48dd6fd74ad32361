//! What a frame on the underlay is to us: traffic of a tunnel, or why it is not.

use nsm_ebpf_common::{Reason, Tunnel, TunnelKey, UNSPECIFIED};

use crate::{
    Bytes,
    packet::{self, NotVxlan, Vxlan},
};

/// Which way a frame goes, seen from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the peer.
    In,
    /// To the peer.
    Out,
}

/// What the node knows: the maps.
pub trait Node {
    /// Whether tunnels use this UDP destination port.
    fn is_tunnel_port(&self, port: u16) -> bool;
    /// The entry of TUNNELS.
    fn tunnel(&self, key: &TunnelKey) -> Option<&Tunnel>;
    /// Called for every packet whose VNI is not ours, before [`Miss::ForeignVni`] is returned. The error does not carry the packet: an
    /// error with values takes the program registers that the verifier cannot follow.
    fn foreign(&self, direction: Direction, packet: &TunnelKey);
}

/// What the kernel says about a frame beside its bytes (`struct __sk_buff`).
#[derive(Clone, Copy, Debug, Default)]
pub struct Size {
    /// Bytes of the frame as it is now.
    pub len: u32,
    /// Packets on the wire that it stands for; 0 or 1 for one.
    pub gso_segs: u32,
    /// Inner payload bytes of each of those packets; 0 when there is one.
    pub gso_size: u32,
}

impl Size {
    /// Packets that a frame with `headers` bytes of headers stands for.
    #[inline(always)]
    #[must_use]
    pub const fn segments(self, headers: u32) -> u32 {
        match (self.gso_segs, self.gso_size) {
            // Frames from virtual machines, and those that BPF has encapsulated, come with the size of a segment only.
            (0, 1..) => match self.len.saturating_sub(headers).div_ceil(self.gso_size) {
                0 => 1,
                segments => segments,
            },
            (0, 0) => 1,
            (known, _) => known,
        }
    }
}

/// Traffic of a tunnel, in units of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Slot of the tunnel.
    pub slot: u32,
    /// Packets.
    pub packets: u64,
    /// Bytes of outer frames.
    pub bytes: u64,
}

/// Why a frame is not counted to a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// Not VXLAN.
    Other,
    /// VXLAN, but the VNI is not ours.
    ForeignVni,
    /// Our VNI, but the peer's address is not that of the tunnel.
    WrongPeer,
    /// A later fragment.
    Fragment,
    /// A first fragment without a VXLAN header.
    TinyFragment,
    /// A tunnel port without a VXLAN header.
    Malformed,
    /// Too many IPv6 extension headers.
    ExtensionHeaders,
}

impl From<NotVxlan> for Miss {
    #[inline(always)]
    fn from(why: NotVxlan) -> Self {
        match why {
            NotVxlan::Other => Self::Other,
            NotVxlan::Fragment => Self::Fragment,
            NotVxlan::TinyFragment => Self::TinyFragment,
            NotVxlan::Malformed => Self::Malformed,
            NotVxlan::ExtensionHeaders => Self::ExtensionHeaders,
        }
    }
}

impl Miss {
    /// The reason under which the frame is counted in DROPS; `None` for traffic that is none of our business.
    /// [`Reason::fate`] says what happens to it, but only on the way in: what the node itself sends is never dropped.
    #[inline(always)]
    #[must_use]
    pub const fn reason(self, direction: Direction) -> Option<Reason> {
        match (self, direction) {
            (Self::Other, _) => None,
            (Self::ForeignVni, Direction::In) => Some(Reason::ForeignVniIn),
            (Self::ForeignVni, Direction::Out) => Some(Reason::ForeignVniOut),
            (Self::WrongPeer, Direction::In) => Some(Reason::WrongSource),
            (Self::WrongPeer, Direction::Out) => Some(Reason::WrongDestination),
            // Other programs' fragments and tunnels may leave as they like.
            (Self::TinyFragment | Self::ExtensionHeaders, Direction::Out) => None,
            (Self::Fragment, _) => Some(Reason::Fragment),
            (Self::TinyFragment, Direction::In) => Some(Reason::TinyFragment),
            (Self::Malformed, _) => Some(Reason::Malformed),
            (Self::ExtensionHeaders, Direction::In) => Some(Reason::ExtensionHeaders),
        }
    }
}

/// Says what a frame is, whatever its headers look like.
///
/// # Errors
///
/// [`Miss`] says what the frame is instead of a tunnel's.
#[inline(always)]
pub fn decide<B: Bytes + ?Sized, N: Node>(
    direction: Direction,
    frame: &B,
    size: Size,
    node: &N,
) -> Result<Traffic, Miss> {
    let vxlan = packet::parse(frame, |port| node.is_tunnel_port(port));
    attribute(direction, frame, vxlan, || size, node)
}

/// Attributes a frame, in which `vxlan` was found, to a tunnel: one look-up when it is one of ours, two when not.
///
/// # Errors
///
/// As [`decide`].
#[inline(always)]
pub fn attribute<B: Bytes + ?Sized, N: Node>(
    direction: Direction,
    frame: &B,
    vxlan: Result<Vxlan, NotVxlan>,
    size: impl FnOnce() -> Size,
    node: &N,
) -> Result<Traffic, Miss> {
    let vxlan = vxlan?;
    let peer = match direction {
        Direction::In => vxlan.source,
        Direction::Out => vxlan.destination,
    };
    let key = TunnelKey {
        vni: vxlan.vni,
        peer,
    };
    // The unspecified address is nobody's, though a packet may claim it: its key is that of the marker.
    if peer != UNSPECIFIED
        && let Some(tunnel) = node.tunnel(&key)
    {
        let (packets, bytes) = on_the_wire(frame, size(), vxlan.payload);
        return Ok(Traffic {
            slot: tunnel.slot,
            packets,
            bytes,
        });
    }
    let marker = TunnelKey {
        vni: vxlan.vni,
        peer: UNSPECIFIED,
    };
    if node.tunnel(&marker).is_some() {
        return Err(Miss::WrongPeer);
    }
    node.foreign(direction, &key);
    Err(Miss::ForeignVni)
}

/// Packets and bytes that `frame` is on the wire. A frame that waits for segmentation holds its headers once; each of its
/// segments will carry them. `payload` is the offset of the inner frame.
#[inline(always)]
pub fn on_the_wire<B: Bytes + ?Sized>(frame: &B, size: Size, payload: u32) -> (u64, u64) {
    if size.gso_size == 0 {
        return (1, u64::from(size.len));
    }
    let headers = payload + packet::inner_headers(frame, payload);
    let segments = size.segments(headers);
    (
        u64::from(segments),
        u64::from(size.len) + u64::from(segments - 1) * u64::from(headers),
    )
}
