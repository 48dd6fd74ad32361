//! A configuration value before it is typed: its shape, its text, and the line it stands on.
//!
//! A YAML file is read into nodes, and the table of keys reads nodes into types: a mistake is then reported with its line and key,
//! and all mistakes of a file at once.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

/// One value of a configuration file, or the text of a variable or a flag.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    /// The line in the file, from 1; 0 where there is none.
    pub(crate) line: u64,
    pub(crate) value: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// Nothing behind the colon: the key counts as absent.
    Null,
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    /// The line of the key, from 1.
    pub(crate) line: u64,
    pub(crate) key: String,
    pub(crate) node: Node,
}

/// A value that is not allowed where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bad {
    pub(crate) line: u64,
    pub(crate) value: String,
    pub(crate) allowed: String,
}

impl Bad {
    /// The same, without the value of a secret.
    pub(super) fn without_value(self) -> Self {
        Self {
            value: "the value".to_owned(),
            ..self
        }
    }
}

impl Node {
    /// The text of a variable or a flag.
    pub(crate) fn text(text: &str) -> Self {
        Self {
            line: 0,
            value: Value::Scalar(text.to_owned()),
        }
    }

    /// The same on another line.
    pub(crate) fn at(self, line: u64) -> Self {
        Self { line, ..self }
    }

    /// The value as `parse` reads its text.
    pub(crate) fn parse<T, E: ToString>(
        &self,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, Bad> {
        match &self.value {
            Value::Scalar(text) => parse(text).map_err(|error| self.bad(error.to_string())),
            Value::Null => Err(self.bad("a value")),
            Value::List(_) | Value::Map(_) => Err(self.bad("a single value")),
        }
    }

    /// The value as a list: a list of YAML, or one text with commas between the elements.
    pub(crate) fn list<T>(&self, read: impl Fn(&Self) -> Result<T, Bad>) -> Result<Vec<T>, Bad> {
        match &self.value {
            Value::Null => Ok(Vec::new()),
            Value::List(nodes) => nodes.iter().map(read).collect(),
            Value::Scalar(text) => {
                let parts = split_commas(text).map(|part| Self::text(part).at(self.line));
                parts.map(|part| read(&part)).collect()
            }
            Value::Map(_) => Err(self.bad("a list")),
        }
    }

    /// The value as a map of texts: a map of YAML (of single values or lists), or one text with
    /// `key=value` pairs and commas between. A key that comes again adds a value to it.
    pub(crate) fn pairs(&self) -> Result<Vec<(String, Node)>, Bad> {
        let mut pairs = Vec::new();
        match &self.value {
            Value::Null => {}
            Value::Map(entries) => {
                for Entry { key, node, .. } in entries {
                    let nodes = match &node.value {
                        Value::List(nodes) => nodes,
                        _ => std::slice::from_ref(node),
                    };
                    pairs.extend(nodes.iter().map(|node| (key.clone(), node.clone())));
                }
            }
            Value::Scalar(text) => {
                for part in split_commas(text) {
                    let (key, value) = part.split_once('=').ok_or_else(|| {
                        let part = Self::text(part).at(self.line);
                        part.bad("key=value pairs with commas between")
                    })?;
                    let node = Self::text(value.trim()).at(self.line);
                    pairs.push((key.trim().to_owned(), node));
                }
            }
            Value::List(_) => return Err(self.bad("a map")),
        }
        Ok(pairs)
    }

    pub(crate) fn bad(&self, allowed: impl Into<String>) -> Bad {
        Bad {
            line: self.line,
            value: self.value.to_string(),
            allowed: allowed.into(),
        }
    }
}

fn split_commas(text: &str) -> impl Iterator<Item = &str> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("nothing"),
            Self::Scalar(text) => write!(f, "{text:?}"),
            Self::List(nodes) => write!(f, "a list of {}", nodes.len()),
            Self::Map(entries) => write!(f, "a map of {}", entries.len()),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self {
            line: spanned.referenced.line(),
            value: spanned.value,
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

macro_rules! scalars {
    ($($visit:ident: $type:ty),*) => {
        $(fn $visit<E>(self, value: $type) -> Result<Value, E> {
            Ok(Value::Scalar(value.to_string()))
        })*
    };
}

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value, a list or a map")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    scalars! { visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_f64: f64, visit_str: &str }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = seq.next_element()? {
            nodes.push(node);
        }
        Ok(Value::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            entries.push(Entry {
                line: key.referenced.line(),
                key: key.value,
                node: map.next_value()?,
            });
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(yaml: &str) -> Node {
        serde_saphyr::from_str(yaml).unwrap()
    }

    #[test]
    fn lines_of_keys_and_values_are_kept() {
        let root = node("name: a\n# comment\ntunnel:\n  port: 4789\n  mtu:\n");
        let Value::Map(entries) = root.value else {
            panic!("no map")
        };
        assert_eq!(entries[0].line, 1);
        assert_eq!(entries[0].node.value, Value::Scalar("a".to_owned()));
        assert_eq!((entries[1].line, entries[1].key.as_str()), (3, "tunnel"));
        let Value::Map(inner) = &entries[1].node.value else {
            panic!("no map")
        };
        assert_eq!((inner[0].line, inner[0].node.line), (4, 4));
        assert_eq!(inner[0].node.value, Value::Scalar("4789".to_owned()));
        assert_eq!(inner[1].node.value, Value::Null);
    }

    #[test]
    fn lists_and_maps_may_be_written_in_one_line() {
        let parse = |node: &Node| node.parse(|text| text.parse::<u16>());
        assert_eq!(Node::text("1, 2").list(parse).unwrap(), [1, 2]);
        assert_eq!(node("[1, 2]").list(parse).unwrap(), [1, 2]);
        assert_eq!(node("- 1\n- 2\n").list(parse).unwrap(), [1, 2]);
        let bad = node("- 1\n- x\n").list(parse).unwrap_err();
        assert_eq!((bad.line, bad.value.as_str()), (2, "\"x\""));
        let pairs = Node::text("a=1,b=2,a=3").pairs().unwrap();
        let keys: Vec<_> = pairs.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["a", "b", "a"]);
        let pairs = node("a: [1, 3]\nb: 2\n").pairs().unwrap();
        assert_eq!(pairs.len(), 3);
        assert_eq!(pairs[1].1.value, Value::Scalar("3".to_owned()));
        assert!(Node::text("a").pairs().is_err());
        assert!(node("[1]").pairs().is_err());
    }

    #[test]
    fn an_absent_value_and_a_wrong_shape_are_errors() {
        let parse = |text: &str| text.parse::<u16>();
        let root = node("a:\nb: [1]\n");
        let Value::Map(entries) = root.value else {
            panic!("no map")
        };
        assert_eq!(entries[0].node.parse(parse).unwrap_err().value, "nothing");
        assert_eq!(
            entries[1].node.parse(parse).unwrap_err().allowed,
            "a single value"
        );
    }
}
