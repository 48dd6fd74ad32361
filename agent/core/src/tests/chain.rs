//! Tokens of a path, signed by real keys, and the verdicts on them.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use p256::ecdsa::{
    Signature, SigningKey, VerifyingKey,
    signature::{Signer as _, Verifier as _},
};
use proptest::prelude::*;

use super::at;
use crate::{
    identity::{
        SpiffeId,
        chain::{Certified, Check, LONGEST_LIFE, TokensRefused, check_answer, check_call},
        claims::{self, LONGEST_TOKEN, ReadToken, TokenFault},
        es256::{Es256, NotP256, P256Key},
    },
    nsm::path::MAX_SEGMENTS,
};

struct RustCrypto;

impl Es256 for RustCrypto {
    fn verifies(&self, key: &P256Key, message: &[u8], signature: &claims::Signature) -> bool {
        let key = VerifyingKey::from_sec1_bytes(key.point());
        let signature = Signature::from_slice(signature);
        let (Ok(key), Ok(signature)) = (key, signature) else {
            return false;
        };
        key.verify(message, &signature).is_ok()
    }
}

fn id(name: &str) -> SpiffeId {
    format!("spiffe://one.example/ns/nsm-system/pod/{name}")
        .parse()
        .unwrap()
}

/// Everybody has a key of their own.
fn signing_key(name: &str) -> SigningKey {
    let mut seed = [1_u8; 32];
    for (at, byte) in name.bytes().enumerate() {
        seed[at % 31 + 1] ^= byte;
    }
    SigningKey::from_slice(&seed).unwrap()
}

fn spki(name: &str) -> Vec<u8> {
    // As RFC 5480 has it: SEQUENCE { SEQUENCE { id-ecPublicKey, prime256v1 }, BIT STRING }.
    let mut der = vec![0x30, 0x59, 0x30, 0x13, 0x06, 0x07];
    der.extend([0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01]);
    der.extend([0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07]);
    der.extend([0x03, 0x42, 0x00]);
    let point = signing_key(name).verifying_key().to_encoded_point(false);
    der.extend(point.as_bytes());
    der
}

fn key(name: &str) -> P256Key {
    P256Key::from_spki(&spki(name)).unwrap()
}

fn raw(header: &str, claims: &str, by: &str) -> String {
    let encode = |part: &[u8]| URL_SAFE_NO_PAD.encode(part);
    let signed = format!(
        "{}.{}",
        encode(header.as_bytes()),
        encode(claims.as_bytes())
    );
    let signature: Signature = signing_key(by).sign(signed.as_bytes());
    format!("{signed}.{}", encode(&signature.to_bytes()))
}

const HEADER: &str = r#"{"alg":"ES256","typ":"JWT"}"#;

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// A token as `spiffejwt` makes it.
fn token(by: &str, to: &str) -> String {
    until(by, to, at(600))
}

fn until(by: &str, to: &str, end: SystemTime) -> String {
    let claims = format!(
        r#"{{"sub":"{}","aud":["{}"],"exp":{}}}"#,
        id(by),
        id(to),
        seconds(end)
    );
    raw(HEADER, &claims, by)
}

fn check() -> Check<'static> {
    Check {
        now: at(0),
        longest: LONGEST_LIFE,
        es256: &RustCrypto,
    }
}

/// The verdict of the server `us` on a call of `by`.
fn call(tokens: &[String], by: &str) -> Result<Vec<SpiffeId>, TokensRefused> {
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let (caller, key) = (id(by), key(by));
    let caller = Certified {
        id: &caller,
        key: Some(&key),
    };
    check_call(&tokens, caller, &id("us"), check()).map(|proved| {
        assert_eq!(Some(proved.first()), proved.subjects().next());
        proved.subjects().cloned().collect()
    })
}

/// nsc → nsmgr → us.
fn good() -> Vec<String> {
    vec![token("nsc", "nsmgr"), token("nsmgr", "us")]
}

#[test]
fn a_chain_of_real_tokens_proves_its_first_hop() {
    assert_eq!(call(&good(), "nsmgr"), Ok(vec![id("nsc"), id("nsmgr")]));
    let alone = [token("nsc", "us")];
    assert_eq!(call(&alone, "nsc"), Ok(vec![id("nsc")]));
}

#[test]
fn the_end_is_that_of_the_first_token_to_end() {
    let tokens = [until("nsc", "nsmgr", at(300)), token("nsmgr", "us")];
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let (caller, key) = (id("nsmgr"), key("nsmgr"));
    let caller = Certified {
        id: &caller,
        key: Some(&key),
    };
    let proved = check_call(&tokens, caller, &id("us"), check()).unwrap();
    assert_eq!(proved.expires(), at(300));
    assert_eq!(proved.first(), &id("nsc"));
}

/// A token of the caller with other claims; `aud` and `exp` as JSON.
fn claiming(by: &str, sub: &str, aud: &str, exp: &str) -> String {
    raw(
        HEADER,
        &format!(r#"{{"sub":"{sub}","aud":{aud},"exp":{exp}}}"#),
        by,
    )
}

fn refused(tokens: &[String], by: &str) -> (&'static str, String) {
    let refusal = call(tokens, by).expect_err("it proves nothing");
    (refusal.rule(), refusal.to_string())
}

#[test]
fn what_is_no_token_of_the_caller_is_refused_by_its_rule() {
    let sub = id("nsmgr").to_string();
    let us = format!(r#"["{}"]"#, id("us"));
    let both = format!(r#"["{}","{}"]"#, id("us"), id("nsc"));
    let end = seconds(at(600)).to_string();
    let mut forged = token("nsmgr", "us");
    let at_signature = forged.rfind('.').unwrap() + 1;
    let other = if forged.as_bytes()[at_signature] == b'A' {
        "B"
    } else {
        "A"
    };
    forged.replace_range(at_signature..=at_signature, other);
    let header = |header: &str| {
        raw(
            header,
            &format!(r#"{{"sub":"{sub}","aud":{us},"exp":{end}}}"#),
            "nsmgr",
        )
    };
    let none = header(r#"{"alg":"none"}"#);
    let unsigned = format!("{}.", &none[..none.rfind('.').unwrap()]);
    let rows = [
        (forged, "prev_token_signed", "not signed with the key"),
        (
            claiming("spy", &sub, &us, &end),
            "prev_token_signed",
            "not signed with the key",
        ),
        (token("spy", "us"), "tokens_chained", "the next hop is"),
        (none, "tokens_valid", "`none`"),
        (unsigned, "tokens_valid", "`none`"),
        (header(r#"{"alg":"HS256"}"#), "tokens_valid", "`HS256`"),
        (
            header(r#"{"alg":"ES256","crit":["exp"]}"#),
            "tokens_valid",
            "critical",
        ),
        (header("[]"), "tokens_valid", "header"),
        (
            token("nsmgr", "another"),
            "tokens_chained",
            "the next hop is",
        ),
        (
            claiming("nsmgr", &sub, &both, &end),
            "tokens_valid",
            "for 2 parties",
        ),
        (
            claiming("nsmgr", &sub, "[]", &end),
            "tokens_chained",
            "for nobody",
        ),
        (
            claiming("nsmgr", &sub, &format!("\"{}\"", id("us")), &end),
            "tokens_valid",
            "claims",
        ),
        (
            until("nsmgr", "us", at(0)),
            "tokens_expired",
            "ended 0 s ago",
        ),
        (
            claiming("nsmgr", &sub, &us, "1"),
            "tokens_expired",
            "refresh sooner",
        ),
        (
            until("nsmgr", "us", at(86_401)),
            "tokens_expired",
            "86400 s are believed",
        ),
        (
            claiming("nsmgr", &sub, &us, "1e300"),
            "tokens_valid",
            "year 10000",
        ),
        (
            claiming("nsmgr", &sub, &us, "-1"),
            "tokens_valid",
            "year 10000",
        ),
        (
            claiming("nsmgr", &sub, &us, "18446744073709551615"),
            "tokens_valid",
            "year 10000",
        ),
        (
            claiming("nsmgr", &sub, &us, "\"soon\""),
            "tokens_valid",
            "claims",
        ),
        (
            claiming("nsmgr", &sub, &us, "null"),
            "tokens_valid",
            "no claim `exp`",
        ),
        (
            claiming("nsmgr", "nsmgr", &us, &end),
            "tokens_valid",
            "`sub`",
        ),
        (
            raw(HEADER, &format!(r#"{{"aud":{us},"exp":{end}}}"#), "nsmgr"),
            "tokens_valid",
            "no claim `sub`",
        ),
        (
            raw(
                HEADER,
                &format!(r#"{{"sub":"{sub}","sub":"{sub}","aud":{us},"exp":{end}}}"#),
                "nsmgr",
            ),
            "tokens_valid",
            "duplicate",
        ),
        (String::new(), "tokens_valid", "missing"),
        ("a.b".to_owned(), "tokens_valid", "no JWT"),
        ("a.b.c.d".to_owned(), "tokens_valid", "no JWT"),
        ("ä.b.c".to_owned(), "tokens_valid", "base64url"),
        (
            format!("{}=", token("nsmgr", "us")),
            "tokens_valid",
            "base64url",
        ),
        ("a".repeat(LONGEST_TOKEN + 1), "tokens_valid", "8193 bytes"),
        (
            format!("{}AAAA", token("nsmgr", "us")),
            "tokens_valid",
            "67 bytes",
        ),
    ];
    for (last, rule, words) in rows {
        let tokens = [token("nsc", "nsmgr"), last];
        let (by, text) = refused(&tokens, "nsmgr");
        assert_eq!(by, rule, "{text}\n{}", tokens[1]);
        assert!(text.contains(words), "{text}");
        assert!(text.len() < 1000, "{text}");
    }
}

#[test]
fn a_callers_token_is_its_own() {
    // Whoever holds a key of the mesh can sign that it is another.
    let end = seconds(at(600)).to_string();
    let us = format!(r#"["{}"]"#, id("us"));
    let tokens = [claiming("spy", id("nsmgr").as_str(), &us, &end)];
    let (rule, text) = refused(&tokens, "spy");
    assert_eq!(rule, "prev_token_signed");
    assert!(text.contains("a hop sends its own token"), "{text}");
}

#[test]
fn a_chain_is_whole_and_bounded() {
    let broken = [
        token("nsc", "nsmgr"),
        token("spy", "forwarder"),
        token("forwarder", "us"),
    ];
    let (rule, text) = refused(&broken, "forwarder");
    assert_eq!(rule, "tokens_chained");
    assert!(
        text.contains("path segment 0") && text.contains("/spy"),
        "{text}"
    );
    let early = [until("nsc", "nsmgr", at(0)), token("nsmgr", "us")];
    let (rule, text) = refused(&early, "nsmgr");
    assert!(
        rule == "tokens_expired" && text.contains("path segment 0"),
        "{text}"
    );
    let unreadable = ["x".to_owned(), token("nsmgr", "us")];
    let (rule, text) = refused(&unreadable, "nsmgr");
    assert!(
        rule == "tokens_valid" && text.contains("path segment 0"),
        "{text}"
    );
    let many = vec![token("us", "us"); MAX_SEGMENTS + 1];
    assert_eq!(
        call(&many, "us"),
        Err(TokensRefused::Segments(MAX_SEGMENTS + 1))
    );
    assert!(call(&many[1..], "us").is_ok());
    assert_eq!(call(&[], "us"), Err(TokensRefused::Segments(0)));
}

#[test]
fn another_kind_of_key_proves_nothing() {
    let caller = id("nsmgr");
    let caller = Certified {
        id: &caller,
        key: None,
    };
    let tokens = good();
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let refusal = check_call(&tokens, caller, &id("us"), check()).unwrap_err();
    assert_eq!(refusal.rule(), "prev_token_signed");
    assert!(refusal.to_string().contains("P-256"), "{refusal}");
}

#[test]
fn a_key_is_read_from_a_certificates_spki() {
    let der = spki("nsmgr");
    assert!(P256Key::from_spki(&der).is_ok());
    let mut compressed = der.clone();
    compressed[26] = 3;
    let mut other_curve = der.clone();
    other_curve[22] = 8;
    let longer = [&der[..], &[0]].concat();
    for bad in [
        &der[1..],
        &der[..90],
        &compressed,
        &other_curve,
        &longer,
        &[],
    ] {
        assert_eq!(P256Key::from_spki(bad), Err(NotP256));
    }
    // A point that is on no curve is a key of that form, and verifies nothing.
    let mut off = der;
    off[60] ^= 1;
    let key = P256Key::from_spki(&off).unwrap();
    let token = token("nsmgr", "us");
    let read = ReadToken::read(&token).unwrap();
    assert!(!RustCrypto.verifies(&key, read.signed().as_bytes(), read.signature()));
}

/// The verdict of the client `us`, at `own`, on an answer of `nse`.
fn answer(tokens: &[String], own: usize) -> Result<Vec<SpiffeId>, TokensRefused> {
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let (server, key) = (id("nse"), key("nse"));
    let server = Certified {
        id: &server,
        key: Some(&key),
    };
    check_answer(&tokens, own, server, check()).map(|proved| proved.subjects().cloned().collect())
}

#[test]
fn an_answer_is_proved_by_the_token_behind_ours() {
    let nobody = claiming(
        "nse",
        id("nse").as_str(),
        "[]",
        &seconds(at(600)).to_string(),
    );
    let to_us = [token("nsc", "us"), token("us", "nse")];
    for last in [token("nse", "us"), token("nse", "further"), nobody] {
        let tokens = [&to_us[..], &[last]].concat();
        assert_eq!(answer(&tokens, 1), Ok(vec![id("nsc"), id("us"), id("nse")]));
    }
    let further = [
        &to_us[..],
        &[token("nse", "further"), token("further", "nse")],
    ]
    .concat();
    assert!(answer(&further, 1).is_ok());
    let refusals: [(&[String], &str); 6] = [
        (&[], "next_token_signed"),
        (&[token("spy", "us")], "tokens_chained"),
        (&[until("nse", "us", at(0))], "tokens_expired"),
        (&["no".to_owned()], "tokens_valid"),
        (
            &[token("nse", "further"), token("spy", "nse")],
            "tokens_chained",
        ),
        (
            &[claiming("spy", id("nse").as_str(), "[]", "1800000600")],
            "next_token_signed",
        ),
    ];
    for (rest, rule) in refusals {
        let tokens = [&to_us[..], rest].concat();
        let refusal = answer(&tokens, 1).unwrap_err();
        assert_eq!(refusal.rule(), rule, "{refusal}");
    }
    // An answer whose own segment is beyond its end has no next one.
    assert!(matches!(
        answer(&to_us, usize::MAX),
        Err(TokensRefused::NoNext { .. })
    ));
}

#[test]
fn a_fraction_of_a_second_ends_sooner() {
    let claims = |exp: &str| {
        let token = claiming("nsmgr", id("nsmgr").as_str(), "[]", exp);
        ReadToken::read(&token).map(|token| token.claims.expires)
    };
    assert_eq!(claims("1800000000.9"), Ok(at(0)));
    assert_eq!(
        claims("253402300799"),
        Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_799))
    );
    assert_eq!(claims("253402300800"), Err(TokenFault::Expiry));
}

proptest! {
    #[test]
    fn any_text_is_a_token_or_refused(text in "[a-zA-Z0-9._=-]{0,80}|\\PC{0,80}") {
        if let Err(fault) = ReadToken::read(&text) {
            prop_assert!(!fault.to_string().chars().any(char::is_control));
        }
    }

    /// Not one bit of a signed token can be another.
    #[test]
    fn a_changed_token_proves_nothing(at: prop::sample::Index, to in 0_u8..128) {
        let mut tokens = good();
        let mut bytes = std::mem::take(&mut tokens[1]).into_bytes();
        let at = at.index(bytes.len());
        prop_assume!(bytes[at] != to);
        bytes[at] = to;
        tokens[1] = String::from_utf8(bytes).unwrap();
        prop_assert!(call(&tokens, "nsmgr").is_err(), "{}", tokens[1]);
    }
}
