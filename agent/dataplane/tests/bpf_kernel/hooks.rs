//! What others do to the hooks: qdiscs and filters that were there before, programs that are taken off or displaced.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions};

use super::support::{
    PIN_DIR, assert_nothing_left, config_by, for_each_hook, hanging, has_tcx, ip, link, names, run,
    sandbox, vni,
};
use nsm_dataplane::bpf::{Bpf, BpfError, Hook};

fn tc(words: &str) {
    run("tc", words);
}

/// As `tc` shows them.
fn filters(interface: &str, way: &str) -> String {
    run("tc", &format!("filter show dev {interface} {way}"))
}

fn load(hook: Hook, interfaces: &[&str]) -> Bpf {
    Bpf::load(&config_by(hook, interfaces)).expect("load")
}

/// What is wrong with the hooks, in words.
fn faults(bpf: &Bpf) -> Vec<String> {
    let faults = bpf.look_after_hooks();
    faults.iter().map(ToString::to_string).collect()
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn an_ingress_qdisc_never_gets_the_egress_program() {
    sandbox(|| {
        link("u0");
        tc("qdisc add dev u0 ingress");
        let bpf = load(Hook::Clsact, &["u0"]);
        for _ in 0..2 {
            let there = filters("u0", "ingress");
            assert!(there.contains("underlay_ingres"), "{there}");
            assert!(!there.contains("underlay_egress"), "{there}");
            let faults = faults(&bpf);
            assert_eq!(faults.len(), 1, "{faults:?}");
            assert!(
                faults[0].contains("tc qdisc del dev u0 ingress"),
                "{faults:?}"
            );
        }
        assert_eq!(bpf.interfaces(), ["u0"]);

        // As the message says: what is mended stays mended, without a restart.
        tc("qdisc del dev u0 ingress");
        assert_eq!(faults(&bpf), [""; 0]);
        assert_eq!(hanging(Hook::Clsact, "u0").map(|it| it.len()), [1, 1]);
        bpf.detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn an_egress_program_that_an_earlier_agent_put_on_ingress_is_replaced() {
    sandbox(|| {
        link("u0");
        let bpf = load(Hook::Clsact, &["u0"]);
        let [_, egress] = hanging(Hook::Clsact, "u0");
        run(
            "bpftool",
            &format!("prog pin id {} /sys/fs/bpf/old", egress[0]),
        );
        bpf.detach_and_unpin().unwrap();
        drop(bpf);
        tc("qdisc del dev u0 clsact");
        tc("qdisc add dev u0 ingress");
        let place = "pref 47 handle 0x6e736d bpf direct-action";
        tc(&format!(
            "filter add dev u0 ingress {place} object-pinned /sys/fs/bpf/old"
        ));

        let bpf = load(Hook::Clsact, &["u0"]);
        let there = filters("u0", "ingress");
        assert!(there.contains("underlay_ingres"), "{there}");
        assert!(!there.contains("underlay_egress"), "{there}");
        bpf.detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn a_program_of_another_at_our_place_is_replaced() {
    sandbox(|| {
        link("u0");
        let bpf = load(Hook::Clsact, &["u0"]);
        let ours = hanging(Hook::Clsact, "u0");
        run(
            "bpftool",
            &format!("prog pin id {} /sys/fs/bpf/other", ours[1][0]),
        );
        tc(
            "filter replace dev u0 ingress pref 47 handle 0x6e736d bpf direct-action object-pinned /sys/fs/bpf/other",
        );
        assert_ne!(hanging(Hook::Clsact, "u0"), ours, "displaced");
        assert_eq!(faults(&bpf), [""; 0]);
        assert_eq!(hanging(Hook::Clsact, "u0"), ours);
        bpf.detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn a_filter_of_another_kind_at_our_priority_is_named() {
    sandbox(|| {
        link("u0");
        tc("qdisc add dev u0 clsact");
        tc("filter add dev u0 ingress pref 47 protocol all u32 match u32 0 0");
        let error = Bpf::load(&config_by(Hook::Clsact, &["u0"])).unwrap_err();
        let is_taken = matches!(&error, BpfError::PriorityTaken { kind, .. } if kind == "u32");
        assert!(is_taken, "{error}");
        let command = "tc filter del dev u0 ingress pref 47";
        assert!(error.to_string().contains(command), "{error}");
        let (program, words) = command.split_once(' ').unwrap();
        run(program, words);
        assert!(error.to_string().contains("start the agent"), "{error}");
        load(Hook::Clsact, &["u0"]).detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn a_taken_priority_on_egress_leaves_the_source_check() {
    sandbox(|| {
        link("u0");
        tc("qdisc add dev u0 clsact");
        tc("filter add dev u0 egress pref 47 protocol all u32 match u32 0 0");
        let bpf = load(Hook::Clsact, &["u0"]);
        assert_eq!(bpf.interfaces(), ["u0"]);
        assert_eq!(hanging(Hook::Clsact, "u0").map(|it| it.len()), [1, 0]);
        let command = "tc filter del dev u0 egress pref 47";
        for _ in 0..2 {
            let faults = faults(&bpf);
            assert_eq!(faults.len(), 1, "{faults:?}");
            assert!(faults[0].contains(command), "{faults:?}");
            assert!(!faults[0].contains("start the agent"), "{faults:?}");
        }

        // As the message says, and without a restart.
        let (program, words) = command.split_once(' ').unwrap();
        run(program, words);
        assert_eq!(faults(&bpf), [""; 0]);
        assert_eq!(hanging(Hook::Clsact, "u0").map(|it| it.len()), [1, 1]);
        bpf.detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces, tcx"]
fn a_program_that_runs_before_ours_on_tcx_is_a_fault() {
    if !has_tcx() {
        return;
    }
    sandbox(|| {
        link("u0");
        let bpf = load(Hook::Tcx, &["u0"]);
        let ours = hanging(Hook::Tcx, "u0");
        let other = ours[1][0];
        run("bpftool", &format!("prog pin id {other} /sys/fs/bpf/other"));
        let mut program = SchedClassifier::from_pin("/sys/fs/bpf/other").unwrap();
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let attached = program.attach_with_options("u0", TcAttachType::Ingress, first);
        let attached = attached.unwrap();
        let displaced = [vec![other, ours[0][0]], ours[1].clone()];
        assert_eq!(hanging(Hook::Tcx, "u0"), displaced);
        for _ in 0..2 {
            let faults = faults(&bpf);
            assert_eq!(faults.len(), 1, "{faults:?}");
            for word in ["ingress of u0", &format!("program {other}"), "before"] {
                assert!(faults[0].contains(word), "no {word}: {faults:?}");
            }
        }
        assert_eq!(
            hanging(Hook::Tcx, "u0"),
            displaced,
            "no fight for the place"
        );

        program.detach(attached).unwrap();
        assert_eq!(faults(&bpf), [""; 0]);
        bpf.detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn what_comes_before_ours_on_clsact_is_a_fault() {
    sandbox(|| {
        link("u0");
        let bpf = load(Hook::Clsact, &["u0"]);
        assert_eq!(faults(&bpf), [""; 0]);
        let [ours, other] = hanging(Hook::Clsact, "u0").map(|it| it[0]);
        run("bpftool", &format!("prog pin id {other} /sys/fs/bpf/other"));
        let by_program = "bpf direct-action object-pinned /sys/fs/bpf/other";
        for (filter, of) in [
            (
                "pref 1 protocol ip u32 match u32 0 0",
                "filter `u32` of priority 1 on",
            ),
            (
                &*format!("pref 1 protocol all {by_program}"),
                "filter `bpf` of priority 1 on",
            ),
            (
                &*format!("pref 47 protocol all handle 1 {by_program}"),
                "filter `bpf` of priority 47 on",
            ),
        ] {
            tc(&format!("filter add dev u0 ingress {filter}"));
            let found = faults(&bpf);
            assert_eq!(found.len(), 1, "{filter}: {found:?}");
            for word in ["ingress of u0", of, "source is not checked"] {
                assert!(found[0].contains(word), "no {word}: {found:?}");
            }
            assert!(hanging(Hook::Clsact, "u0")[0].contains(&ours), "{filter}");
            let place = filter.split(" protocol").next().unwrap();
            let handle = match place {
                "pref 47" => " protocol all handle 1 bpf",
                _ => "",
            };
            tc(&format!("filter del dev u0 ingress {place}{handle}"));
            assert_eq!(faults(&bpf), [""; 0], "{filter}");
        }
        // What comes behind is nobody's fault.
        tc("filter add dev u0 ingress pref 48 protocol ip u32 match u32 0 0");
        assert_eq!(faults(&bpf), [""; 0]);
        if has_tcx() {
            let mut program = SchedClassifier::from_pin("/sys/fs/bpf/other").unwrap();
            let options = TcAttachOptions::TcxOrder(LinkOrder::default());
            let attached = program.attach_with_options("u0", TcAttachType::Ingress, options);
            let attached = attached.unwrap();
            let found = faults(&bpf);
            assert!(
                matches!(&found[..], [one] if one.contains(&format!("program {other} on tcx"))),
                "{found:?}"
            );
            program.detach(attached).unwrap();
        }
        assert_eq!(faults(&bpf), [""; 0]);
        bpf.detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn pins_that_were_removed_are_made_again() {
    for_each_hook(|hook| {
        link("u0");
        let bpf = load(hook, &["u0"]);
        let dir = Path::new(PIN_DIR);
        let before = names(dir);
        let tunnel = (vni(7), "192.0.2.9".parse().unwrap());
        bpf.add_tunnel(tunnel.0, tunnel.1).unwrap();
        for pin in &before {
            fs::remove_file(dir.join(pin)).unwrap();
        }
        fs::remove_dir(dir).unwrap();
        // The kernel takes a program off a moment after the pin of its link is gone: a look before that finds it there.
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            assert_eq!(faults(&bpf), [""; 0]);
            if names(dir) == before {
                break;
            }
            assert!(Instant::now() < deadline, "{:?}", names(dir));
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(bpf);
        let next = load(hook, &["u0"]);
        assert_eq!(next.tunnels().len(), 1, "the next agent adopts them");
        next.detach_and_unpin().unwrap();
        assert_nothing_left();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn programs_that_are_taken_off_again_and_again_are_a_fault() {
    for_each_hook(|hook| {
        link("u0");
        let bpf = load(hook, &["u0"]);
        let ours = hanging(hook, "u0");
        let take_off_and_look = || {
            take_egress_off(hook, ours[1][0]);
            let found = faults(&bpf);
            assert_eq!(hanging(hook, "u0"), ours);
            found
        };
        assert_eq!(take_off_and_look(), [""; 0]);
        assert_eq!(take_off_and_look(), [""; 0]);
        let third = take_off_and_look();
        assert_eq!(third.len(), 1, "{third:?}");
        for word in ["u0", "again"] {
            assert!(third[0].contains(word), "no {word}: {third:?}");
        }
        assert_eq!(faults(&bpf), third, "the fault does not come and go");
        bpf.detach_and_unpin().unwrap();
    });
}

/// Takes our program for the way out off `u0`.
fn take_egress_off(hook: Hook, program: u32) {
    match hook {
        Hook::Clsact => tc("filter del dev u0 egress pref 47"),
        Hook::Tcx => detach_by_bpftool(program),
    }
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn programs_that_were_taken_off_are_put_back() {
    for_each_hook(|hook| {
        link("u0");
        let bpf = load(hook, &["u0"]);
        let ours = hanging(hook, "u0");
        assert_eq!(faults(&bpf), [""; 0]);
        assert_eq!(hanging(hook, "u0"), ours, "nothing to mend");

        take_egress_off(hook, ours[1][0]);
        assert_eq!(hanging(hook, "u0")[1], [0; 0]);
        assert_eq!(faults(&bpf), [""; 0]);
        assert_eq!(hanging(hook, "u0"), ours);

        if hook == Hook::Clsact {
            tc("qdisc del dev u0 clsact");
            assert_eq!(faults(&bpf), [""; 0]);
            assert_eq!(hanging(hook, "u0"), ours);
        }
        bpf.detach_and_unpin().unwrap();
        assert_eq!(bpf.look_after_hooks().len(), 0);
        assert_eq!(hanging(hook, "u0"), [[0; 0]; 2], "nothing comes back");
    });
}

/// Detaches the link that holds a program on its hook.
fn detach_by_bpftool(program: u32) {
    let links = run("bpftool", "link show");
    let held = format!("prog {program} ");
    let line = links
        .lines()
        .find(|line| (line.to_string() + " ").contains(&held));
    let id = line.and_then(|line| line.split(':').next()).expect(&links);
    run("bpftool", &format!("link detach id {id}"));
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn an_interface_that_comes_back_is_hooked_again() {
    for_each_hook(|hook| {
        link("u0");
        let bpf = load(hook, &["u0"]);
        let ours = hanging(hook, "u0");
        ip("link del u0");
        let faults_without = bpf.look_after_hooks();
        assert!(
            matches!(&faults_without[..], [BpfError::NoInterface { .. }]),
            "{faults_without:?}"
        );
        link("u0");
        assert_eq!(faults(&bpf), [""; 0]);
        assert_eq!(hanging(hook, "u0"), ours);
        bpf.detach_and_unpin().unwrap();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn an_interface_that_was_found_and_goes_is_no_fault() {
    sandbox(|| {
        link("u0");
        ip("addr add 192.0.2.1/24 dev u0");
        ip("route add default via 192.0.2.254");
        let bpf = load(Hook::Clsact, &[]);
        assert_eq!(bpf.interfaces(), ["u0"]);
        ip("link del u0");
        assert_eq!(faults(&bpf), [""; 0]);
        bpf.detach_and_unpin().unwrap();
        assert_nothing_left();
    });
}

#[test]
#[ignore = "needs root: BPF, interfaces"]
fn the_fault_of_an_interface_names_its_way_out_only() {
    sandbox(|| {
        for name in ["u0", "u1"] {
            link(name);
        }
        tc("qdisc add dev u1 ingress");
        let bpf = load(Hook::Clsact, &["u0", "u1"]);
        let faults = bpf.look_after_hooks();
        assert!(
            matches!(&faults[..], [BpfError::NoEgress { interface }] if interface == "u1"),
            "{faults:?}"
        );
        assert_eq!(hanging(Hook::Clsact, "u0").map(|it| it.len()), [1, 1]);
        // Adding it again changes neither the one nor the other.
        let again = bpf.attach("u1").unwrap_err();
        assert!(matches!(again, BpfError::NoEgress { .. }), "{again}");
        assert!(filters("u1", "ingress").contains("underlay_ingres"));
        bpf.detach_and_unpin().unwrap();
        assert!(!filters("u1", "ingress").contains("underlay"));
    });
}
