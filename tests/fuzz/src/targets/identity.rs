//! Identities: the ids in certificates and tokens.

use std::time::SystemTime;

use nsm_core::identity::{
    SpiffeId, TrustDomain,
    claims::{LONGEST_TOKEN, ReadToken},
};
use prost_types::Timestamp;

/// A SPIFFE id. What is read has one spelling, and is made of its trust domain and its path.
pub(super) fn spiffe_id(bytes: &[u8]) {
    let Some(text) = super::text(bytes) else {
        return;
    };
    match text.parse::<SpiffeId>() {
        Ok(id) => {
            assert_eq!(id.as_str(), text);
            let domain = id.trust_domain();
            assert_eq!(domain.as_str().parse::<TrustDomain>().as_ref(), Ok(domain));
            let mut whole = format!("spiffe://{domain}");
            for segment in id.segments() {
                assert!(!matches!(segment, "" | "." | ".."), "{id}");
                whole.push('/');
                whole.push_str(segment);
            }
            assert_eq!(whole, text);
        }
        Err(error) => {
            let error = error.to_string();
            assert!(!error.is_empty() && error.len() < 2048, "{error}");
            assert!(!error.chars().any(char::is_control), "{error:?}");
        }
    }
}

/// A token of a path. What is read has ids of one spelling and a time that a message can hold, and its parts are those of the text.
pub(super) fn claims(bytes: &[u8]) {
    let Some(text) = super::text(bytes) else {
        return;
    };
    match ReadToken::read(text) {
        Ok(token) => {
            assert!(text.len() <= LONGEST_TOKEN);
            assert!(text[token.signed().len()..].starts_with('.'), "{text}");
            let written = Timestamp::from(token.claims.expires);
            assert_eq!(SystemTime::try_from(written), Ok(token.claims.expires));
            let ids = token.claims.audience.iter().chain([&token.claims.subject]);
            for id in ids {
                assert_eq!(id.as_str().parse::<SpiffeId>().as_ref(), Ok(id));
            }
        }
        Err(fault) => {
            let fault = fault.to_string();
            assert!(!fault.is_empty() && fault.len() < 1024, "{fault}");
            assert!(!fault.chars().any(char::is_control), "{fault:?}");
        }
    }
}
