//! The external device against the live kernel, in a network namespace of the thread's own.

use std::{net::UdpSocket, process::Command, thread};

use nix::sched::{CloneFlags, unshare};

use super::*;

const NAME: &str = "nsm-ext-4789";

fn spec() -> ExternalSpec {
    ExternalSpec {
        domain: "external.example".to_owned(),
        port: 4789,
    }
}

/// Runs a test in a namespace that goes with its thread.
fn on_a_node(test: impl FnOnce(&mut Netlink) + Send) {
    let run = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        test(&mut Netlink::open().unwrap());
    };
    thread::scope(|scope| scope.spawn(run).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}: {output:?}");
}

/// The names of all links but the loopback.
fn names(netlink: &mut Netlink) -> Vec<String> {
    let links = observe::links(netlink).unwrap();
    let names = links.into_iter().map(|link| link.name);
    names.filter(|name| name != "lo").collect()
}

#[test]
#[ignore = "needs root: makes network namespaces and links"]
fn is_made_once_and_adopted() {
    on_a_node(|netlink| {
        let made = ensure(netlink, &spec()).unwrap();
        assert!(!made.adopted && made.link.up && !made.link.arp && !made.link.generates_addresses);
        assert_eq!((made.link.group, made.link.peer), (NODE_GROUP, None));
        // Both families, whatever the device's own.
        for table in ["udp", "udp6"] {
            let path = format!("/proc/thread-self/net/{table}");
            let sockets = std::fs::read_to_string(path).unwrap();
            assert!(sockets.contains(":12B5"), "{sockets}");
        }
        let adopted = ensure(netlink, &spec()).unwrap();
        assert!(adopted.adopted);
        assert_eq!(adopted.link, made.link);

        remove(netlink, &spec()).unwrap();
        remove(netlink, &spec()).unwrap();
        assert_eq!(names(netlink), [""; 0]);
    });
}

#[test]
#[ignore = "needs root: makes network namespaces and links"]
fn is_repaired() {
    on_a_node(|netlink| {
        let made = ensure(netlink, &spec()).unwrap();
        assert_eq!(look(netlink, &made).unwrap(), Look::Right);
        ip(&format!("link set {NAME} down"));
        ip(&format!("link set {NAME} group 7 arp on name other"));
        let looked = look(netlink, &made).unwrap();
        assert!(matches!(looked, Look::Repaired(_)), "{looked:?}");
        assert_eq!(ensure(netlink, &spec()).unwrap().link, made.link);

        ip(&format!("link delete {NAME}"));
        assert_eq!(look(netlink, &made).unwrap(), Look::Gone);
        assert!(!ensure(netlink, &spec()).unwrap().adopted);
    });
}

#[test]
#[ignore = "needs root: makes network namespaces and links"]
fn one_that_is_not_as_wanted_is_made_anew() {
    on_a_node(|netlink| {
        let alias = spec().alias().unwrap();
        ip(&format!("link add {NAME} type vxlan external dstport 4790"));
        ip(&format!("link set {NAME} alias {alias}"));
        assert!(!ensure(netlink, &spec()).unwrap().adopted);

        // A stranger's link of the same name stays.
        remove(netlink, &spec()).unwrap();
        ip(&format!("link add {NAME} type bridge"));
        let error = ensure(netlink, &spec()).unwrap_err();
        assert!(matches!(error, LinkError::NameTaken { .. }), "{error}");
        remove(netlink, &spec()).unwrap();
        assert_eq!(names(netlink), [NAME]);
    });
}

#[test]
#[ignore = "needs root: makes network namespaces and links"]
fn who_has_the_port_is_named() {
    on_a_node(|netlink| {
        let socket = UdpSocket::bind("0.0.0.0:4789").unwrap();
        let error = ensure(netlink, &spec()).unwrap_err();
        let LinkError::PortTaken { holder, .. } = &error else {
            panic!("{error}");
        };
        assert!(
            matches!(holder, PortHolder::Process { pid, .. } if *pid == std::process::id()),
            "{error}"
        );
        drop(socket);
        assert_eq!(names(netlink), [""; 0]);

        // As a network plugin has one.
        ip("link add vxlan.other type vxlan id 7 dstport 4789");
        ip("link set vxlan.other up");
        let error = ensure(netlink, &spec()).unwrap_err();
        let LinkError::PortTaken { holder, .. } = &error else {
            panic!("{error}");
        };
        let name = "vxlan.other".to_owned();
        assert_eq!(*holder, PortHolder::Vxlan { name }, "{error}");
        assert_eq!(names(netlink), ["vxlan.other"]);
    });
}

/// It probed by a VXLAN device on the same port.
#[test]
#[ignore = "needs root: makes network namespaces and links"]
fn the_probe_link_of_an_earlier_version_goes() {
    on_a_node(|netlink| {
        ip("link add nsm-mgmt4-4789 type vxlan id 7 dstport 4789");
        ip("link set nsm-mgmt4-4789 up");
        ip("link set nsm-mgmt4-4789 alias proxy-nsmgr/external.example/management-4789");
        ensure(netlink, &spec()).unwrap();
        assert_eq!(names(netlink), [NAME]);
    });
}
