//! The metadata of calls: tokens, and the path of a registry call.

use std::time::SystemTime;

use nsm_controlplane::{
    identity::token::{self, EXPIRES_KEY, TOKEN_KEY},
    registry::path_header::PathHeader,
};
use prost_types::Timestamp;
use tonic::metadata::{MetadataMap, MetadataValue};

/// The key of a registry call's path.
const PATH_KEY: &str = "path";

/// A token and its expiry, with a line break between.
pub(super) fn token(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == b'\n');
    let mut metadata = MetadataMap::new();
    for key in [EXPIRES_KEY, TOKEN_KEY] {
        let value = parts.next().map(MetadataValue::try_from);
        if let Some(Ok(value)) = value {
            metadata.insert(key, value);
        }
    }
    let Ok(token) = token::read(&metadata) else {
        return;
    };
    assert!(!token.text.is_empty(), "an empty token is none");
    // The time travels on in a path segment.
    let written = Timestamp::from(token.expires);
    assert_eq!(SystemTime::try_from(written), Ok(token.expires));
    let value = written.to_string();
    metadata.insert(EXPIRES_KEY, value.parse().expect("a time is ASCII"));
    assert_eq!(token::read(&metadata), Ok(token), "{value}");
}

/// The path header. What the caller gets back is a path that it may send again.
pub(super) fn registry_path(bytes: &[u8]) {
    let Ok(value) = MetadataValue::try_from(bytes) else {
        return;
    };
    let mut metadata = MetadataMap::new();
    metadata.insert(PATH_KEY, value);
    let Ok(Some(path)) = PathHeader::descend(&metadata, Some("theirs"), "ours") else {
        return;
    };
    let mut answer = MetadataMap::new();
    path.clone().echo(&mut answer);
    assert!(
        answer.get(PATH_KEY).is_some(),
        "the path is echoed: {path:?}"
    );
    let again = PathHeader::descend(&answer, Some("theirs"), "ours");
    assert_eq!(again.ok().flatten(), Some(path));
}
