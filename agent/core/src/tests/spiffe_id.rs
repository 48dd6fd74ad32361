use proptest::prelude::*;

use crate::identity::{SpiffeId, SpiffeIdError, TrustDomain};

fn id(text: &str) -> Result<SpiffeId, SpiffeIdError> {
    text.parse()
}

#[test]
fn the_ids_of_a_mesh_are_read() {
    for (text, domain, path) in [
        (
            "spiffe://cluster-1.example/ns/nsm-system/pod/nsmgr-x7k2p",
            "cluster-1.example",
            "/ns/nsm-system/pod/nsmgr-x7k2p",
        ),
        ("spiffe://nsm.cluster1", "nsm.cluster1", ""),
        ("spiffe://a_b-c.9/UPPER/._-", "a_b-c.9", "/UPPER/._-"),
        ("spiffe://d/...", "d", "/..."),
    ] {
        let id = id(text).unwrap();
        assert_eq!(id.as_str(), text);
        assert_eq!(id.to_string(), text);
        assert_eq!(id.trust_domain().as_str(), domain);
        assert_eq!(id.path(), path);
        let segments: String = id.segments().map(|segment| format!("/{segment}")).collect();
        assert_eq!(segments, path);
    }
}

#[test]
fn what_is_no_id_is_refused_with_its_cause() {
    use SpiffeIdError as E;
    type Cause = fn(String) -> SpiffeIdError;
    let cases: [(&str, Cause); 19] = [
        ("", E::Scheme),
        ("cluster-1.example/a", E::Scheme),
        ("https://cluster-1.example/a", E::Scheme),
        ("SPIFFE://cluster-1.example/a", E::Scheme),
        (" spiffe://cluster-1.example/a", E::Scheme),
        ("spiffe:/cluster-1.example/a", E::Scheme),
        ("spiffe://d/", E::EmptySegment),
        ("spiffe://d//a", E::EmptySegment),
        ("spiffe://d/a/", E::EmptySegment),
        ("spiffe://d/a/./b", E::RelativeSegment),
        ("spiffe://d/..", E::RelativeSegment),
        ("spiffe://d/a b", E::PathCharacter),
        ("spiffe://d/a%41", E::PathCharacter),
        ("spiffe://d/a?x", E::PathCharacter),
        ("spiffe://d/a#x", E::PathCharacter),
        ("spiffe://d/\u{e4}", E::PathCharacter),
        ("spiffe://d/a\0", E::PathCharacter),
        ("spiffe://d/a\n", E::PathCharacter),
        ("spiffe://d/a:b", E::PathCharacter),
    ];
    for (text, cause) in cases {
        let expected = cause(crate::text::printable(text, 120));
        assert_eq!(id(text), Err(expected), "{text:?}");
    }
    for domain in ["D", "d:443", "user@d", "d%2e", "d\u{e4}", "d d", "d?x"] {
        let error = id(&format!("spiffe://{domain}/a"));
        assert_eq!(
            error,
            Err(E::TrustDomainCharacter(domain.to_owned())),
            "{domain:?}"
        );
        assert!(domain.parse::<TrustDomain>().is_err());
    }
    for empty in ["spiffe://", "spiffe:///a"] {
        assert_eq!(id(empty), Err(E::TrustDomainLength(String::new())));
    }
}

#[test]
fn lengths_are_limited() {
    let longest = format!("spiffe://d/{}", "a".repeat(SpiffeId::LONGEST - 11));
    assert_eq!(longest.len(), SpiffeId::LONGEST);
    assert!(id(&longest).is_ok());
    assert_eq!(
        id(&format!("{longest}a")),
        Err(SpiffeIdError::TooLong(SpiffeId::LONGEST + 1))
    );
    let domain = "d".repeat(TrustDomain::LONGEST);
    assert!(id(&format!("spiffe://{domain}/a")).is_ok());
    let error = id(&format!("spiffe://{domain}d/a")).unwrap_err();
    assert!(
        matches!(error, SpiffeIdError::TrustDomainLength(_)),
        "{error}"
    );
}

#[test]
fn an_error_shows_little_of_a_foreign_text_and_no_control_character() {
    let text = format!("spiffe://d/\u{1b}[2J{}", "a".repeat(1000));
    let error = id(&text).unwrap_err().to_string();
    assert!(!error.chars().any(char::is_control), "{error}");
    assert!(error.len() < 400, "{error}");
}

#[test]
fn both_are_text_in_a_file() {
    let id = id("spiffe://d/a").unwrap();
    let written = serde_json::to_string(&(&id, id.trust_domain())).unwrap();
    assert_eq!(written, r#"["spiffe://d/a","d"]"#);
    let read: (SpiffeId, TrustDomain) = serde_json::from_str(&written).unwrap();
    assert_eq!(read.0, id);
    assert_eq!(&read.1, id.trust_domain());
    assert!(serde_json::from_str::<SpiffeId>(r#""spiffe://d/""#).is_err());
    assert!(serde_json::from_str::<TrustDomain>(r#""spiffe://d""#).is_err());
}

proptest! {
    #[test]
    fn what_the_standard_allows_is_read(
        domain in "[a-z0-9._-]{1,255}",
        path in proptest::collection::vec("[a-zA-Z0-9._-]{1,20}", 0..20),
    ) {
        let path: String = path
            .iter()
            .filter(|segment| !matches!(segment.as_str(), "." | ".."))
            .map(|segment| format!("/{segment}"))
            .collect();
        let text = format!("spiffe://{domain}{path}");
        let id = id(&text).unwrap();
        prop_assert_eq!(id.trust_domain().as_str(), domain);
        prop_assert_eq!(id.path(), path);
        prop_assert_eq!(id.to_string(), text);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "(spiffe://)?[a-zA-Z0-9./_%@: -]{0,40}|\\PC{0,40}") {
        if let Ok(id) = id(&text) {
            prop_assert_eq!(id.as_str(), &text);
            let domain = text["spiffe://".len()..].split('/').next().unwrap();
            prop_assert_eq!(id.trust_domain().as_str(), domain);
            prop_assert!(!text.ends_with('/') && !text.contains("/./") && !text.contains("/../"));
        }
    }
}
