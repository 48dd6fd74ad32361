use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use proptest::prelude::*;

use crate::net::{PeerPlace, PeerUrl, PeerUrlError};

fn tcp(host: &str, port: u16) -> PeerPlace {
    PeerPlace::Tcp {
        host: host.to_owned(),
        port,
    }
}

fn parsed(text: &str) -> PeerUrl {
    text.parse().unwrap()
}

#[test]
fn urls_are_parsed_and_keep_their_text() {
    for (text, place) in [
        (
            "unix:///run/nsm.sock",
            PeerPlace::Unix("/run/nsm.sock".into()),
        ),
        (
            "unix:/run/nsm.sock",
            PeerPlace::Unix("/run/nsm.sock".into()),
        ),
        ("unix:nsm.sock", PeerPlace::Unix("nsm.sock".into())),
        ("tcp://192.0.2.1:5006", tcp("192.0.2.1", 5006)),
        ("tcp://[2001:db8::1]:5006", tcp("2001:db8::1", 5006)),
        (
            "tcp://registry.nsm-system:5002/",
            tcp("registry.nsm-system", 5002),
        ),
        (
            "inode://65024/7",
            PeerPlace::Passed {
                device: 65024,
                inode: 7,
            },
        ),
    ] {
        let url = parsed(text);
        assert_eq!(url.place(), &place, "{text}");
        assert_eq!(url.to_string(), text);
        assert_eq!(url.is_local(), !matches!(place, PeerPlace::Tcp { .. }));
    }
    // Two spellings of one place are two URLs: other components compare the texts.
    assert_ne!(parsed("unix:/a"), parsed("unix:///a"));
    assert_eq!(parsed("unix:/a").socket_path(), Some(Path::new("/a")));
    assert_eq!(parsed("inode://1/2").socket_path(), None);
    assert_eq!(PeerUrl::unix(Path::new("/a")), parsed("unix:///a"));
}

#[test]
fn all_spellings_of_a_configured_place_are_one_url() {
    for (text, canonical) in [
        ("unix:/a", "unix:///a"),
        ("unix:///a", "unix:///a"),
        ("tcp://h:5002/", "tcp://h:5002"),
        ("tcp://h:5002", "tcp://h:5002"),
        ("tcp://192.0.2.1:05002/", "tcp://192.0.2.1:5002"),
        ("tcp://[2001:DB8:0::1]:5002/", "tcp://[2001:db8::1]:5002"),
    ] {
        let url = PeerUrl::configured(text).unwrap();
        assert_eq!(url.as_str(), canonical);
        assert_eq!(url, parsed(canonical));
        assert_eq!(url.place(), parsed(canonical).place());
    }
}

#[test]
fn a_passed_socket_is_no_configured_place() {
    let text = "inode://1/2";
    let error = PeerUrl::configured(text).unwrap_err();
    assert_eq!(error, PeerUrlError::Scheme(text.to_owned()));
    let shown = error.to_string();
    assert!(
        shown.ends_with("expected unix:///path or tcp://host:port"),
        "{shown}"
    );
}

#[test]
fn the_address_is_the_hosts_where_it_is_one() {
    let address = |text: &str| parsed(text).address();
    assert_eq!(
        address("tcp://192.0.2.1:5006"),
        Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)))
    );
    assert_eq!(
        address("tcp://[::1]:5006"),
        Some(IpAddr::V6(Ipv6Addr::LOCALHOST))
    );
    for text in ["tcp://host:1", "unix:///a", "inode://1/2"] {
        assert_eq!(address(text), None);
    }
}

#[test]
fn what_is_no_url_is_an_error_with_its_cause() {
    let error = |text: &str| text.parse::<PeerUrl>().unwrap_err();
    let own = str::to_owned;
    for text in ["", "192.0.2.1:5006", "http://192.0.2.1:5006", "tcp:/x:1"] {
        assert_eq!(error(text), PeerUrlError::Scheme(own(text)));
    }
    for text in ["unix:", "unix://", "unix:///a\0b"] {
        assert_eq!(error(text), PeerUrlError::NoPath(own(text)));
    }
    for text in [
        "tcp://host",
        "tcp://host:",
        "tcp://host:0",
        "tcp://host:65536",
        "tcp://host:+5006",
    ] {
        assert_eq!(error(text), PeerUrlError::Port(own(text)));
    }
    for text in [
        "tcp://:5006",
        "tcp://2001:db8::1:5006",
        "tcp://[::1:5006",
        "tcp://[host]:5006",
        "tcp://a b:5006",
        "tcp://user@host:5006",
    ] {
        assert_eq!(error(text), PeerUrlError::Host(own(text)), "{text}");
    }
    for text in [
        "inode:",
        "inode://",
        "inode://1",
        "inode://+1/2",
        "inode://a/b",
    ] {
        assert_eq!(error(text), PeerUrlError::Inode(own(text)), "{text}");
    }
}

proptest! {
    #[test]
    fn what_parses_is_shown_as_it_came(text in "(unix:|unix://|tcp://|inode://|)[ -~]{0,40}") {
        if let Ok(url) = text.parse::<PeerUrl>() {
            prop_assert_eq!(url.as_str(), text.as_str());
            prop_assert_eq!(url.to_string().parse::<PeerUrl>(), Ok(url.clone()));
            prop_assert!(HashSet::from([url.clone()]).contains(&url));
            let is_tcp = matches!(url.place(), PeerPlace::Tcp { .. });
            prop_assert_ne!(url.is_local(), is_tcp);
            if let Ok(configured) = PeerUrl::configured(&text) {
                prop_assert_eq!(configured.is_local(), url.is_local());
                prop_assert_eq!(PeerUrl::configured(configured.as_str()), Ok(configured));
            }
        }
    }

    #[test]
    fn a_socket_address_is_its_own_url(ip: IpAddr, port in 1_u16..) {
        let address = SocketAddr::new(ip, port);
        let url = PeerUrl::from(address);
        prop_assert_eq!(url.address(), Some(ip));
        let parsed: PeerUrl = format!("tcp://{address}").parse().unwrap();
        prop_assert_eq!(parsed.place(), url.place());
        prop_assert_eq!(parsed, url);
    }

    #[test]
    fn no_text_panics(text in ".{0,60}") {
        let _ = text.parse::<PeerUrl>();
    }
}
