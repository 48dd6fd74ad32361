use std::{
    net::IpAddr,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use proptest::prelude::*;

use super::map;
use crate::{
    liveness::{Reflector, sbfd::Discriminator},
    mechanism::{
        Asked, Granted, KERNEL, Kernel, LOCAL, MechanismError, Parameters, REMOTE, RemoteMechanism,
        TunnelEnd, TunnelKey, VXLAN, Vxlan, choose, lower_mtu,
    },
    net::{IfName, IfNameError, NetnsUrl, NetnsUrlError, Vni, special::of_address},
};

#[test]
fn what_is_absent_or_empty_is_none() {
    assert_eq!(Vxlan::parse(&map(&[])), Ok(Vxlan::default()));
    let empty = map(&[
        ("src_ip", ""),
        ("dst_ip", ""),
        ("src_port", ""),
        ("dst_port", ""),
        ("vni", ""),
        ("MTU", ""),
    ]);
    assert_eq!(Vxlan::parse(&empty), Ok(Vxlan::default()));
    assert_eq!(
        Kernel::parse(&map(&[("name", ""), ("inodeURL", "")])),
        Ok(Kernel::default())
    );
    assert_eq!(Vxlan::default().src_port, 4789);
}

#[test]
fn a_recorded_mechanism_parses() {
    let params = map(&[
        ("dst_ip", "198.51.100.6"),
        ("dst_port", "4789"),
        ("orig_dst_ip", "10.2.0.6"),
        ("orig_src_ip", ""),
        ("src_ip", "10.1.0.5"),
        ("src_port", "14789"),
        ("vni", "2863933"),
    ]);
    let vxlan = Vxlan::parse(&params).unwrap();
    assert_eq!(vxlan.dst_ip, Some("198.51.100.6".parse().unwrap()));
    assert_eq!((vxlan.src_port, vxlan.dst_port), (14789, 4789));
    assert_eq!(vxlan.vni.map(|vni| vni.get()), Some(2_863_933));
    let mut again = params.clone();
    vxlan.write(&mut again);
    assert_eq!(again, params, "writing back changes nothing");
}

#[test]
fn each_bad_value_is_named_with_its_key() {
    let error = |key: &str, value: &str| Vxlan::parse(&map(&[(key, value)])).unwrap_err();
    for (key, value) in [
        ("src_ip", "10.1.0"),
        ("dst_ip", "host"),
        ("src_ip", "10.1.0.5:4789"),
        ("dst_ip", " 10.1.0.5"),
    ] {
        assert!(
            matches!(error(key, value), MechanismError::Address { .. }),
            "{value}"
        );
    }
    for value in [
        "0.0.0.0",
        "0.0.0.1",
        "::",
        "::1",
        "127.0.0.1",
        "::ffff:127.0.0.1",
        "169.254.1.1",
        "169.254.169.254",
        "fe80::1",
        "239.1.1.1",
        "ff02::1",
        "240.0.0.1",
        "255.255.255.255",
    ] {
        assert!(
            matches!(
                error("dst_ip", value),
                MechanismError::NotUnicast { key: "dst_ip", .. }
            ),
            "{value}"
        );
    }
    for value in ["0", "65536", "-1", "+1", "http", "4789 "] {
        assert!(
            matches!(
                error("src_port", value),
                MechanismError::Port {
                    key: "src_port",
                    ..
                }
            ),
            "{value}"
        );
        assert!(
            matches!(
                error("dst_port", value),
                MechanismError::Port {
                    key: "dst_port",
                    ..
                }
            ),
            "{value}"
        );
    }
    for value in ["0", "16777216", "-5", "abc", "1e3"] {
        assert!(
            matches!(error("vni", value), MechanismError::Vni { .. }),
            "{value}"
        );
    }
    for value in ["67", "65536", "x", "99999999999999999999999"] {
        assert!(
            matches!(error("MTU", value), MechanismError::Mtu { .. }),
            "{value}"
        );
    }
    let message = error("dst_port", "70000").to_string();
    assert!(
        message.contains("dst_port") && message.contains("`70000`"),
        "{message}"
    );
    assert_eq!(
        Vxlan::parse(&map(&[("MTU", "0")])).unwrap().mtu,
        None,
        "NSM writes 0 for unknown"
    );
}

#[test]
fn an_ipv4_address_in_ipv6_clothes_is_ipv4() {
    let vxlan = Vxlan::parse(&map(&[("src_ip", "::ffff:192.0.2.1")])).unwrap();
    assert_eq!(vxlan.src_ip, Some("192.0.2.1".parse().unwrap()));
    assert_eq!(
        RemoteMechanism::Vxlan.mtu(1500, "::ffff:192.0.2.1".parse().unwrap()),
        1450
    );
}

#[test]
fn a_client_offers_nothing_for_the_server() {
    let mut params = map(&[
        ("dst_ip", "198.51.100.6"),
        ("vni", "7"),
        ("unknown", "stays"),
    ]);
    Vxlan {
        src_ip: Some("10.1.0.5".parse().unwrap()),
        ..Vxlan::default()
    }
    .write(&mut params);
    assert_eq!(
        params,
        map(&[
            ("src_ip", "10.1.0.5"),
            ("src_port", "4789"),
            ("unknown", "stays")
        ])
    );
}

#[test]
fn interface_names_are_what_linux_takes() {
    for good in ["nsm-1", "a", "eth0.100", "fifteen-bytes-x", "..."] {
        assert_eq!(IfName::try_from(good).unwrap().to_string(), good);
    }
    assert!(matches!("".parse::<IfName>(), Err(IfNameError::Length(_))));
    let long = "sixteen-bytes-xx".parse::<IfName>().unwrap_err();
    assert_eq!(
        long.to_string(),
        "interface name `sixteen-bytes-xx` has 16 bytes: 1 to 15 are allowed"
    );
    assert!(
        matches!("üüüüüüüü".parse::<IfName>(), Err(IfNameError::Length(_))),
        "bytes count, not characters"
    );
    for bad in ["a/b", "a:b", "a b", "a\tb", "a\nb", "nsm%d", "a\0"] {
        assert!(
            matches!(bad.parse::<IfName>(), Err(IfNameError::Character { .. })),
            "{bad:?}"
        );
    }
    for bad in [".", ".."] {
        assert!(matches!(bad.parse::<IfName>(), Err(IfNameError::Dots(_))));
    }
    for reserved in ["all", "default"] {
        let error = reserved.parse::<IfName>().unwrap_err().to_string();
        assert!(
            error.contains(reserved) && error.contains("reserved"),
            "{error}"
        );
    }
    let error = Kernel::parse(&map(&[("name", "much-too-long-a-name")]))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("parameter name") && error.contains("much-too-long-a-name"),
        "{error}"
    );
}

#[test]
fn namespace_urls() {
    let url = |text: &str| text.parse::<NetnsUrl>();
    assert_eq!(
        url("file:///proc/17/ns/net"),
        Ok(NetnsUrl::File(PathBuf::from("/proc/17/ns/net")))
    );
    assert_eq!(
        url("file:///run/a%20b"),
        Ok(NetnsUrl::File(PathBuf::from("/run/a b")))
    );
    assert_eq!(
        url("inode://4/4026531840"),
        Ok(NetnsUrl::Inode {
            dev: 4,
            inode: 4_026_531_840
        })
    );
    for bad in ["", "/proc/17/ns/net", "http://x", "FILE:///x", "file:/x"] {
        assert!(matches!(url(bad), Err(NetnsUrlError::Scheme(_))), "{bad}");
    }
    for bad in [
        "file://",
        "file://host/x",
        "file:///x?y",
        "file:///x#y",
        "file:///x%",
        "file:///x%2",
        "file:///x%zz",
        "file:///x%00",
    ] {
        assert!(matches!(url(bad), Err(NetnsUrlError::Path(_))), "{bad}");
    }
    for bad in [
        "inode://",
        "inode://4",
        "inode://4/",
        "inode:///5",
        "inode://4/x",
        "inode://-4/5",
        "inode://4/5/6",
        "inode://4/99999999999999999999",
    ] {
        assert!(matches!(url(bad), Err(NetnsUrlError::Inode(_))), "{bad}");
    }
}

#[test]
fn the_first_supported_offer_is_taken() {
    let ours = [(REMOTE, VXLAN), (LOCAL, KERNEL)];
    let pick = |offered: &[(&str, &str)]| choose(offered.iter().copied(), &ours);
    assert_eq!(
        pick(&[(LOCAL, KERNEL), (REMOTE, VXLAN)]),
        Ok(0),
        "the client's order counts"
    );
    assert_eq!(pick(&[(REMOTE, "WIREGUARD"), (REMOTE, VXLAN)]), Ok(1));
    assert_eq!(pick(&[("", VXLAN)]), Ok(0));
    assert!(pick(&[(LOCAL, VXLAN)]).is_err());
    assert!(pick(&[(REMOTE, "vxlan")]).is_err());
    let error = pick(&[(REMOTE, "WIREGUARD"), (REMOTE, "IPSEC")])
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "no common mechanism: REMOTE/WIREGUARD, REMOTE/IPSEC offered, REMOTE/VXLAN, LOCAL/KERNEL supported"
    );
    let error = pick(&[]).unwrap_err();
    assert!(matches!(error, MechanismError::NoneOffered { .. }));
    assert!(
        error
            .to_string()
            .ends_with("REMOTE/VXLAN, LOCAL/KERNEL supported"),
        "{error}"
    );
}

fn end() -> impl Strategy<Value = TunnelEnd> {
    let reflector = (1_u32.., 1..=Vni::MAX).prop_map(|(discriminator, vni)| Reflector {
        discriminator: Discriminator::new(discriminator).expect("above zero"),
        vni: vni.try_into().expect("a VNI"),
    });
    let address = (1_u8..127, any::<u8>()).prop_map(|(a, b)| IpAddr::from([a, 0, 2, b]));
    (address, 1_u16.., proptest::option::of(reflector)).prop_map(|(address, port, reflector)| {
        TunnelEnd {
            address,
            port,
            reflector,
        }
    })
}

proptest! {
    /// What each end writes is what the other end reads, whatever the mechanism; so it is when they do it again over what stands.
    #[test]
    fn both_ends_agree(client in end(), server in end(), vni in 1..=Vni::MAX, mtu in 576_u32..9000) {
        let key = TunnelKey::Vni(vni.try_into().expect("a VNI"));
        for mechanism in RemoteMechanism::ALL {
            let offer = mechanism.offer(&client, mtu);
            let mut params = offer.clone();
            let mut standing = None;
            for _ in 0..2 {
                let asked = Asked { client, mtu: Some(mtu), standing };
                prop_assert_eq!(mechanism.asked(&params), Ok(asked));
                let lower = mtu - 1;
                prop_assert_eq!(mechanism.answer(&mut params, &server, key, lower), Ok(()));
                let watches_path = server.reflector.is_some();
                let granted = Granted { server, watches_path, mtu: Some(lower), key };
                prop_assert_eq!(mechanism.granted(&params), Ok(granted));
                mechanism.renew(&mut params, &offer);
                standing = Some((key, Some(server.address)));
            }
            mechanism.forget_grant(&mut params);
            prop_assert_eq!(mechanism.asked(&params).map(|it| it.standing), Ok(None));
            prop_assert_eq!(mechanism.granted(&params), Err(MechanismError::NotGranted));
        }
    }
}

#[test]
fn the_table_names_each_mechanism_once() {
    for mechanism in RemoteMechanism::ALL {
        assert_eq!(
            RemoteMechanism::of_type(mechanism.wire_type()),
            Some(mechanism)
        );
    }
    for payload in ["", "IP", "ETHERNET"] {
        assert_eq!(
            RemoteMechanism::for_payload(payload),
            Some(RemoteMechanism::Vxlan)
        );
    }
    assert_eq!(RemoteMechanism::of_type(KERNEL), None);
}

#[test]
fn mtus() {
    let (v4, v6): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
    assert_eq!(
        (
            RemoteMechanism::Vxlan.mtu(1500, v4),
            RemoteMechanism::Vxlan.mtu(1500, v6)
        ),
        (1450, 1430)
    );
    assert_eq!(
        (
            RemoteMechanism::Vxlan.mtu(0, v4),
            RemoteMechanism::Vxlan.mtu(60, v6)
        ),
        (0, 0)
    );
    assert_eq!(
        (
            lower_mtu(0, 9),
            lower_mtu(9, 0),
            lower_mtu(8, 9),
            lower_mtu(0, 0)
        ),
        (9, 9, 8, 0)
    );
}

fn vxlans() -> impl Strategy<Value = Vxlan> {
    let address = prop::option::of(
        any::<IpAddr>()
            .prop_map(|ip| ip.to_canonical())
            .prop_filter("unicast", |ip| of_address(*ip).is_none()),
    );
    let port = prop_oneof![Just(4789), 1u16..];
    let vni = prop::option::of((1u32..=0xff_ffff).prop_map(|n| n.try_into().unwrap()));
    let discriminator = any::<u32>().prop_map(Discriminator::new);
    (
        address.clone(),
        address,
        port.clone(),
        port,
        (vni.clone(), vni),
        prop::option::of(68u32..=65535),
        (discriminator.clone(), discriminator),
    )
        .prop_map(
            |(src_ip, dst_ip, src_port, dst_port, vnis, mtu, discriminators)| Vxlan {
                src_ip,
                dst_ip,
                src_port,
                dst_port,
                vni: vnis.0,
                mtu,
                src_discriminator: discriminators.0,
                dst_discriminator: discriminators.1,
                sbfd_vni: vnis.1,
            },
        )
}

proptest! {
    #[test]
    fn a_vxlan_mechanism_round_trips(old in vxlans(), vxlan in vxlans(), extra in prop::collection::btree_map("x[a-z]{1,3}", ".{0,5}", 0..4)) {
        let mut params: Parameters = extra.clone();
        old.write(&mut params);
        vxlan.write(&mut params);
        prop_assert_eq!(Vxlan::parse(&params).unwrap(), vxlan);
        prop_assert!(extra.iter().all(|(key, value)| params.get(key) == Some(value)));
    }

    #[test]
    fn no_parameters_panic(params in prop::collection::btree_map("src_ip|dst_ip|src_port|dst_port|vni|MTU|name|inodeURL|sbfd_vni|sbfd_discriminator_src", ".{0,12}|[0-9:.%/]{0,12}", 0..8)) {
        let _ = Vxlan::parse(&params);
        let _ = Kernel::parse(&params);
    }

    #[test]
    fn namespace_paths_round_trip(path in prop::collection::vec(1u8.., 0..40)) {
        let path = Path::new("/").join(PathBuf::from(std::ffi::OsString::from_vec(path)));
        let url = NetnsUrl::File(path);
        prop_assert_eq!(url.to_string().parse::<NetnsUrl>().unwrap(), url);
    }

    #[test]
    fn kernel_mechanisms_round_trip(name in "[a-z0-9_-]{1,15}", dev: u64, inode: u64) {
        let kernel = Kernel { name: Some(name.parse().unwrap()), netns: Some(NetnsUrl::Inode { dev, inode }) };
        let mut params = map(&[("netnsInode", "5")]);
        kernel.write(&mut params);
        prop_assert_eq!(Kernel::parse(&params).unwrap(), kernel);
        prop_assert_eq!(params.len(), 3);
    }

    #[test]
    fn lower_mtu_is_symmetric_and_never_above_what_is_known(a: u32, b: u32) {
        let lower = lower_mtu(a, b);
        prop_assert_eq!(lower, lower_mtu(b, a));
        prop_assert!([a, b].contains(&lower));
        prop_assert!((a == 0 || lower <= a) && (b == 0 || lower <= b));
    }
}
