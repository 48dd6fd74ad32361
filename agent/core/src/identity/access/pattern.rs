//! Patterns of names, and of the paths of SPIFFE ids.

use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};
use thiserror::Error;

use crate::{identity::SpiffeId, text::printable};

/// The longest pattern in bytes, that of an id.
const LONGEST: usize = SpiffeId::LONGEST;

/// How much of a pattern an error shows.
const SHOWN: usize = 80;

/// Why a text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PatternError {
    /// It is empty, or longer than every id.
    #[error("a pattern has 1 to {LONGEST} characters")]
    Length,
    /// A path begins with a slash, and nothing stands for the trust domain.
    #[error(
        "`{0}` is no pattern of an id's path: begin it with a slash and leave the trust domain out, such as /ns/nsm-system/pod/nsmgr-*"
    )]
    NoPath(String),
    /// An empty segment.
    #[error("`{0}` has an empty path segment, which no id has")]
    EmptySegment(String),
    /// The stars for everything below stand alone, and last.
    #[error("`{0}`: `**` stands for all that follows; make it the last segment, as in /ns/**")]
    Stars(String),
    /// A character that no name has.
    #[error("`{0}` has a character that no such name has; `*` stands for any run of characters")]
    Character(String),
}

/// A pattern of a name: `*` stands for any run of characters, also an empty one. It matches the whole name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePattern(String);

impl NamePattern {
    /// Whether the name is one of those.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        matches_run(&self.0, name)
    }
}

impl FromStr for NamePattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        check_length(text)?;
        let is_of_name = |c: char| c.is_ascii_graphic() && c != '/' && c != '@';
        if text.contains("**") {
            return Err(PatternError::Stars(printable(text, SHOWN)));
        }
        if !text.chars().all(is_of_name) {
            return Err(PatternError::Character(printable(text, SHOWN)));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A pattern of the path of a SPIFFE id. `*` stands for any run of characters of one segment, and `**` as the last segment for all that
/// follows, one segment at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdPattern {
    segments: Vec<String>,
    is_open: bool,
}

impl IdPattern {
    /// Whether the path of the id is one of those.
    #[must_use]
    pub fn matches(&self, id: &SpiffeId) -> bool {
        let mut found = id.segments();
        let each = self.segments.iter().all(|wanted| {
            found
                .next()
                .is_some_and(|segment| matches_run(wanted, segment))
        });
        each && found.next().is_some() == self.is_open
    }
}

impl FromStr for IdPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        check_length(text)?;
        let shown = || printable(text, SHOWN);
        let path = text
            .strip_prefix('/')
            .ok_or_else(|| PatternError::NoPath(shown()))?;
        let mut segments: Vec<String> = path.split('/').map(str::to_owned).collect();
        let is_open = segments.last().is_some_and(|last| last == "**");
        if is_open {
            segments.pop();
        }
        for segment in &segments {
            if segment.is_empty() {
                return Err(PatternError::EmptySegment(shown()));
            }
            if segment.contains("**") {
                return Err(PatternError::Stars(shown()));
            }
            let is_of_path = |byte: u8| byte.is_ascii_alphanumeric() || b".-_*".contains(&byte);
            if !segment.bytes().all(is_of_path) {
                return Err(PatternError::Character(shown()));
            }
        }
        Ok(Self { segments, is_open })
    }
}

fn check_length(text: &str) -> Result<(), PatternError> {
    if (1..=LONGEST).contains(&text.len()) {
        Ok(())
    } else {
        Err(PatternError::Length)
    }
}

/// Whether a text is what a pattern with stars stands for. The work is at most the product of the two lengths: each star takes the
/// shortest run that lets the text up to the next star fit, and a shorter run is never needed later.
fn matches_run(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Patterns are text in a file.
macro_rules! from_text {
    ($type:ty) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

from_text!(NamePattern);
from_text!(IdPattern);
