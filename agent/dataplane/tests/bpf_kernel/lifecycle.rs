//! Attaching, pinning, adopting, removing: on interfaces of a namespace that lives as long as the test.

use std::{fs, thread};

use super::support::{
    DROP, Frame, NEXT, PIN_DIR, addr, assert_nothing_left, config, config_by,
    drop_capabilities_but, for_each_hook, hanging, has_tcx, ip, link, load_detached, names,
    programs, run, sandbox, verdict, vni,
};
use aya::maps::{Array, Map, MapData};
use nsm_dataplane::bpf::{Bpf, BpfConfig, BpfError, Direction, Hook, underlay_interfaces};

const MAPS: [&str; 18] = [
    "ACCEPTED",
    "COUNTERS",
    "DEVICES",
    "DROPS",
    "FOREIGN",
    "FORWARD",
    "GENERATION",
    "HOPS",
    "LAYOUT",
    "LINKS",
    "NODE",
    "PORTS",
    "PROBE_PATHS",
    "SESSIONS",
    "SESSION_INDEX",
    "SETTINGS",
    "TAKEN",
    "TUNNELS",
];

const PEER: &str = "198.51.100.7";

/// Everything in the pin directory.
fn pins(hook: Hook, links: &[&str]) -> Vec<String> {
    // What clsact has is pinned nowhere: its filters keep the programs.
    let links = if hook == Hook::Tcx { links } else { &[] };
    let links = links
        .iter()
        .flat_map(|name| ["egress", "ingress"].map(|way| format!("link_{name}_{way}")));
    MAPS.iter()
        .map(|name| (*name).to_owned())
        .chain(links)
        .collect()
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn tcx_is_chosen_where_the_kernel_has_it() {
    sandbox(|| {
        let best = if has_tcx() { Hook::Tcx } else { Hook::Clsact };
        assert_eq!(load_detached().unwrap().hook(), best);
        let tcx = Bpf::load(&config_by(Hook::Tcx, &[]));
        match tcx {
            Ok(bpf) => assert_eq!(bpf.hook(), best),
            Err(error) => assert!(matches!(error, BpfError::NoTcx(_)) && !has_tcx(), "{error}"),
        }
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn programs_hang_on_both_ways_until_they_are_removed() {
    for_each_hook(|hook| {
        let on = |interface: &str| hanging(hook, interface).map(|programs| programs.len());
        link("u0");
        link("u0.100");
        let bpf = Bpf::load(&config_by(hook, &["u0", "u0.100"])).unwrap();
        assert_eq!(bpf.hook(), hook);
        assert_eq!(bpf.interfaces(), ["u0", "u0.100"]);
        assert_eq!(names(PIN_DIR), pins(hook, &["u0%2e100", "u0"]));
        for interface in ["u0", "u0.100"] {
            assert_eq!(on(interface), [1, 1]);
        }

        bpf.detach("u0").unwrap();
        bpf.detach("u0").unwrap();
        assert_eq!(on("u0"), [0, 0]);
        link("u1");
        bpf.attach("u1").unwrap();
        bpf.attach("u1").unwrap();
        assert_eq!(on("u1"), [1, 1], "once is enough");
        assert_eq!(bpf.interfaces(), ["u0.100", "u1"]);

        bpf.detach_and_unpin().unwrap();
        for interface in ["u0", "u0.100", "u1"] {
            assert_eq!(on(interface), [0, 0]);
        }
        assert_nothing_left();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn the_next_agent_adopts_maps_and_replaces_programs() {
    for_each_hook(|hook| {
        link("u0");
        link("u1");
        let bpf = Bpf::load(&config_by(hook, &["u0", "u1"])).unwrap();
        bpf.add_port(8472).unwrap();
        let first = bpf.add_tunnel(vni(7), addr(PEER)).unwrap();
        let slot = bpf.add_tunnel(vni(42), addr(PEER)).unwrap();
        bpf.remove_tunnel(vni(7), addr(PEER)).unwrap();
        let programs = programs();
        let frame = Frame::new(PEER, "192.0.2.1", 42).bytes();
        assert_eq!(verdict(&programs, Direction::In, &frame), NEXT);
        let old = hanging(hook, "u1");
        // As after kill -9: nothing is closed in order.
        drop(bpf);
        assert_eq!(hanging(hook, "u1"), old, "programs outlive the process");

        let bpf = Bpf::load(&config_by(hook, &["u1"])).unwrap();
        assert_eq!(
            names(PIN_DIR),
            pins(hook, &["u1"]),
            "the interface that is no longer wanted is let go"
        );
        assert_eq!(hanging(hook, "u0").concat(), Vec::<u32>::new());
        let new = hanging(hook, "u1");
        for (old, new) in old.iter().zip(&new) {
            assert_eq!(new.len(), 1);
            assert_ne!(old, new);
        }
        let known = bpf.tunnels();
        assert_eq!(known.len(), 1);
        assert_eq!(
            (known[0].vni, known[0].peer, known[0].slot),
            (42, addr(PEER), slot)
        );
        assert_eq!(bpf.add_tunnel(vni(42), addr(PEER)).unwrap(), slot);
        let over_8472 = Frame::new(PEER, "192.0.2.1", 42)
            .with(|f| f.port = 8472)
            .bytes();
        assert_eq!(verdict(&programs, Direction::In, &over_8472), NEXT);
        assert_eq!(
            bpf.counters(slot).unwrap().received.packets,
            2,
            "counters go on"
        );
        let stranger = Frame::new("203.0.113.9", "192.0.2.1", 42).bytes();
        assert_eq!(verdict(&programs, Direction::In, &stranger), DROP);
        let next = bpf.add_tunnel(vni(9), addr(PEER)).unwrap();
        assert!(
            next != slot && next != first,
            "a new slot, not one in use, not one just freed"
        );
        bpf.detach_and_unpin().unwrap();
        assert_nothing_left();
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn an_interrupted_change_is_repaired_on_adoption() {
    use nsm_ebpf_common::{Tunnel, TunnelKey, UNSPECIFIED, mapped};
    sandbox(|| {
        let bpf = load_detached().unwrap();
        let slot = bpf.add_tunnel(vni(42), addr(PEER)).unwrap();
        drop(bpf);
        let map = MapData::from_pin(format!("{PIN_DIR}/TUNNELS")).unwrap();
        let map = Map::from_map_data(map).unwrap();
        let mut tunnels: aya::maps::HashMap<_, TunnelKey, Tunnel> = map.try_into().unwrap();
        let key = |vni, peer| TunnelKey { vni, peer };
        let tunnel = Tunnel::counted;
        // A missing marker, a stale one, a slot used twice, one out of range.
        tunnels.remove(&key(42, UNSPECIFIED)).unwrap();
        tunnels.insert(key(5, UNSPECIFIED), tunnel(9), 0).unwrap();
        tunnels
            .insert(key(6, mapped([10, 0, 0, 1])), tunnel(20_000), 0)
            .unwrap();

        let bpf = load_detached().unwrap();
        assert_eq!(bpf.tunnels().len(), 1);
        assert_eq!(bpf.tunnels()[0].slot, slot);
        let programs = programs();
        let from_stranger = |vni| Frame::new("203.0.113.9", "192.0.2.1", vni).bytes();
        assert_eq!(verdict(&programs, Direction::In, &from_stranger(42)), DROP);
        assert_eq!(verdict(&programs, Direction::In, &from_stranger(5)), NEXT);
        assert_eq!(verdict(&programs, Direction::In, &from_stranger(6)), NEXT);
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn maps_of_another_layout_are_replaced() {
    sandbox(|| {
        let bpf = load_detached().unwrap();
        bpf.add_tunnel(vni(42), addr(PEER)).unwrap();
        drop(bpf);
        let map = Map::from_map_data(MapData::from_pin(format!("{PIN_DIR}/LAYOUT")).unwrap());
        let mut layout: Array<_, u32> = map.unwrap().try_into().unwrap();
        layout.set(0, 99, 0).unwrap();
        let create = "type ringbuf entries 4096 name EVENTS";
        run("bpftool", &format!("map create {PIN_DIR}/EVENTS {create}"));
        let bpf = load_detached().unwrap();
        assert_eq!(bpf.slots_in_use(), 0, "another version");
        assert_eq!(names(PIN_DIR), MAPS, "an earlier version had more");
        bpf.add_tunnel(vni(42), addr(PEER)).unwrap();
        drop(bpf);

        fs::remove_file(format!("{PIN_DIR}/DROPS")).unwrap();
        let create = "type array key 4 value 8 entries 3 name DROPS";
        run("bpftool", &format!("map create {PIN_DIR}/DROPS {create}"));
        let bpf = load_detached().unwrap();
        assert_eq!(bpf.slots_in_use(), 0, "another shape");
        assert!(bpf.drops().unwrap().values().all(|count| *count == 0));
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn an_interface_that_was_made_anew_is_attached_anew() {
    for_each_hook(|hook| {
        let on = |interface: &str| hanging(hook, interface).map(|programs| programs.len());
        link("u0");
        let bpf = Bpf::load(&config_by(hook, &["u0"])).unwrap();
        ip("link del u0");
        link("u0");
        assert_eq!(on("u0"), [0, 0]);
        bpf.attach("u0").unwrap();
        assert_eq!(on("u0"), [1, 1]);
        drop(bpf);

        ip("link del u0");
        link("u0");
        let bpf = Bpf::load(&config_by(hook, &["u0"])).unwrap();
        assert_eq!(on("u0"), [1, 1]);

        ip("link del u0");
        assert!(matches!(
            bpf.attach("u0"),
            Err(BpfError::NoInterface { .. })
        ));
        bpf.detach_and_unpin().unwrap();
        assert_nothing_left();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn one_hook_is_used_at_a_time() {
    if !has_tcx() {
        return;
    }
    sandbox(|| {
        link("u1");
        let on = |hook| hanging(hook, "u1").map(|programs| programs.len());
        for (hook, other) in [
            (Hook::Clsact, Hook::Tcx),
            (Hook::Tcx, Hook::Clsact),
            (Hook::Clsact, Hook::Tcx),
        ] {
            let bpf = Bpf::load(&config_by(hook, &["u1"])).unwrap();
            assert_eq!((on(hook), on(other)), ([1, 1], [0, 0]), "{hook}");
            // As after kill -9: the next agent finds the programs.
            drop(bpf);
        }
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn a_failed_load_leaves_nothing_of_its_own() {
    for_each_hook(|hook| {
        let on = || hanging(hook, "u0").map(|programs| programs.len());
        link("u0");
        let error = Bpf::load(&config_by(hook, &["u0", "missing0"])).unwrap_err();
        assert!(
            error.to_string().contains("no interface missing0"),
            "{error}"
        );
        assert_eq!(on(), [0, 0]);
        assert_nothing_left();

        // What an earlier agent left still works after the failure.
        let bpf = Bpf::load(&config_by(hook, &["u0"])).unwrap();
        bpf.add_tunnel(vni(42), addr(PEER)).unwrap();
        drop(bpf);
        Bpf::load(&config_by(hook, &["u0", "missing0"])).unwrap_err();
        assert_eq!(on(), [1, 1]);
        assert_eq!(load_detached().unwrap().slots_in_use(), 1);
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn an_interface_without_ethernet_headers_is_refused() {
    sandbox(|| {
        ip("link add g0 type vxlan external gpe dstport 4790");
        let error = Bpf::load(&config(&["g0"])).unwrap_err();
        assert!(matches!(error, BpfError::NotEthernet { .. }), "{error}");
        assert_nothing_left();
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn a_pin_directory_has_one_user() {
    sandbox(|| {
        let bpf = load_detached().unwrap();
        let error = load_detached().unwrap_err();
        assert!(matches!(error, BpfError::InUse { .. }), "{error}");
        let other = BpfConfig {
            pin_dir: "/sys/fs/bpf/a/b.c".into(),
            ..config(&[])
        };
        let error = Bpf::load(&other).unwrap_err();
        assert!(
            matches!(error, BpfError::Pin { .. }),
            "no dots on a BPF filesystem: {error}"
        );
        let other = BpfConfig {
            pin_dir: "/sys/fs/bpf/second".into(),
            ..config(&[])
        };
        Bpf::load(&other).unwrap().detach_and_unpin().unwrap();
        bpf.detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn the_missing_right_is_named_and_three_suffice() {
    const NET_ADMIN: u32 = 12;
    const PERFMON: u32 = 38;
    const BPF: u32 = 39;
    for (held, expected) in [
        (vec![], Some("lacks CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN")),
        (vec![NET_ADMIN], Some("lacks CAP_BPF and CAP_PERFMON")),
        (vec![BPF, PERFMON], Some("lacks CAP_NET_ADMIN")),
        (vec![BPF, NET_ADMIN], Some("lacks CAP_PERFMON")),
        (vec![BPF, PERFMON, NET_ADMIN], None),
    ] {
        sandbox(move || {
            link("u0");
            drop_capabilities_but(&held);
            match (Bpf::load(&config(&["u0"])), expected) {
                (Ok(bpf), None) => {
                    let frame = Frame::new(PEER, "192.0.2.1", 42).bytes();
                    let programs = programs();
                    assert_eq!(verdict(&programs, Direction::In, &frame), NEXT);
                    bpf.detach_and_unpin().unwrap();
                }
                (Err(error), Some(expected)) => {
                    assert!(
                        error.to_string().contains(expected),
                        "{error}, not {expected}"
                    );
                }
                (result, expected) => panic!("{result:?}, not {expected:?}"),
            }
            assert_nothing_left();
        });
    }
}

#[test]
#[ignore = "needs root: BPF"]
fn a_bpf_filesystem_is_mounted_when_allowed() {
    sandbox(|| {
        let mounted = || fs::read_to_string("/proc/thread-self/mounts").unwrap();
        while mounted().contains("/sys/fs/bpf bpf") {
            run("umount", "/sys/fs/bpf");
        }
        let error = load_detached().unwrap_err();
        assert!(
            error.to_string().contains("mount -t bpf bpf /sys/fs/bpf"),
            "{error}"
        );
        let may = BpfConfig {
            mount_bpffs: true,
            ..config(&[])
        };
        Bpf::load(&may).unwrap().detach_and_unpin().unwrap();
        assert!(mounted().contains("/sys/fs/bpf bpf"));
    });
}

#[test]
#[ignore = "needs root: interfaces"]
fn the_underlay_is_found() {
    sandbox(|| {
        for name in ["d4", "d6", "held", "other"] {
            link(name);
        }
        ip("addr add 192.0.2.1/24 dev d4");
        ip("route add default via 192.0.2.254");
        ip("-6 addr add 2001:db8::1/64 dev d6 nodad");
        ip("-6 route add default via 2001:db8::ff dev d6");
        ip("addr add 198.51.100.1/32 dev held");
        ip("addr add 203.0.113.1/32 dev other");
        assert_eq!(underlay_interfaces(&[]).unwrap(), ["d4", "d6"]);
        let held = [addr("198.51.100.1"), addr("192.0.2.1"), addr("127.0.0.1")];
        assert_eq!(underlay_interfaces(&held).unwrap(), ["d4", "d6", "held"]);
        let bpf = Bpf::load(&config(&[])).unwrap();
        assert_eq!(bpf.interfaces(), ["d4", "d6"]);
        bpf.detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn bpftool_prints_field_names() {
    sandbox(|| {
        let bpf = load_detached().unwrap();
        bpf.add_tunnel(vni(42), addr(PEER)).unwrap();
        let dump = |map: &str| run("bpftool", &format!("map dump pinned {PIN_DIR}/{map}"));
        let counters = dump("COUNTERS");
        for field in [
            "in_packets",
            "in_bytes",
            "out_packets",
            "out_bytes",
            "last_in_ns",
        ] {
            assert!(counters.contains(&format!("\"{field}\": ")), "{field}");
        }
        let tunnels = dump("TUNNELS");
        for field in ["\"vni\": 42", "\"peer\"", "\"slot\""] {
            assert!(tunnels.contains(field), "{field} in {tunnels}");
        }
        assert!(dump("DROPS").contains("\"value\": "));
    });
}

#[test]
#[ignore = "needs root: BPF"]
fn tunnels_are_added_from_many_threads() {
    sandbox(|| {
        let bpf = load_detached().unwrap();
        thread::scope(|scope| {
            for worker in 0..8_u32 {
                let bpf = &bpf;
                scope.spawn(move || {
                    for n in 0..500 {
                        let vni = vni(1 + worker * 500 + n);
                        let slot = bpf.add_tunnel(vni, addr(PEER)).unwrap();
                        assert_eq!(bpf.counters(slot).unwrap().received.packets, 0);
                        if n % 2 == 0 {
                            assert!(bpf.remove_tunnel(vni, addr(PEER)).unwrap());
                        }
                    }
                });
            }
        });
        assert_eq!(bpf.slots_in_use(), 2000);
    });
}
