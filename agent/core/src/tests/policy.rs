//! Every rule of the policy, allowed and refused.

use std::net::IpAddr;

use proptest::prelude::*;

use crate::{
    identity::{
        Caller, Facts, NamespaceId, NetnsCookie, Node, Owner, Process, SpiffeId, Surroundings,
        UserNamespace, Workload, may_administer,
        policy::{Action, Claim, Connection, End, Name, Refusal, decide},
    },
    net::NetnsUrl,
};

const AGENTS_OWN: u32 = 998;

const fn id(inode: u64) -> NamespaceId {
    NamespaceId { device: 4, inode }
}

/// The namespaces of process 1: pid, mount, user.
const HOST: [u64; 3] = [1, 2, 3];
/// The agent's, in a container with the host's processes.
const AGENTS: [u64; 3] = [1, 20, 3];
/// Some container's.
const CONTAINER: [u64; 3] = [10, 21, 3];
/// The same of a container with a user namespace.
const MAPPED: [u64; 3] = [11, 22, 30];

/// A pod's network namespace, another pod's, and the node's.
const POD: NamespaceId = id(100);
const NEIGHBOUR: NamespaceId = id(101);
const NODES: NamespaceId = id(99);

/// The machine's first user namespace.
const FIRST: UserNamespace = UserNamespace {
    id: id(HOST[2]),
    owner: 0,
};

fn surroundings([pid, mount, user]: [u64; 3]) -> Surroundings {
    Surroundings {
        pid: id(pid),
        mount: id(mount),
        user: id(user),
    }
}

fn node() -> Node {
    Node {
        own_user: Some(AGENTS_OWN),
        surroundings: [HOST, AGENTS].map(surroundings).into(),
        networks: vec![NODES],
        has_all_networks: true,
    }
}

fn process(user: u32, place: [u64; 3], net: NamespaceId, has_sys_admin: bool) -> Process {
    let facts = Facts {
        surroundings: surroundings(place),
        net,
        has_sys_admin,
    };
    let home = Some(NetnsCookie(net.inode));
    Process::seen(Some(user), home, Some(facts), &node())
}

fn on_node(user: u32, place: [u64; 3]) -> Caller {
    Caller::on_node(process(user, place, POD, false))
}

fn root() -> Caller {
    on_node(0, HOST)
}

/// Of a process that is not seen any more.
fn unseen() -> Caller {
    Caller::on_node(Process::seen(Some(0), None, None, &node()))
}

fn peer(last: u8) -> Caller {
    Caller::from_address(Some(IpAddr::from([192, 0, 2, last])))
}

#[test]
fn an_administrator_is_root_or_the_agents_user_beside_process_1_or_the_agent() {
    for (caller, wanted) in [
        (root(), true),
        (on_node(0, AGENTS), true),
        (on_node(AGENTS_OWN, HOST), true),
        (on_node(1000, HOST), false),
        (on_node(0, CONTAINER), false),
        (on_node(AGENTS_OWN, CONTAINER), false),
        (on_node(0, MAPPED), false),
        (unseen(), false),
        (Caller::nsmgr(process(0, CONTAINER, POD, true)), false),
        (peer(1), false),
        (Caller::over_network(), false),
    ] {
        assert_eq!(caller.is_administrator(), wanted, "{caller:?}");
    }
    // One namespace that differs is enough.
    for at in 0..3 {
        let mut place = HOST;
        place[at] = 77;
        assert!(!on_node(0, place).is_administrator(), "{place:?}");
    }
    // Without a user of the agent's own there is root alone, and a user that is not known is nobody.
    let facts = root().process().and_then(|root| root.facts);
    let seen = |user, own_user| {
        let node = Node { own_user, ..node() };
        Process::seen(user, None, facts, &node).is_administrator
    };
    assert!(seen(Some(0), None));
    assert!(!seen(Some(AGENTS_OWN), None));
    assert!(!seen(None, None));
}

#[test]
fn fellows_are_of_one_user_in_one_pod() {
    let of = |user, place, net| process(user, place, net, false);
    let own = of(1000, CONTAINER, POD);
    for (other, wanted) in [
        (process(1000, CONTAINER, POD, true), true),
        // Another container of the pod.
        (of(1000, [12, 25, 3], POD), true),
        (of(1001, CONTAINER, POD), false),
        (of(1000, MAPPED, POD), false),
        (of(1000, CONTAINER, NEIGHBOUR), false),
        (Process::seen(Some(1000), None, None, &node()), false),
        (Process::unknown(), false),
    ] {
        assert_eq!(own.is_fellow_of(&other), wanted, "{other:?}");
    }
}

#[test]
fn every_caller_may_connect_monitor_and_find() {
    for caller in [root(), on_node(1000, CONTAINER), unseen(), peer(1)] {
        for action in [
            Action::Request,
            Action::Close,
            Action::Monitor,
            Action::Find,
        ] {
            assert_eq!(decide(&caller, action), Ok(()), "{caller:?} {action:?}");
        }
    }
}

#[test]
fn status_and_paths_of_sockets_are_for_administrators() {
    for (caller, allowed) in [
        (root(), true),
        (on_node(AGENTS_OWN, AGENTS), true),
        (on_node(1000, HOST), false),
        (on_node(0, CONTAINER), false),
        (unseen(), false),
        (peer(1), false),
    ] {
        let path = "unix:///run/priv.sock";
        for (action, words) in [
            (Action::Status, "root of the node"),
            (Action::Drain, "root of the node"),
            (Action::SocketPath(path), path),
        ] {
            match decide(&caller, action) {
                Ok(()) => assert!(allowed, "{caller:?} {action:?}"),
                Err(refusal) => {
                    assert!(!allowed, "{caller:?} {action:?}");
                    assert!(refusal.to_string().contains(words), "{refusal}");
                }
            }
        }
    }
}

#[test]
fn a_name_is_its_owners_alone() {
    let of = |caller: Caller| Some(caller.owner());
    for (caller, owner, allowed) in [
        (on_node(1000, CONTAINER), None, true),
        (on_node(1000, CONTAINER), of(on_node(1000, CONTAINER)), true),
        (
            on_node(1001, CONTAINER),
            of(on_node(1000, CONTAINER)),
            false,
        ),
        // The same user number of another user namespace, and of another pod.
        (on_node(1000, MAPPED), of(on_node(1000, CONTAINER)), false),
        (
            Caller::on_node(process(0, CONTAINER, NEIGHBOUR, false)),
            of(on_node(0, CONTAINER)),
            false,
        ),
        (root(), of(on_node(1000, CONTAINER)), true),
        (root(), of(peer(1)), false),
        (peer(1), of(on_node(1000, CONTAINER)), false),
        (peer(1), of(root()), false),
        (on_node(1000, HOST), of(peer(1)), false),
        (peer(2), of(peer(1)), true),
    ] {
        let full = "nse-1@one.example";
        for action in [
            Action::Register(Name { full, owner }),
            Action::Unregister(Name { full, owner }),
        ] {
            let decided = decide(&caller, action);
            assert_eq!(decided.is_ok(), allowed, "{caller:?} {action:?}");
            if let Err(refusal) = decided {
                let text = refusal.to_string();
                assert!(
                    text.contains(full) && text.contains("another name"),
                    "{text}"
                );
            }
        }
    }
}

#[test]
fn a_connection_is_its_owners_alone() {
    let [own, other] = [("client", "1"), ("client", "2")].map(Some);
    let tenant = || on_node(1000, CONTAINER);
    let neighbour = Caller::on_node(process(1000, CONTAINER, NEIGHBOUR, true));
    let nsmgr = |net| Caller::nsmgr(process(0, CONTAINER, net, false));
    for (caller, owner, shown, allowed) in [
        (tenant(), tenant(), own, true),
        (tenant(), tenant(), other, true),
        (neighbour, tenant(), own, false),
        (root(), tenant(), own, false),
        (peer(1), tenant(), own, false),
        (nsmgr(POD), tenant(), own, false),
        (tenant(), nsmgr(POD), own, false),
        (nsmgr(NEIGHBOUR), nsmgr(POD), own, true),
        (tenant(), peer(1), own, false),
        (root(), peer(1), own, false),
        // Over the network a hop that is replaced has another address, and the same client at the head of its path.
        (peer(1), peer(1), own, true),
        (peer(2), peer(1), own, true),
        (peer(1), peer(1), other, false),
        (peer(1), peer(1), None, false),
    ] {
        let connection = Connection {
            owner: owner.owner(),
            first: own,
            shown,
        };
        let decided = decide(&caller, Action::Change(connection));
        let wanted = if allowed {
            Ok(())
        } else {
            Err(Refusal::ConnectionOfAnother)
        };
        assert_eq!(decided, wanted, "{caller:?} {owner:?} {shown:?}");
    }
}

/// A claim of the namespace `net`.
fn claim<'a>(netns: &'a NetnsUrl, net: NamespaceId, owners: &'a [UserNamespace]) -> Claim<'a> {
    Claim {
        end: End::Client,
        netns,
        id: Some(net),
        is_passed: true,
        is_nodes_own: node().owns(net),
        nodes_own_allowed: false,
        owners,
    }
}

fn refused_by(caller: &Caller, claim: Claim<'_>) -> Option<&'static str> {
    let netns = claim.netns.to_string();
    let refusal = decide(caller, Action::Namespace(claim)).err()?;
    assert!(refusal.to_string().contains(&netns), "{refusal}");
    Some(match refusal {
        Refusal::UnprovenNamespace { .. } => "unproven",
        Refusal::ForeignNamespace { .. } => "foreign",
        Refusal::UnseenProcess { .. } => "unseen",
        Refusal::NodesNamespace { .. } => "nodes",
        Refusal::UnknownNode { .. } => "unknown",
        other => panic!("{other}"),
    })
}

#[test]
fn a_namespace_is_believed_of_who_is_in_it_or_could_enter_it() {
    let netns: NetnsUrl = "inode://4/100".parse().unwrap();
    let at = |place, net, has_sys_admin| Caller::on_node(process(0, place, net, has_sys_admin));
    // The pod's network namespace belongs to the machine's first user namespace, as an ordinary pod's does.
    for (caller, is_passed, wanted) in [
        (root(), true, None),
        (root(), false, None),
        (at(CONTAINER, POD, false), true, None),
        (at(CONTAINER, POD, false), false, Some("unproven")),
        (at(CONTAINER, NEIGHBOUR, false), true, Some("foreign")),
        // A privileged container.
        (at(CONTAINER, NEIGHBOUR, true), true, None),
        (at(CONTAINER, NEIGHBOUR, true), false, Some("unproven")),
        // Rights in a user namespace of its own are none over what belongs to the first.
        (at(MAPPED, NEIGHBOUR, true), true, Some("foreign")),
        (unseen(), true, Some("unseen")),
        (Caller::nsmgr(Process::unknown()), true, None),
        (Caller::nsmgr(Process::unknown()), false, Some("unproven")),
        (peer(1), true, Some("unproven")),
    ] {
        for end in [End::Client, End::Endpoint] {
            let owners = [FIRST];
            let claim = Claim {
                end,
                is_passed,
                ..claim(&netns, POD, &owners)
            };
            assert_eq!(refused_by(&caller, claim), wanted, "{caller:?} {claim:?}");
        }
    }
}

#[test]
fn the_nodes_own_namespace_takes_the_configuration_and_an_administrator() {
    let netns: NetnsUrl = "inode://4/99".parse().unwrap();
    let inside = || Caller::on_node(process(1000, HOST, NODES, true));
    for (caller, allowed, wanted) in [
        (root(), false, Some("nodes")),
        (root(), true, None),
        (inside(), false, Some("nodes")),
        (inside(), true, Some("nodes")),
        (Caller::nsmgr(Process::unknown()), true, Some("nodes")),
        (peer(1), true, Some("nodes")),
    ] {
        let owners = [FIRST];
        let claim = Claim {
            nodes_own_allowed: allowed,
            ..claim(&netns, NODES, &owners)
        };
        assert_eq!(refused_by(&caller, claim), wanted, "{caller:?} {allowed}");
    }
}

/// Where process 1 is not seen, each namespace may be its: nobody gets a link in one, whatever else is proved.
#[test]
fn what_may_be_the_nodes_own_namespace_is_refused_as_that_is() {
    let netns: NetnsUrl = "inode://4/100".parse().unwrap();
    let blind = Node {
        has_all_networks: false,
        ..node()
    };
    assert_eq!(blind.owns(NODES), Some(true));
    assert_eq!(blind.owns(POD), None);
    let inside = || Caller::on_node(process(1000, HOST, POD, true));
    for (caller, allowed, wanted) in [
        (root(), false, Some("unknown")),
        (root(), true, None),
        (inside(), false, Some("unknown")),
        (inside(), true, Some("unknown")),
        (Caller::nsmgr(Process::unknown()), true, Some("unknown")),
        (peer(1), true, Some("unknown")),
    ] {
        for is_passed in [false, true] {
            let owners = [FIRST];
            let claim = Claim {
                is_nodes_own: blind.owns(POD),
                is_passed,
                nodes_own_allowed: allowed,
                ..claim(&netns, POD, &owners)
            };
            assert_eq!(refused_by(&caller, claim), wanted, "{caller:?} {allowed}");
        }
    }
}

#[test]
fn rights_reach_down_and_the_maker_of_a_user_namespace_has_all_in_it() {
    let [outer, inner] = [(30, 1000), (31, 1001)].map(|(inode, owner)| UserNamespace {
        id: id(inode),
        owner,
    });
    let owners = [inner, outer, FIRST];
    let of = |user, namespace, has_sys_admin| {
        process(user, [10, 21, namespace], NEIGHBOUR, has_sys_admin)
    };
    for (process, wanted) in [
        (of(0, 3, true), true),
        (of(5, 30, true), true),
        (of(5, 31, true), true),
        (of(5, 32, true), false),
        (of(5, 30, false), false),
        // Made it, seen from its parent.
        (of(1000, 3, false), true),
        (of(1001, 30, false), true),
        // Made it, and is elsewhere.
        (of(1000, 30, false), false),
        (of(1001, 3, false), false),
        // The first belongs to user 0 and was made by nobody.
        (of(0, 3, false), false),
    ] {
        assert_eq!(may_administer(&process, &owners), wanted, "{process:?}");
    }
    assert!(!may_administer(&of(0, 3, false), &[FIRST]));
    assert!(!may_administer(&of(0, 3, true), &[]));
}

fn places() -> impl Strategy<Value = [u64; 3]> {
    [1_u64..4, 1_u64..4, 1_u64..6]
}

fn chains() -> impl Strategy<Value = Vec<UserNamespace>> {
    let namespace = (1_u64..6, 0_u32..3);
    let namespace = namespace.prop_map(|(inode, owner)| UserNamespace {
        id: id(inode),
        owner,
    });
    proptest::collection::vec(namespace, 0..4)
}

proptest! {
    /// Whoever is no administrator gets a namespace only by a descriptor, never one of the node's, and only one that it is in or that
    /// its rights reach.
    #[test]
    fn nobody_gets_what_it_could_not_enter(
        user in 0_u32..3,
        place in places(),
        net in 98_u64..102,
        wanted in 98_u64..102,
        has_sys_admin: bool,
        is_passed: bool,
        nodes_own_allowed: bool,
        owners in chains(),
    ) {
        let process = process(user, place, id(net), has_sys_admin);
        let netns: NetnsUrl = format!("inode://4/{wanted}").parse().unwrap();
        let claim = Claim {
            is_passed,
            nodes_own_allowed,
            ..claim(&netns, id(wanted), &owners)
        };
        let decided = decide(&Caller::on_node(process), Action::Namespace(claim));
        let admin = process.is_administrator;
        let reaches = net == wanted || may_administer(&process, &owners);
        let allowed = match claim.is_nodes_own == Some(true) {
            true => admin && nodes_own_allowed,
            false => admin || (is_passed && reaches),
        };
        prop_assert_eq!(decided.is_ok(), allowed);
    }

    /// What one kind of socket made is out of reach for the others.
    #[test]
    fn kinds_of_owners_do_not_mix(user in 0_u32..3, place in places(), last: u8) {
        let process = process(user, place, POD, true);
        let callers = [Caller::on_node(process), Caller::nsmgr(process), peer(last)];
        for (at, caller) in callers.iter().enumerate() {
            for (by, owner) in callers.iter().enumerate() {
                let connection = Connection {
                    owner: owner.owner(),
                    first: Some(("client", "1")),
                    shown: Some(("client", "1")),
                };
                let decided = decide(caller, Action::Change(connection));
                prop_assert_eq!(decided.is_ok(), at == by);
            }
        }
    }
}

#[test]
fn an_owner_over_the_network_is_alike_whatever_its_address() {
    let [one, two] = [peer(1).owner(), peer(2).owner()];
    assert!(one.is_alike(&two) && one != two);
    assert!(!one.is_alike(&Owner::Nsmgr));
}

#[test]
fn a_proven_workload_owns_what_it_made_wherever_it_calls_from() {
    let id = |text: &str| text.parse::<SpiffeId>().unwrap();
    let [nsc, other] = ["spiffe://td/nsc", "spiffe://td/other"].map(id);
    let domain = "one.example".parse().unwrap();
    let role = |first: &SpiffeId| Workload::of_role(nsc.trust_domain(), &domain, "nsmgr", first);
    let by = |last, workload| peer(last).with_workload(workload);
    let owner = by(1, role(&nsc)).owner();
    let shown = Some(("client", "1"));
    for (caller, is_own, follows) in [
        (by(1, role(&nsc)), true, true),
        (by(2, role(&nsc)), true, true),
        (by(1, role(&other)), false, true),
        (by(1, Workload::of_id(&nsc, &nsc)), false, false),
        // The path alone proves nothing any more.
        (peer(1), false, false),
        (root(), false, false),
    ] {
        let connection = Connection {
            owner,
            first: shown,
            shown,
        };
        let decided = decide(&caller, Action::Change(connection));
        assert_eq!(decided.is_ok(), is_own, "{caller:?}");
        let full = "nse-1";
        let name = Name {
            full,
            owner: Some(owner),
        };
        assert_eq!(decide(&caller, Action::Register(name)).is_ok(), is_own);
        assert_eq!(decide(&caller, Action::Unregister(name)).is_ok(), is_own);
        assert_eq!(caller.owner().may_follow(&owner), follows);
    }
    // What came in plain text is no workload's.
    let connection = Connection {
        owner: peer(1).owner(),
        first: shown,
        shown,
    };
    let decided = decide(&by(1, role(&nsc)), Action::Change(connection));
    assert_eq!(decided, Err(Refusal::ConnectionOfAnother));
    // On a socket of the node the process is the owner, whatever it has proved.
    let process = on_node(1000, CONTAINER);
    assert_eq!(
        process.clone().with_workload(role(&nsc)).owner(),
        process.owner()
    );
}
