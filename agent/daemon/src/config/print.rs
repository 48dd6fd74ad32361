//! The configuration as a YAML file, each value with its source behind it.

use std::fmt::Write as _;

use super::{
    Config, Source,
    keys::{KEYS, Shown},
};

/// The column at which sources stand, where the value leaves room.
const COLUMN: usize = 64;

/// Texts that YAML reads as something else when they are not quoted.
const RESERVED: [&str; 10] = [
    "", "~", "null", "true", "false", "yes", "no", "on", "off", "nan",
];

pub(super) fn to_yaml<'s>(config: &Config, source: impl Fn(&str) -> &'s Source) -> String {
    let mut yaml = String::from(
        "# The effective configuration: flags over environment over file over defaults.\n",
    );
    let mut section = "";
    for key in KEYS {
        let (prefix, leaf) = key.path.rsplit_once('.').unwrap_or(("", key.path));
        if prefix != section && !prefix.is_empty() {
            line(&mut yaml, format_args!("{prefix}:"));
        }
        section = prefix;
        let indent = if prefix.is_empty() { "" } else { "  " };
        let source = source(key.path);
        match (key.show)(config) {
            Shown::Unset => commented(&mut yaml, format!("{indent}{leaf}:"), "not set"),
            Shown::Hidden(_) => {
                commented(
                    &mut yaml,
                    format!("{indent}{leaf}:"),
                    format!("hidden, from {source}"),
                );
            }
            Shown::Text(text) => {
                commented(
                    &mut yaml,
                    format!("{indent}{leaf}: {}", scalar(&text)),
                    source,
                );
            }
            list @ Shown::List(_) => {
                commented(
                    &mut yaml,
                    format!("{indent}{leaf}: {}", flow(&list)),
                    source,
                );
            }
            Shown::Map(entries) if entries.is_empty() => {
                commented(&mut yaml, format!("{indent}{leaf}: {{}}"), source);
            }
            Shown::Map(entries) => {
                commented(&mut yaml, format!("{indent}{leaf}:"), source);
                for (name, value) in entries {
                    let name = scalar(&name);
                    line(
                        &mut yaml,
                        format_args!("{indent}  {name}: {}", flow(&value)),
                    );
                }
            }
        }
    }
    yaml
}

/// A value within one line.
fn flow(value: &Shown) -> String {
    match value {
        Shown::Unset | Shown::Hidden(_) => "null".to_owned(),
        Shown::Text(text) => scalar(text),
        Shown::List(items) => {
            let items: Vec<_> = items.iter().map(|item| quoted(item)).collect();
            format!("[{}]", items.join(", "))
        }
        Shown::Map(entries) => {
            let entry =
                |(name, value): &(String, Shown)| format!("{}: {}", scalar(name), flow(value));
            let entries: Vec<_> = entries.iter().map(entry).collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

fn commented(yaml: &mut String, text: String, comment: impl ToString) {
    let comment = comment.to_string().replace(['\n', '\r'], " ");
    line(yaml, format_args!("{text:<COLUMN$} # {comment}"));
}

fn line(yaml: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(yaml, "{text}").expect("a String takes every text");
}

/// The text plain where YAML reads it back as it is, else in double quotes.
fn scalar(text: &str) -> String {
    let plain = text
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'.' | b'_' | b'-' | b':'))
        && text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '/')
        && !text.ends_with(':')
        && !RESERVED.contains(&text.to_ascii_lowercase().as_str());
    // A text that looks like a number of another notation would come back changed.
    let number_like = text.starts_with(|c: char| c.is_ascii_digit())
        && text
            .parse::<u64>()
            .map_or(true, |number| number.to_string() != text)
        && !text.contains(|c: char| {
            c.is_ascii_alphabetic() && !matches!(c, 'e' | 'E' | 'x' | 'o' | 'b')
        });
    if plain && !number_like || text == "true" || text == "false" {
        text.to_owned()
    } else {
        quoted(text)
    }
}

/// A JSON string is a double-quoted string of YAML.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
