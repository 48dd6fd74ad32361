use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use crate::nsm::name::{Domain, DomainTarget, InterdomainName, NameError};

fn domain(text: &str) -> Domain {
    text.parse().unwrap()
}

#[test]
fn a_dns_name_is_lower_case_without_its_trailing_dot() {
    let cluster = domain("Cluster-2.Example.");
    assert_eq!(cluster.target(), DomainTarget::Name("cluster-2.example"));
    assert_eq!(cluster.to_string(), "cluster-2.example");
    assert_eq!(domain("_srv.example").as_ref(), "_srv.example");
    assert_eq!(domain("floating").as_str(), "floating");
}

#[test]
fn literal_addresses_need_no_dns() {
    for text in [
        "192.0.2.1:5005",
        "tcp://192.0.2.1:5005",
        "HTTP://192.0.2.1:5005",
    ] {
        assert_eq!(
            domain(text).target(),
            DomainTarget::Socket("192.0.2.1:5005".parse().unwrap()),
            "{text}"
        );
        assert_eq!(domain(text).to_string(), text.to_lowercase());
    }
    assert_eq!(
        domain("192.0.2.1").target(),
        DomainTarget::Ip(Ipv4Addr::new(192, 0, 2, 1).into())
    );
    assert_eq!(
        domain("tcp://192.0.2.1").target(),
        DomainTarget::Ip(Ipv4Addr::new(192, 0, 2, 1).into())
    );
    let v6: Ipv6Addr = "2001:db8::1".parse().unwrap();
    assert_eq!(
        domain("[2001:DB8::1]:5005").target(),
        DomainTarget::Socket((v6, 5005).into())
    );
    assert_eq!(
        domain("[2001:db8::1]").target(),
        DomainTarget::Ip(v6.into())
    );
    assert_eq!(domain("2001:db8::1").target(), DomainTarget::Ip(v6.into()));
}

#[test]
fn each_bad_domain_has_its_own_error() {
    let error = |text: &str| text.parse::<Domain>().unwrap_err();
    let text = |text: &str| text.to_owned();
    assert_eq!(error(""), NameError::Empty);
    assert_eq!(error("a@b"), NameError::SecondAt(text("a@b")));
    for bad in [".", "...", "a..b", ".a"] {
        assert!(matches!(error(bad), NameError::EmptyLabel(_)), "{bad}");
    }
    assert!(matches!(
        error(&"x".repeat(64)),
        NameError::LabelTooLong { .. }
    ));
    assert!(domain(&"x".repeat(63)).as_str().len() == 63);
    let long = vec!["x".repeat(63); 4].join(".");
    assert!(matches!(error(&long), NameError::DomainTooLong(_)));
    assert!(matches!(domain(&long[2..]).target(), DomainTarget::Name(name) if name.len() == 253));
    for (bad, c) in [
        ("a b.c", ' '),
        ("a.b/c", '/'),
        ("-a.b", '-'),
        ("a-.b", '-'),
        ("a_b", '_'),
        ("_", '_'),
        ("bücher", 'ü'),
        ("a\0", '\0'),
    ] {
        assert!(
            matches!(error(bad), NameError::LabelCharacter { bad, .. } if bad == c),
            "{bad}: {:?}",
            error(bad)
        );
    }
    for bad in ["256.1.1.1", "192.0.2", "1.2.3.4.5", "17"] {
        assert_eq!(error(bad), NameError::NoAddress(text(bad)));
    }
    for bad in [
        "cluster:5005",
        "tcp://cluster.example:5005",
        "192.0.2.1:70000",
        "192.0.2.1:",
        "tcp://",
        "tcp://192.0.2.1:5005/x",
        "[fe80::1%2]:5005",
    ] {
        assert_eq!(error(bad), NameError::PortOfName(text(bad)));
    }
    assert_eq!(
        error("ftp://192.0.2.1:5005"),
        NameError::UnknownScheme(text("ftp://192.0.2.1:5005"))
    );
    assert_eq!(
        error("192.0.2.1:0"),
        NameError::PortZero(text("192.0.2.1:0"))
    );
    for bad in ["0.0.0.0", "[::]:5005", "224.0.0.1:5005"] {
        assert_eq!(error(bad), NameError::NotUnicast(text(bad)));
    }
}

#[test]
fn a_name_is_split_at_its_at() {
    let name: InterdomainName = "icmp-responder@cluster-2.example".parse().unwrap();
    assert_eq!(name.target(), "icmp-responder");
    assert_eq!(name.domain(), Some(&domain("cluster-2.example")));
    let local: InterdomainName = "nse_1:5b-3d.x".parse().unwrap();
    assert_eq!((local.target(), local.domain()), ("nse_1:5b-3d.x", None));
}

#[test]
fn each_bad_name_has_its_own_error_that_shows_it() {
    let error = |text: &str| text.parse::<InterdomainName>().unwrap_err();
    assert_eq!(error(""), NameError::Empty);
    assert_eq!(error("@x"), NameError::MissingTarget("@x".to_owned()));
    assert_eq!(error("a@"), NameError::MissingDomain("a@".to_owned()));
    assert_eq!(error("@"), NameError::MissingTarget("@".to_owned()));
    assert_eq!(error("a@b@c"), NameError::SecondAt("a@b@c".to_owned()));
    assert_eq!(error("a@@"), NameError::SecondAt("a@@".to_owned()));
    assert!(error("a@b@c").to_string().contains("`a@b@c`"));
    for (bad, c) in [("a b@c", ' '), ("a/b", '/'), ("a\n", '\n'), ("ä@c", 'ä')] {
        assert!(
            matches!(error(bad), NameError::TargetCharacter { bad, .. } if bad == c),
            "{bad}"
        );
    }
    assert!(InterdomainName::new("a@b", None).is_err());
    let long = "ü".repeat(200);
    let message = error(&long).to_string();
    assert!(matches!(error(&long), NameError::TargetTooLong(_)));
    assert!(
        message.contains("400 bytes") && message.len() < 250,
        "{message}"
    );
}

proptest! {
    #[test]
    fn no_text_panics_and_what_parses_prints_as_it_parses(text in ".{0,40}|[a-z0-9@.:/\\[\\]_-]{0,30}") {
        if let Ok(name) = text.parse::<InterdomainName>() {
            prop_assert_eq!(name.to_string().parse::<InterdomainName>().unwrap(), name);
        }
        if let Ok(domain) = text.parse::<Domain>() {
            prop_assert_eq!(domain.to_string().parse::<Domain>().unwrap(), domain);
        }
    }

    #[test]
    fn good_names_parse(target in "[a-zA-Z0-9._:-]{1,60}", labels in prop::collection::vec("[a-z][a-z0-9]{0,20}", 1..5)) {
        let text = format!("{target}@{}", labels.join("."));
        let name: InterdomainName = text.parse().unwrap();
        prop_assert_eq!(name.to_string(), text);
        prop_assert_eq!(name.target(), target);
    }

    #[test]
    fn literal_sockets_parse(address: std::net::IpAddr, port in 1u16..) {
        prop_assume!(!address.is_unspecified() && !address.is_multicast());
        let socket = std::net::SocketAddr::new(address, port);
        for text in [socket.to_string(), format!("tcp://{socket}")] {
            let domain = domain(&text);
            prop_assert_eq!(domain.target(), DomainTarget::Socket(socket));
        }
    }
}
