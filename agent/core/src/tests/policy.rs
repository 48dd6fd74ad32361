//! Every rule of the policy, allowed and refused.

use crate::{
    identity::{
        Caller, User,
        policy::{Action, Claim, End, Name, Refusal, decide},
    },
    net::NetnsUrl,
};

const AGENTS_OWN: u32 = 998;

fn user(uid: u32) -> User {
    User::of(Some(uid), Some(AGENTS_OWN))
}

fn root() -> Caller {
    Caller::on_node(user(0))
}

fn agents_user() -> Caller {
    Caller::on_node(user(AGENTS_OWN))
}

fn other(uid: u32) -> Caller {
    Caller::on_node(user(uid))
}

fn unknown() -> Caller {
    Caller::on_node(User::of(None, Some(AGENTS_OWN)))
}

fn callers() -> [Caller; 5] {
    [
        root(),
        agents_user(),
        other(1000),
        unknown(),
        Caller::over_network(),
    ]
}

#[test]
fn root_and_the_agents_own_user_are_privileged() {
    let privileged = callers().map(|caller| caller.is_privileged());
    assert_eq!(privileged, [true, true, false, false, false]);
    // Without the agent's own user there is root alone.
    assert_eq!(User::of(Some(AGENTS_OWN), None), User::Other(AGENTS_OWN));
    let shown = callers().map(|caller| caller.user().map(|user| user.to_string()));
    let shown: Vec<_> = shown.iter().map(Option::as_deref).collect();
    let wanted = ["user 0", "user 998", "user 1000", "user unknown"].map(Some);
    assert_eq!(shown[..4], wanted);
    assert_eq!(shown[4], None);
}

#[test]
fn every_caller_may_connect_monitor_and_find() {
    for caller in callers() {
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
fn the_status_is_for_those_who_administer_the_node() {
    let allowed = callers().map(|caller| decide(&caller, Action::Status).is_ok());
    assert_eq!(allowed, [true, true, false, false, false]);
    let refusal = decide(&other(1000), Action::Status).unwrap_err();
    assert_eq!(refusal, Refusal::Status);
    assert!(refusal.to_string().contains("root"), "{refusal}");
}

#[test]
fn a_name_is_its_users_alone() {
    let cases = [
        // (caller, owner, allowed)
        (other(1000), None, true),
        (other(1000), Some(user(1000)), true),
        (other(1001), Some(user(1000)), false),
        (other(1001), Some(user(0)), false),
        (other(1001), Some(user(AGENTS_OWN)), false),
        (other(1001), Some(User::Unknown), true),
        (unknown(), None, true),
        (unknown(), Some(User::Unknown), true),
        (unknown(), Some(user(1000)), false),
        (root(), Some(user(1000)), true),
        (agents_user(), Some(user(1000)), true),
        (Caller::over_network(), Some(user(1000)), true),
    ];
    for (caller, owner, allowed) in cases {
        let full = "nse-1@one.example";
        for action in [
            Action::Register(Name { full, owner }),
            Action::Unregister(Name { full, owner }),
        ] {
            let decided = decide(&caller, action);
            assert_eq!(decided.is_ok(), allowed, "{caller:?} {action:?}");
            let Err(refusal) = decided else { continue };
            let text = refusal.to_string();
            let (owner, caller) = (owner.unwrap(), caller.user().unwrap());
            for part in [
                full,
                &owner.to_string(),
                &caller.to_string(),
                "another name",
            ] {
                assert!(text.contains(part), "{text}");
            }
        }
    }
}

#[test]
fn a_namespace_is_proved_by_its_descriptor_and_the_nodes_own_by_privilege() {
    let netns: NetnsUrl = "inode://4/4026539999".parse().unwrap();
    let cases = [
        // (is_passed, is_nodes_own, what refuses others)
        (true, false, None),
        (false, false, Some("without passing its descriptor")),
        (false, true, Some("without passing its descriptor")),
        (true, true, Some("the node's own")),
    ];
    for (is_passed, is_nodes_own, refused_by) in cases {
        for (end, whose) in [
            (End::Client, "a client that runs as root"),
            (End::Endpoint, "an endpoint that registered as root"),
        ] {
            for caller in callers() {
                let claim = Claim {
                    end,
                    netns: &netns,
                    is_passed,
                    is_nodes_own,
                };
                let decided = decide(&caller, Action::Namespace(claim));
                let wanted = refused_by.filter(|_| !caller.is_privileged());
                let text = decided.err().map(|refusal| refusal.to_string());
                assert_eq!(text.is_some(), wanted.is_some(), "{caller:?} {claim:?}");
                for part in wanted
                    .into_iter()
                    .flat_map(|rule| [rule, whose, "4026539999"])
                {
                    let text = text.as_deref().unwrap();
                    assert!(text.contains(part), "{text}");
                }
            }
        }
    }
}
