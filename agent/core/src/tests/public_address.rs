use std::{net::IpAddr, time::Duration};

use proptest::prelude::*;

use super::at;
use crate::address::{
    ipmap::IpMap,
    public::{
        Decision, Finding, Firmware, Outcome, Provider, Source, TRUST, Tracker, decide,
        is_globally_routable,
        metadata::AnswerError,
        stun::{self, StunError},
    },
};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn finding(source: Source, address: &str) -> Finding {
    Finding {
        source,
        address: ip(address),
    }
}

#[test]
fn the_first_source_in_the_order_of_trust_wins_and_the_rest_that_differs_is_a_conflict() {
    let order = [
        Source::Configuration,
        Source::IpMap,
        Source::Metadata(Provider::Aws),
        Source::Kubernetes,
        Source::Stun("stun.example:3478".to_owned()),
        Source::Route,
    ];
    // Each with an address of its own; asked in the reverse order.
    let findings: Vec<Finding> = order
        .iter()
        .enumerate()
        .map(|(at, source)| finding(source.clone(), &format!("192.0.2.{at}")))
        .rev()
        .collect();
    for from in 0..order.len() {
        let of_trust: Vec<Finding> = findings.iter().rev().skip(from).cloned().collect();
        let asked: Vec<Finding> = of_trust.iter().rev().cloned().collect();
        assert_eq!(
            decide(None, asked),
            Decision {
                chosen: Some(of_trust[0].clone()),
                conflicts: of_trust[1..].to_vec()
            }
        );
    }
    assert_eq!(decide(None, []), Decision::default());
}

#[test]
fn sources_that_agree_and_addresses_of_the_other_family_are_no_conflict() {
    let findings = || {
        [
            finding(Source::Kubernetes, "2001:db8::1"),
            finding(Source::Metadata(Provider::Gcp), "192.0.2.1"),
            finding(Source::Route, "192.0.2.1"),
        ]
    };
    let decision = decide(Some(ip("10.0.0.1")), findings());
    assert_eq!(
        decision.chosen,
        Some(finding(Source::Metadata(Provider::Gcp), "192.0.2.1"))
    );
    assert_eq!(decision.conflicts, []);
    let decision = decide(Some(ip("fd00::1")), findings());
    assert_eq!(
        decision.chosen,
        Some(finding(Source::Kubernetes, "2001:db8::1"))
    );
    let mapped = decide(Some(ip("::ffff:10.0.0.1")), findings());
    assert_eq!(mapped.chosen.unwrap().address, ip("192.0.2.1"));
}

#[test]
fn a_source_that_fails_is_believed_for_a_while_and_one_that_denies_is_not() {
    let aws = || Source::Metadata(Provider::Aws);
    let failed = || Outcome::Failed("no answer".to_owned());
    let mut tracker = Tracker::default();
    tracker.observe(aws(), failed(), at(0));
    assert_eq!(tracker.decide(None).chosen, None);
    tracker.observe(aws(), Outcome::Address(ip("192.0.2.1")), at(1));
    tracker.observe(aws(), failed(), at(60));
    assert_eq!(
        tracker.decide(None).chosen,
        Some(finding(aws(), "192.0.2.1"))
    );
    let (_, known) = tracker.sources().next().unwrap();
    assert_eq!(known.trouble.as_deref(), Some("no answer"));
    // The clock was set back.
    tracker.observe(aws(), failed(), at(0));
    assert!(tracker.decide(None).chosen.is_some());
    tracker.observe(aws(), failed(), at(1) + TRUST);
    assert_eq!(tracker.decide(None).chosen, None);

    tracker.observe(aws(), Outcome::Address(ip("192.0.2.1")), at(2000));
    tracker.observe(aws(), Outcome::None, at(2001));
    assert_eq!(tracker.decide(None).chosen, None);
    tracker.observe(aws(), failed(), at(2002));
    assert_eq!(tracker.decide(None).chosen, None);
}

#[test]
fn what_is_no_address_of_a_host_is_a_failure_of_its_source() {
    let remote = [
        Source::Metadata(Provider::Gcp),
        Source::Kubernetes,
        Source::Stun("stun.example:3478".to_owned()),
    ];
    let nobody = [
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "::ffff:0.0.0.0",
        "::ffff:224.0.0.1",
    ];
    let loopback = ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"];
    let all = nobody.iter().chain(&loopback);
    for (source, text) in remote
        .iter()
        .flat_map(|source| all.clone().map(move |text| (source, *text)))
        .chain(nobody.map(|text| (&Source::IpMap, text)))
    {
        let mut tracker = Tracker::default();
        tracker.observe(source.clone(), Outcome::Address(ip(text)), at(0));
        let (_, known) = tracker.sources().next().unwrap();
        assert_eq!(known.address, None, "{source}: {text}");
        let trouble = known.trouble.as_deref().unwrap_or_default();
        assert!(
            trouble.contains("is no address of a host that others reach"),
            "{trouble}"
        );
        // What was known before holds as with any other failure.
        let known = ip(if ip(text).to_canonical().is_ipv4() {
            "192.0.2.1"
        } else {
            "2001:db8::1"
        });
        tracker.observe(source.clone(), Outcome::Address(known), at(1));
        tracker.observe(source.clone(), Outcome::Address(ip(text)), at(2));
        assert_eq!(tracker.decide(None).chosen.unwrap().address, known);
    }
    // What the operator wrote was checked where it was read; a machine that is a world of its own has loopback addresses.
    for (source, text) in [
        (Source::Configuration, "127.0.0.1"),
        (Source::IpMap, "127.0.0.2"),
    ] {
        let mut tracker = Tracker::default();
        tracker.observe(source, Outcome::Address(ip(text)), at(0));
        assert_eq!(tracker.decide(None).chosen.unwrap().address, ip(text));
    }
}

#[test]
fn an_address_on_the_move_is_no_conflict_between_those_asked_before_and_after() {
    let (aws, stun) = (
        || Source::Metadata(Provider::Aws),
        || Source::Stun("s".to_owned()),
    );
    let address = |text| Outcome::Address(ip(text));
    let mut tracker = Tracker::default();
    tracker.observe(aws(), address("192.0.2.1"), at(0));
    tracker.observe(stun(), address("192.0.2.1"), at(0));
    let before = tracker.decide(None);
    assert_eq!(before.conflicts, []);
    // It moves: one has told, the other has not yet.
    tracker.observe(aws(), address("192.0.2.7"), at(60));
    let meanwhile = tracker.decide(None).before_the_rest(&before);
    assert_eq!(meanwhile.chosen, Some(finding(aws(), "192.0.2.7")));
    assert_eq!(meanwhile.conflicts, []);
    // The other says something else for good.
    tracker.observe(stun(), address("192.0.2.9"), at(61));
    let conflict = tracker.decide(None);
    assert_eq!(conflict.conflicts, [finding(stun(), "192.0.2.9")]);
    // That stands during the next round, as long as it is one.
    tracker.observe(aws(), address("192.0.2.8"), at(120));
    let meanwhile = tracker.decide(None).before_the_rest(&conflict);
    assert_eq!(meanwhile.conflicts, conflict.conflicts);
    tracker.observe(aws(), address("192.0.2.9"), at(121));
    let meanwhile = tracker.decide(None).before_the_rest(&conflict);
    assert_eq!(meanwhile.conflicts, []);
    // The first denies, and the second is what holds: with itself it has no conflict.
    tracker.observe(aws(), Outcome::None, at(180));
    tracker.observe(stun(), address("192.0.2.10"), at(180));
    let meanwhile = tracker.decide(None).before_the_rest(&conflict);
    assert_eq!(meanwhile.chosen, Some(finding(stun(), "192.0.2.10")));
    assert_eq!(meanwhile.conflicts, []);
}

#[test]
fn an_address_that_moved_is_found_at_the_next_round() {
    let mut tracker = Tracker::default();
    for (round, address) in [(0, "192.0.2.1"), (1, "192.0.2.7")] {
        tracker.observe(Source::Kubernetes, Outcome::Address(ip(address)), at(round));
        assert_eq!(tracker.decide(None).chosen.unwrap().address, ip(address));
    }
}

#[test]
fn globally_routable_is_what_the_internet_routes_to_a_host() {
    for text in [
        "1.1.1.1",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "169.253.255.255",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.167.255.255",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "::ffff:8.8.8.8",
        "2600::1",
        "2001:200::1",
        "2a00:1450::1",
    ] {
        assert!(is_globally_routable(ip(text)), "{text}");
    }
    for text in [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "64:ff9b::1",
        "fe80::1",
        "fd00::1",
        "ff02::1",
        "2001::1",
        "2001:db8::1",
        "2002:c000:201::1",
        "3fff::1",
        "5f00::1",
    ] {
        assert!(!is_globally_routable(ip(text)), "{text}");
    }
}

#[test]
fn metadata_answers_are_read() {
    let flavor = |name: &str| (name == "metadata-flavor").then_some("Google");
    for provider in Provider::ALL {
        assert_eq!(
            provider.read(200, flavor, "192.0.2.1\n"),
            Ok(Some(ip("192.0.2.1")))
        );
        assert_eq!(provider.read(404, flavor, "<html>"), Ok(None));
        assert_eq!(provider.read(200, flavor, ""), Ok(None));
        assert_eq!(
            provider.read(403, flavor, ""),
            Err(AnswerError::Status { status: 403 })
        );
        assert_eq!(
            provider.read(200, flavor, "<html>"),
            Err(AnswerError::NoAddress("<html>".to_owned()))
        );
        let long = "ü".repeat(1000);
        assert!(
            provider
                .read(200, flavor, &long)
                .unwrap_err()
                .to_string()
                .len()
                < 250
        );
    }
    assert_eq!(
        Provider::Gcp.read(200, |_| None, "192.0.2.1"),
        Err(AnswerError::NotTheService("metadata-flavor", Provider::Gcp))
    );
}

/// The transaction of RFC 5769's test vectors.
const ID: stun::TransactionId = [
    0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87, 0xdf, 0xae,
];

/// RFC 5769 section 2.2.
const ANSWER_V4: &[u8] = &[
    0x01, 0x01, 0x00, 0x3c, 0x21, 0x12, 0xa4, 0x42, 0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86,
    0xfa, 0x87, 0xdf, 0xae, 0x80, 0x22, 0x00, 0x0b, 0x74, 0x65, 0x73, 0x74, 0x20, 0x76, 0x65, 0x63,
    0x74, 0x6f, 0x72, 0x20, 0x00, 0x20, 0x00, 0x08, 0x00, 0x01, 0xa1, 0x47, 0xe1, 0x12, 0xa6, 0x43,
    0x00, 0x08, 0x00, 0x14, 0x2b, 0x91, 0xf5, 0x99, 0xfd, 0x9e, 0x90, 0xc3, 0x8c, 0x74, 0x89, 0xf9,
    0x2a, 0xf9, 0xba, 0x53, 0xf0, 0x6b, 0xe7, 0xd7, 0x80, 0x28, 0x00, 0x04, 0xc0, 0x7d, 0x4c, 0x96,
];

/// RFC 5769 section 2.3.
const ANSWER_V6: &[u8] = &[
    0x01, 0x01, 0x00, 0x48, 0x21, 0x12, 0xa4, 0x42, 0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86,
    0xfa, 0x87, 0xdf, 0xae, 0x80, 0x22, 0x00, 0x0b, 0x74, 0x65, 0x73, 0x74, 0x20, 0x76, 0x65, 0x63,
    0x74, 0x6f, 0x72, 0x20, 0x00, 0x20, 0x00, 0x14, 0x00, 0x02, 0xa1, 0x47, 0x01, 0x13, 0xa9, 0xfa,
    0xa5, 0xd3, 0xf1, 0x79, 0xbc, 0x25, 0xf4, 0xb5, 0xbe, 0xd2, 0xb9, 0xd9, 0x00, 0x08, 0x00, 0x14,
    0xa3, 0x82, 0x95, 0x4e, 0x4b, 0xe6, 0x7b, 0xf1, 0x17, 0x84, 0xc9, 0x7c, 0x82, 0x92, 0xc2, 0x75,
    0xbf, 0xe3, 0xed, 0x41, 0x80, 0x28, 0x00, 0x04, 0xc8, 0xfb, 0x0b, 0x4c,
];

/// An answer of our transaction with these attributes.
fn answer(kind: u16, attributes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(attributes.len()).unwrap();
    [
        &kind.to_be_bytes()[..],
        &length.to_be_bytes(),
        &0x2112_a442u32.to_be_bytes(),
        &ID,
        attributes,
    ]
    .concat()
}

#[test]
fn stun_answers_of_the_rfc_are_read() {
    assert_eq!(
        stun::binding_answer(ANSWER_V4, &ID),
        Ok("192.0.2.1:32853".parse().unwrap())
    );
    assert_eq!(
        stun::binding_answer(ANSWER_V6, &ID),
        Ok("[2001:db8:1234:5678:11:2233:4455:6677]:32853"
            .parse()
            .unwrap())
    );
    let request = stun::binding_request(&ID);
    assert_eq!(&request[..8], [0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42]);
    assert_eq!(request[8..], ID);
    assert_eq!(
        stun::binding_answer(&request, &ID),
        Err(StunError::Malformed),
        "a request is no answer"
    );
}

#[test]
fn what_is_no_stun_answer_of_ours_is_refused() {
    assert_eq!(
        stun::binding_answer(ANSWER_V4, &[7; 12]),
        Err(StunError::WrongTransaction)
    );
    assert_eq!(stun::binding_answer(&[], &ID), Err(StunError::Malformed));
    let old = [&[0, 1, 0, 8, 0, 1, 0, 80][..], &[192, 0, 2, 1]].concat();
    assert_eq!(
        stun::binding_answer(&answer(0x0101, &old), &ID),
        Err(StunError::NoAddress)
    );
    let refusal = [0, 9, 0, 4, 0, 0, 4, 1];
    assert_eq!(
        stun::binding_answer(&answer(0x0111, &refusal), &ID),
        Err(StunError::Refused(401))
    );
    let unknown = [0x7f, 0, 0, 0];
    assert_eq!(
        stun::binding_answer(&answer(0x0101, &unknown), &ID),
        Err(StunError::UnknownAttribute(0x7f00))
    );
    let family = [0, 0x20, 0, 4, 0, 3, 0, 0];
    assert_eq!(
        stun::binding_answer(&answer(0x0101, &family), &ID),
        Err(StunError::Malformed)
    );
    assert!(stun::WAITS[0] >= Duration::from_millis(500));
}

proptest! {
    #[test]
    fn no_packet_panics(packet in proptest::collection::vec(any::<u8>(), 0..120)) {
        let _ = stun::binding_answer(&packet, &ID);
    }

    #[test]
    fn no_attributes_panic(kind in prop_oneof![Just(0x0101u16), Just(0x0111)],
                           attributes in proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(8), Just(9), Just(0x20), any::<u8>()], 0..64)) {
        let _ = stun::binding_answer(&answer(kind, &attributes), &ID);
    }

    #[test]
    fn an_answer_cut_off_or_with_one_byte_changed_is_never_taken_for_another_address_of_another_transaction(
        at in 0..ANSWER_V6.len(), byte: u8, id: [u8; 12]
    ) {
        prop_assert!(stun::binding_answer(&ANSWER_V6[..at], &ID).is_err());
        let mut changed = ANSWER_V6.to_vec();
        changed[at] = byte;
        if id != ID && changed[8..20] != id {
            prop_assert!(stun::binding_answer(&changed, &id).is_err());
        }
    }

    #[test]
    fn a_map_with_another_address_keeps_the_rest(own: [u8; 4], public: [u8; 4], more: [u8; 4]) {
        let (own, public, more): (IpAddr, IpAddr, IpAddr) = (own.into(), public.into(), more.into());
        let map = IpMap::from_pairs([(own, public)]).unwrap();
        let changed = map.with(own, more).unwrap();
        prop_assert_eq!(changed.get(own), Some(more));
        prop_assert_eq!(changed.internal(more), own);
        if more != own {
            let both = map.with(more, public);
            prop_assert!(both.is_err(), "a public address of two nodes");
        }
    }
}

#[test]
fn a_cloud_is_what_the_firmware_names() {
    let azure = "7783-7084-3265-9085-8269-3286-77";
    for (system, product, board, tag, cloud) in [
        (
            "Amazon EC2",
            "m5.large",
            "Amazon EC2",
            "Amazon EC2",
            Some(Provider::Aws),
        ),
        (
            "Google",
            "Google Compute Engine",
            "Google",
            "",
            Some(Provider::Gcp),
        ),
        (
            "Microsoft Corporation",
            "Virtual Machine",
            "Microsoft Corporation",
            azure,
            Some(Provider::Azure),
        ),
        ("Packet", "c2.large.arm", "", "", Some(Provider::Equinix)),
        (
            "Dell Inc.",
            "PowerEdge R6515",
            "Equinix",
            "",
            Some(Provider::Equinix),
        ),
        ("Amazon EC2\n", "", "", "", Some(Provider::Aws)),
        // A laptop, and Hyper-V at home.
        ("Google", "Lulu", "Google", "", None),
        (
            "Microsoft Corporation",
            "Virtual Machine",
            "Microsoft Corporation",
            "",
            None,
        ),
        ("Dell Inc.", "Virtual Machine", "Dell Inc.", azure, None),
        ("QEMU", "Amazon EC2", "", "Amazon EC2", None),
        ("", "", "", "", None),
    ] {
        let firmware = Firmware {
            system_vendor: system.to_owned(),
            product: product.to_owned(),
            board_vendor: board.to_owned(),
            asset_tag: tag.to_owned(),
            ..Firmware::default()
        };
        assert_eq!(firmware.cloud(), cloud, "{firmware:?}");
    }
}

/// The instances of EC2 that still run on Xen: the vendor is Xen's own, so the version of the BIOS and both identities count, too.
#[test]
fn xen_instances_of_ec2_are_recognised() {
    const UUID: &str = "ec2f8d1c-94ed-01b2-a3c4-5e6f70819203";
    let xen = |vendor: &str, version: &str, uuid: &str, serial: &str| Firmware {
        system_vendor: vendor.to_owned(),
        product: "HVM domU".to_owned(),
        bios_version: version.to_owned(),
        product_uuid: uuid.to_owned(),
        product_serial: serial.to_owned(),
        ..Firmware::default()
    };
    for (vendor, version, uuid, serial, cloud) in [
        ("Xen", "4.11.amazon", UUID, UUID, Some(Provider::Aws)),
        (
            "Xen",
            "4.2.amazon\n",
            "EC2F8D1C-94ED",
            "EC2F8D1C-94ED",
            Some(Provider::Aws),
        ),
        ("Xen", "4.11", UUID, UUID, None),
        ("Xen", "4.11.amazon", "1234", UUID, None),
        ("Xen", "4.11.amazon", UUID, "", None),
        ("QEMU", "4.11.amazon", UUID, UUID, None),
    ] {
        let firmware = xen(vendor, version, uuid, serial);
        assert_eq!(firmware.cloud(), cloud, "{firmware:?}");
    }
}
