//! The path of a registry call, which NSM carries in the metadata key `path` as JSON
//! (`grpcmetadata` of the sdk): each hop adds its token, and the answer echoes it.

use nsm_core::nsm::path::MAX_SEGMENTS;
use serde::{Deserialize, Deserializer, Serialize};
use tonic::metadata::{MetadataMap, MetadataValue};

use crate::error::RequestError;

const KEY: &str = "path";

/// The path of a registry call, with our own segment in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PathHeader {
    index: usize,
    #[serde(deserialize_with = "null_is_empty")]
    path_segments: Vec<Segment>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Segment {
    token: String,
}

/// A client's first path has no segments, and Go writes a slice that was never filled as `null`.
fn null_is_empty<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Segment>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl PathHeader {
    /// The path of a call that begins here.
    pub(crate) fn begin(own_token: String) -> Self {
        Self {
            index: 0,
            path_segments: vec![Segment { token: own_token }],
        }
    }

    /// Reads the caller's path and takes our step on it; `None` when the caller sends none.
    ///
    /// # Errors
    /// The path is not what NSM's components send, or too long.
    pub fn descend(
        metadata: &MetadataMap,
        previous_token: Option<&str>,
        own_token: &str,
    ) -> Result<Option<Self>, RequestError> {
        let Some(value) = metadata.get_all(KEY).iter().next_back() else {
            return Ok(None);
        };
        let text = value.to_str().unwrap_or_default();
        let bad = |reason: String| RequestError::Field {
            field: "metadata `path`",
            value: text.chars().take(120).collect(),
            reason,
        };
        let mut path: Self = if text.is_empty() {
            Self::default()
        } else {
            serde_json::from_str(text).map_err(|error| bad(error.to_string()))?
        };
        let previous = Segment {
            token: previous_token.unwrap_or_default().to_owned(),
        };
        if path.path_segments.is_empty() {
            path.path_segments.push(previous);
            path.index = 0;
        } else {
            let count = path.path_segments.len();
            *path
                .path_segments
                .get_mut(path.index)
                .ok_or_else(|| bad(format!("Index is beyond its {count} segments")))? = previous;
        }
        path.index += 1;
        if path.index >= MAX_SEGMENTS {
            return Err(bad(format!("a path has at most {MAX_SEGMENTS} segments")));
        }
        let own = Segment {
            token: own_token.to_owned(),
        };
        match path.path_segments.get_mut(path.index) {
            Some(segment) => *segment = own,
            None => path.path_segments.push(own),
        }
        Ok(Some(path))
    }

    /// The tokens of the hops before ours, the first one first.
    pub(crate) fn tokens(&self) -> Vec<&str> {
        let before = self.path_segments.iter().take(self.index);
        before.map(|segment| segment.token.as_str()).collect()
    }

    /// Puts the path into the metadata of the call to the next hop.
    pub(crate) fn apply(&self, metadata: &mut MetadataMap) {
        if let Ok(json) = serde_json::to_string(self)
            && let Ok(value) = MetadataValue::try_from(json)
        {
            metadata.insert(KEY, value);
        }
    }

    /// Puts the path into the answer's metadata, as the caller counts it.
    pub fn echo(mut self, metadata: &mut MetadataMap) {
        self.index = self.index.saturating_sub(1);
        self.apply(metadata);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(path: &str) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert(KEY, path.parse().expect("ASCII"));
        metadata
    }

    #[test]
    fn an_empty_path_gets_the_caller_and_us() {
        let path = PathHeader::descend(&metadata("{}"), Some("theirs"), "ours")
            .expect("valid")
            .expect("present");
        // As an NSM client sends it.
        let of_go = metadata(r#"{"Index":0,"PathSegments":null}"#);
        let of_go = PathHeader::descend(&of_go, Some("theirs"), "ours").expect("valid");
        assert_eq!(of_go.as_ref(), Some(&path));
        let mut out = MetadataMap::new();
        path.clone().echo(&mut out);
        assert_eq!(
            out.get(KEY).expect("echoed").to_str().expect("ASCII"),
            r#"{"Index":0,"PathSegments":[{"token":"theirs"},{"token":"ours"}]}"#
        );
        // The caller refreshes with what it was answered: the segments stay two.
        let again = PathHeader::descend(&out, Some("theirs2"), "ours2")
            .expect("valid")
            .expect("present");
        assert_eq!(again.path_segments.len(), 2);
        assert_eq!(again.path_segments[1].token, "ours2");
    }

    #[test]
    fn no_path_is_none_and_a_bad_one_is_an_error() {
        assert_eq!(
            PathHeader::descend(&MetadataMap::new(), None, "ours").expect("valid"),
            None
        );
        for bad in [
            "[",
            r#"{"Index":7,"PathSegments":[{"token":"a"}]}"#,
            r#"{"Index":-1}"#,
        ] {
            assert!(
                PathHeader::descend(&metadata(bad), None, "ours").is_err(),
                "{bad}"
            );
        }
    }
}
