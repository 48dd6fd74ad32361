//! Identities: the ids in certificates and tokens.

use nsm_core::identity::{SpiffeId, TrustDomain};

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
