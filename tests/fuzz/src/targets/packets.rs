//! Packets: what comes to a node's network card, and STUN.

use nsm_core::address::public::stun::{self, TransactionId};
use nsm_ebpf_common::{
    VXLAN_PORT,
    sbfd::{
        CONTROL, Control, Flags, Reflector, State,
        frame::{self, HEAD_V4, HEAD_V6, Role},
    },
};
use nsm_ebpf_programs::packet;

/// A frame on the underlay, before its VXLAN header is believed.
pub(super) fn frame(bytes: &[u8]) {
    let Ok(vxlan) = packet::parse(bytes, |port| port == VXLAN_PORT) else {
        return;
    };
    assert!(vxlan.vni < 1 << 24, "a VNI has 24 bits: {vxlan:?}");
    let payload = usize::try_from(vxlan.payload).expect("an offset in a frame");
    assert!(
        payload <= bytes.len(),
        "the payload begins behind the frame: {vxlan:?}"
    );
    let udp = &bytes[payload - 16..payload];
    assert_eq!(udp[2..4], VXLAN_PORT.to_be_bytes(), "UDP port");
    assert_eq!(
        vxlan.vni.to_be_bytes()[1..],
        udp[12..15],
        "the VNI of the header"
    );
    packet::inner_headers(bytes, vxlan.payload);
}

/// A frame on the probe link.
pub(super) fn sbfd(bytes: &[u8]) {
    head::<HEAD_V4>(bytes);
    head::<HEAD_V6>(bytes);
    if let Some(control) = bytes.first_chunk::<CONTROL>() {
        let payload = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        round_trip(Control::parse(control, payload));
    }
}

/// A probe's answer is an answer, to whom the probe came from.
fn head<const N: usize>(bytes: &[u8]) {
    let Some(mut head) = bytes.first_chunk::<N>().copied() else {
        return;
    };
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let Some(packet) = frame::parse(&head, length) else {
        return;
    };
    round_trip(Some(packet.control));
    if packet.role == Role::Initiator && packet.control.your_discriminator != 0 {
        let reflector = Reflector {
            state: State::Up,
            flags: Flags::CONTROL_PLANE_INDEPENDENT,
            required_min_rx_us: 1,
        };
        frame::reflect(&mut head, &packet.control, reflector);
        let answer = frame::parse(&head, length).expect("an answer is a packet");
        assert_eq!(answer.role, Role::Reflector);
        assert_eq!(
            (answer.sender, answer.receiver),
            (packet.receiver, packet.sender)
        );
        assert_eq!(
            answer.control.your_discriminator,
            packet.control.my_discriminator
        );
    }
}

fn round_trip(control: Option<Control>) {
    if let Some(control) = control {
        let again = Control::parse(&control.to_bytes(), CONTROL as u32);
        assert_eq!(again, Some(control));
    }
}

/// A STUN server's answer, or a forged one.
pub(super) fn stun(bytes: &[u8]) {
    const ID: TransactionId = *b"transaction!";
    if let Ok(address) = stun::binding_answer(bytes, &ID) {
        assert_eq!(bytes[8..20], ID, "an answer of our transaction");
        assert!(!address.to_string().is_empty());
    }
    // With the header right, most bytes reach the attributes.
    let mut packet = vec![0x01, 0x01];
    let attributes = &bytes[..bytes.len() / 4 * 4];
    packet.extend(
        u16::try_from(attributes.len())
            .unwrap_or(u16::MAX)
            .to_be_bytes(),
    );
    packet.extend(&stun::binding_request(&ID)[4..]);
    packet.extend(attributes);
    let _ = stun::binding_answer(&packet, &ID);
}
