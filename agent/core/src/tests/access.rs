//! Who may do what by a proven id: two organisations, and everybody else.

use proptest::prelude::*;

use crate::{
    identity::{
        SpiffeId, Workload,
        access::{
            Access, Ask, BadRules, Denied, IdPattern, MOST_DOMAINS, NamePattern, PatternError,
            Remote, Role, Roles, Rules, Server,
        },
        workload::is_bound,
    },
    nsm::name::Domain,
};

fn id(text: &str) -> SpiffeId {
    format!("spiffe://{text}").parse().unwrap()
}

/// A pod of nsm-system.
fn pod(trust_domain: &str, name: &str) -> SpiffeId {
    id(&format!("{trust_domain}/ns/nsm-system/pod/{name}"))
}

fn domain(text: &str) -> Domain {
    text.parse().unwrap()
}

fn rules(json: &str) -> Result<Rules, serde_json::Error> {
    serde_json::from_str(json)
}

fn access_of(rules: Rules) -> Result<Access, BadRules> {
    Access::new(domain("one.example"), "td-1".parse().unwrap(), rules)
}

/// We are one.example; two.example sees one service, three.example sees all and may reach two.example through us, the shared registry's
/// users register here.
fn access() -> Access {
    let rules = rules(
        r#"{"domains": [
            {"domain": "two.example", "trust_domain": "td-2", "services": ["icmp-responder", "web-*"]},
            {"domain": "three.example", "trust_domain": "td-3", "services": ["*"], "relay": ["two.example", "none.example"],
             "roles": {"proxy": ["/proxies/**"]}},
            {"domain": "four.example", "trust_domain": "td-4", "registers": ["nse-*"]}
        ]}"#,
    );
    access_of(rules.unwrap()).unwrap()
}

/// The rule that denies, or `-`.
fn verdict(result: Result<(), Denied>) -> &'static str {
    let Err(denied) = result else { return "-" };
    let text = denied.to_string();
    assert!(text.len() > 60 && !text.contains("{}"), "{text}");
    denied.rule()
}

fn request<'a>(service: &'a str, domain: Option<&'a Domain>, first: &'a SpiffeId) -> Ask<'a> {
    Ask::Request {
        service,
        domain,
        first,
    }
}

#[test]
fn inside_the_own_trust_domain_standard_ids_need_no_rules() {
    let access = access_of(Rules::default()).unwrap();
    let nsc = id("td-1/ns/default/pod/nsc");
    let two = domain("two.example");
    for (name, wanted) in [
        ("nsmgr-x7k2p", "-"),
        ("nsmgr-proxy-5d8f7c-abcde", "-"),
        ("proxy-nsmgr-abcde", "-"),
        ("registry-k8s-5d8f7c-abcde", "-"),
        ("forwarder-vpp-abcde", "role"),
        ("nsc", "role"),
    ] {
        let id = pod("td-1", name);
        let register = Ask::Register {
            names: &["nse"],
            domain: None,
            first: &nsc,
        };
        assert_eq!(verdict(access.check_caller(&id, register)), wanted, "{id}");
        for ask in [
            request("any", None, &nsc),
            Ask::Find { domain: None },
            Ask::Follow,
        ] {
            assert_eq!(verdict(access.check_caller(&id, ask)), "-", "{id} {ask:?}");
        }
        // A path that comes back through our own systems may have begun anywhere.
        let begun_elsewhere = two_client();
        let ask = request("any", None, &begun_elsewhere);
        assert_eq!(access.check_caller(&id, ask), Ok(()));
        // Another domain is named first, by whoever asks for it.
        for ask in [
            request("any", Some(&two), &nsc),
            Ask::Find { domain: Some(&two) },
        ] {
            assert_eq!(verdict(access.check_caller(&id, ask)), "domains");
        }
        assert_eq!(verdict(access.check_on_node(&id, Some(&two))), "domains");
        assert_eq!(verdict(access.check_on_node(&id, None)), "-");
        assert!(access.sees(&id, "any"));
    }
    // The id of the trust domain itself is nobody's.
    let authority = id("td-1");
    assert_eq!(
        verdict(access.check_caller(&authority, Ask::Follow)),
        "role"
    );
    let stranger = pod("td-2", "proxy-nsmgr-x");
    assert_eq!(
        verdict(access.check_caller(&stranger, Ask::Follow)),
        "trust_domain"
    );
    assert_eq!(verdict(access.check_on_node(&stranger, None)), "node");
}

fn two_client() -> SpiffeId {
    id("td-2/ns/default/pod/nsc")
}

#[test]
fn a_remote_domain_gets_what_it_is_given() {
    let access = access();
    let two = pod("td-2", "nsmgr-proxy-x");
    let client = two_client();
    let own_client = id("td-1/ns/default/pod/nsc");
    let [second, third, none] = ["two.example", "three.example", "none.example"].map(domain);
    for (ask, wanted) in [
        (request("icmp-responder", None, &client), "-"),
        (request("web-1", None, &client), "-"),
        (request("icmp-responder-2", None, &client), "services"),
        (request("secret", None, &client), "services"),
        (
            request("icmp-responder", None, &own_client),
            "first_segment",
        ),
        (request("icmp-responder", Some(&third), &client), "relay"),
        (Ask::Find { domain: None }, "-"),
        (
            Ask::Find {
                domain: Some(&third),
            },
            "relay",
        ),
        (
            Ask::Register {
                names: &["nse-1"],
                domain: None,
                first: &client,
            },
            "registers",
        ),
        (
            Ask::Register {
                names: &["nse-1"],
                domain: Some(&third),
                first: &client,
            },
            "registers",
        ),
        (Ask::Follow, "-"),
    ] {
        assert_eq!(verdict(access.check_caller(&two, ask)), wanted, "{ask:?}");
    }
    // A client of it comes by its proxy, and a registry asks for no connection.
    let registry = pod("td-2", "registry-memory-x");
    for (id, ask, wanted) in [
        (&client, request("icmp-responder", None, &client), "role"),
        (&client, Ask::Find { domain: None }, "role"),
        (&registry, request("icmp-responder", None, &client), "role"),
        (&registry, Ask::Find { domain: None }, "-"),
    ] {
        assert_eq!(
            verdict(access.check_caller(id, ask)),
            wanted,
            "{id} {ask:?}"
        );
    }
    assert!(access.sees(&two, "web-2") && !access.sees(&two, "secret"));
    // One that may relay, by roles of its own, to domains that are named.
    let three = id("td-3/proxies/a/b");
    let client = id("td-3/nsc");
    for (ask, wanted) in [
        (request("secret", None, &client), "-"),
        (request("any", Some(&second), &client), "-"),
        (request("any", Some(&none), &client), "domains"),
        (
            request("any", Some(&domain("four.example")), &client),
            "relay",
        ),
    ] {
        assert_eq!(verdict(access.check_caller(&three, ask)), wanted, "{ask:?}");
    }
    let by_default = pod("td-3", "nsmgr-proxy-x");
    assert_eq!(
        verdict(access.check_caller(&by_default, request("secret", None, &client))),
        "role"
    );
    // One that registers here.
    let four = pod("td-4", "registry-x");
    let nse = id("td-4/nse");
    for (names, first, wanted) in [
        (&["nse-1"][..], &nse, "-"),
        (&["nse-1", "nse-svc"], &nse, "-"),
        (&["nse"], &nse, "registers"),
        // An endpoint of a name that is given, for a service that is not.
        (&["nse-1", "payments"], &nse, "registers"),
        (&["nse-1"], &client, "first_segment"),
    ] {
        let ask = Ask::Register {
            names,
            domain: None,
            first,
        };
        assert_eq!(
            verdict(access.check_caller(&four, ask)),
            wanted,
            "{names:?} {first}"
        );
    }
    assert!(!access.sees(&four, "icmp-responder"));
    assert_eq!(verdict(access.check_known(&four)), "-");
    assert_eq!(
        verdict(access.check_known(&pod("td-9", "nsmgr-x"))),
        "trust_domain"
    );
}

#[test]
fn a_server_is_of_the_domain_that_was_asked() {
    let access = access();
    let [two, nine] = ["two.example", "nine.example"].map(domain);
    let registrant = two_client();
    for (id, server, role, wanted) in [
        (
            pod("td-2", "nsmgr-proxy-x"),
            Server::Of(&two),
            Role::Proxy,
            "-",
        ),
        (
            pod("td-2", "proxy-nsmgr-x"),
            Server::Of(&two),
            Role::Registry,
            "-",
        ),
        (
            pod("td-2", "registry-x"),
            Server::Of(&two),
            Role::Registry,
            "-",
        ),
        (
            pod("td-2", "registry-x"),
            Server::Of(&two),
            Role::Proxy,
            "role",
        ),
        (two_client(), Server::Of(&two), Role::Registry, "role"),
        // A domain that answers for another.
        (
            id("td-3/proxies/a"),
            Server::Of(&two),
            Role::Proxy,
            "server",
        ),
        (
            pod("td-1", "nsmgr-proxy-x"),
            Server::Of(&two),
            Role::Proxy,
            "server",
        ),
        (
            pod("td-2", "nsmgr-proxy-x"),
            Server::Of(&nine),
            Role::Proxy,
            "domains",
        ),
        (pod("td-1", "registry-x"), Server::Own, Role::Registry, "-"),
        (
            id("td-1/ns/default/pod/nse"),
            Server::Own,
            Role::Client,
            "-",
        ),
        (
            pod("td-2", "registry-x"),
            Server::Own,
            Role::Registry,
            "server",
        ),
        (
            pod("td-2", "nsmgr-proxy-x"),
            Server::RegisteredBy(&registrant),
            Role::Proxy,
            "-",
        ),
        (
            two_client(),
            Server::RegisteredBy(&registrant),
            Role::Proxy,
            "role",
        ),
        (
            id("td-3/proxies/a"),
            Server::RegisteredBy(&registrant),
            Role::Proxy,
            "server",
        ),
        (
            pod("td-9", "nsmgr-proxy-x"),
            Server::RegisteredBy(&id("td-9/nse")),
            Role::Proxy,
            "trust_domain",
        ),
        (
            pod("td-1", "nsmgr-proxy-x"),
            Server::RegisteredBy(&id("td-1/nse")),
            Role::Proxy,
            "-",
        ),
    ] {
        let decided = access.check_server(&id, server, role);
        assert_eq!(verdict(decided), wanted, "{id} {server:?} {role:?}");
    }
}

#[test]
fn a_trust_domain_may_speak_for_several_domains() {
    let rules = rules(
        r#"{"domains": [
            {"domain": "a.example", "trust_domain": "td-2", "services": ["a"]},
            {"domain": "b.example", "trust_domain": "td-2", "services": ["b"]}
        ]}"#,
    );
    let access = access_of(rules.unwrap()).unwrap();
    let two = pod("td-2", "nsmgr-proxy-x");
    let client = two_client();
    for (service, wanted) in [("a", "-"), ("b", "-"), ("c", "services")] {
        let decided = access.check_caller(&two, request(service, None, &client));
        assert_eq!(verdict(decided), wanted, "{service}");
        assert_eq!(access.sees(&two, service), wanted == "-");
    }
}

/// Told apart by their roles, the domains of one trust domain see what is theirs, and own what they made.
#[test]
fn domains_of_one_trust_domain_are_strangers_to_each_other() {
    let rules = rules(
        r#"{"domains": [
            {"domain": "a.example", "trust_domain": "td-2", "services": ["secret"], "roles": {"proxy": ["/a/*"]}},
            {"domain": "b.example", "trust_domain": "td-2", "services": ["public"], "roles": {"proxy": ["/b/*"]}}
        ]}"#,
    );
    let access = access_of(rules.unwrap()).unwrap();
    let [a, b]: [SpiffeId; 2] =
        ["spiffe://td-2/a/x", "spiffe://td-2/b/x"].map(|id| id.parse().unwrap());
    assert!(access.sees(&a, "secret") && !access.sees(&a, "public"));
    assert!(access.sees(&b, "public") && !access.sees(&b, "secret"));
    let first = two_client();
    let [of_a, of_b] = [&a, &b].map(|id| access.workload(id, &first));
    assert!(!of_a.is_of_station(&of_b));
    let other_pod: SpiffeId = "spiffe://td-2/a/y".parse().unwrap();
    assert_eq!(
        of_a,
        access.workload(&other_pod, &first),
        "its pods are replaced"
    );
}

#[test]
fn rules_that_cannot_hold_are_refused() {
    let two = || Remote {
        domain: domain("two.example"),
        trust_domain: "td-2".parse().unwrap(),
        roles: Roles::default(),
        services: Vec::new(),
        registers: Vec::new(),
        relay: Vec::new(),
    };
    let of = |domains| {
        access_of(Rules {
            domains,
            ..Rules::default()
        })
        .err()
    };
    assert_eq!(of(vec![two()]), None);
    assert_eq!(
        of(vec![two(), two()]),
        Some(BadRules::Twice(domain("two.example")))
    );
    let own = Remote {
        domain: domain("one.example"),
        ..two()
    };
    assert_eq!(of(vec![own]), Some(BadRules::Own(domain("one.example"))));
    let many = vec![two(); MOST_DOMAINS + 1];
    assert_eq!(of(many), Some(BadRules::TooMany(MOST_DOMAINS + 1)));
    for (bad, words) in [
        (r#"{"role": {}}"#, "unknown field"),
        (
            r#"{"domains": [{"domain": "two.example"}]}"#,
            "trust_domain",
        ),
        (
            r#"{"domains": [{"domain": "two.example", "trust_domain": "TD"}]}"#,
            "no trust domain",
        ),
        (
            r#"{"domains": [{"domain": "two..example", "trust_domain": "td"}]}"#,
            "empty label",
        ),
        (
            r#"{"domains": [{"domain": "two.example", "trust_domain": "td", "sevices": []}]}"#,
            "unknown field",
        ),
        (
            r#"{"domains": [{"domain": "two.example", "trust_domain": "td", "services": ["a b"]}]}"#,
            "character",
        ),
        (
            r#"{"domains": [{"domain": "two.example", "trust_domain": "td", "relay": ["-"]}]}"#,
            "label",
        ),
        (
            r#"{"roles": {"proxy": ["nsmgr-*"]}}"#,
            "begin it with a slash",
        ),
    ] {
        let error = rules(bad).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn patterns_match_whole_names() {
    let fits = |pattern: &str, name: &str| pattern.parse::<NamePattern>().unwrap().matches(name);
    for (pattern, name, wanted) in [
        ("web", "web", true),
        ("web", "web-1", false),
        ("*", "", true),
        ("*", "any", true),
        ("web-*", "web-", true),
        ("*-web", "my-web", true),
        ("a*a", "a", false),
        ("a*a", "aa", true),
        ("a*b*a", "abba", true),
        ("a*b*ba", "aba", false),
        ("a*bc*c", "abcbc", true),
    ] {
        assert_eq!(fits(pattern, name), wanted, "{pattern} {name}");
    }
    let fits = |pattern: &str, path: &str| {
        pattern
            .parse::<IdPattern>()
            .unwrap()
            .matches(&id(&format!("td{path}")))
    };
    for (pattern, path, wanted) in [
        ("/a/b", "/a/b", true),
        ("/a/b", "/a", false),
        ("/a/b", "/a/b/c", false),
        ("/a/*", "/a/b", true),
        ("/a/*", "/a/b/c", false),
        ("/a/**", "/a/b/c", true),
        ("/a/**", "/a", false),
        ("/**", "/a", true),
        ("/**", "", false),
        ("/ns/*/pod/nsmgr-*", "/ns/x/pod/nsmgr-1", true),
        ("/ns/*/pod/nsmgr-*", "/ns/x/y/pod/nsmgr-1", false),
    ] {
        assert_eq!(fits(pattern, path), wanted, "{pattern} {path}");
    }
    for bad in ["", "a", "/", "//", "/a/", "/a/**/b", "/a**", "/a b", "/a?"] {
        assert!(bad.parse::<IdPattern>().is_err(), "{bad:?}");
    }
    for bad in ["", "a/b", "a b", "a@b", "**", "\u{e4}"] {
        assert!(bad.parse::<NamePattern>().is_err(), "{bad:?}");
    }
    let long = "a".repeat(3000);
    assert_eq!(long.parse::<NamePattern>(), Err(PatternError::Length));
}

#[test]
fn what_a_role_made_stays_its_own_under_another_name() {
    let access = access();
    let [nsc, other] = [
        id("td-1/ns/default/pod/nsc"),
        id("td-1/ns/default/pod/other"),
    ];
    let of = |pod: &SpiffeId, first: &SpiffeId| access.workload(pod, first);
    let nsmgr = |name: &str| pod("td-1", &format!("nsmgr-{name}"));
    let made = of(&nsmgr("a"), &nsc);
    assert_eq!(of(&nsmgr("b"), &nsc), made);
    assert!(made.is_of_station(&of(&nsmgr("b"), &other)));
    for (pod, first) in [
        (nsmgr("a"), &other),
        (pod("td-1", "nsmgr-proxy-a"), &nsc),
        (pod("td-2", "nsmgr-a"), &nsc),
        (nsc.clone(), &nsc),
        (id("td-1/ns/default/pod/nsmgr-a"), &nsc),
        (pod("td-9", "nsmgr-a"), &nsc),
    ] {
        assert_ne!(of(&pod, first), made, "{pod} {first}");
    }
    // A client is itself alone, as is an id that the policy gives no role.
    let client = of(&nsc, &nsc);
    assert_ne!(of(&other, &nsc), client);
    assert!(!client.is_of_station(&of(&other, &nsc)));
    let unknown = |name: &str| pod("td-9", &format!("nsmgr-{name}"));
    assert_ne!(of(&unknown("a"), &nsc), of(&unknown("b"), &nsc));
    assert_eq!(of(&unknown("a"), &nsc), of(&unknown("a"), &nsc));
}

proptest! {
    #[test]
    fn an_id_is_shown_by_its_owner_alone(seed: u128, other: u128) {
        let [nsc, nsmgr] = ["td-1/nsc", "td-1/nsmgr"].map(id);
        let owners = [
            Workload::of_id(&nsmgr, &nsc),
            Workload::of_id(&nsc, &nsmgr),
            Workload::of_role(nsc.trust_domain(), &domain("one.example"), "nsmgr", &nsc),
        ];
        for (at, owner) in owners.iter().enumerate() {
            let bound = owner.bound_id(seed);
            prop_assert!(is_bound(bound));
            prop_assert_eq!(owner.bound_id(seed), bound);
            for (by, owner) in owners.iter().enumerate() {
                prop_assert_eq!(owner.owns(bound), at == by);
            }
            prop_assert!(!owner.owns(other));
        }
    }

    #[test]
    fn a_name_matches_itself_and_its_ends(name in "[a-z0-9-]{1,20}", at: prop::sample::Index) {
        let at = at.index(name.len());
        for pattern in [name.clone(), format!("{}*", &name[..at]), format!("*{}", &name[at..]), format!("{}*{}", &name[..at], &name[at..])] {
            prop_assert!(pattern.parse::<NamePattern>().unwrap().matches(&name), "{}", pattern);
        }
        let longer = format!("{name}x");
        prop_assert!(!name.parse::<NamePattern>().unwrap().matches(&longer));
    }
}
