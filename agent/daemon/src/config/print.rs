//! The keys as text: the effective configuration, the README's table, the JSON schema.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::{
    Config, Source,
    keys::KEYS,
    table::{Key, Shape},
};

/// The column at which sources stand, where the value leaves room.
const COLUMN: usize = 64;

/// The configuration as a YAML file, each value with its source behind it.
pub(super) fn to_yaml<'s>(config: &Config, source: impl Fn(&str) -> &'s Source) -> String {
    let mut yaml = String::from(
        "# The effective configuration: flags over environment over file over defaults.\n",
    );
    let defaults = Config::default();
    let mut section = "";
    for key in KEYS.iter() {
        let (prefix, leaf) = key.path.rsplit_once('.').unwrap_or(("", &key.path));
        if prefix != section && !prefix.is_empty() {
            line(&mut yaml, format_args!("{prefix}:"));
        }
        section = prefix;
        let indent = if prefix.is_empty() { "" } else { "  " };
        let source = source(&key.path).to_string().replace(['\n', '\r'], " ");
        let value = (key.show)(config);
        let mut commented = |text: String, comment: &str| {
            line(&mut yaml, format_args!("{text:<COLUMN$} # {comment}"));
        };
        match &value {
            Value::Null => commented(format!("{indent}{leaf}:"), "not set"),
            value if key.is_secret && *value != (key.show)(&defaults) => {
                commented(
                    format!("{indent}{leaf}:"),
                    &format!("hidden, from {source}"),
                );
            }
            Value::Object(entries) if !entries.is_empty() => {
                commented(format!("{indent}{leaf}:"), &source);
                for (name, value) in entries {
                    let name = scalar(name);
                    line(&mut yaml, format_args!("{indent}  {name}: {}", flow(value)));
                }
            }
            value => commented(format!("{indent}{leaf}: {}", flow(value)), &source),
        }
    }
    yaml
}

/// A value within one line. A JSON text is a double-quoted text of YAML.
fn flow(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(Value::to_string).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(entries) => {
            let entries = entries
                .iter()
                .map(|(name, value)| format!("{name}: {value}"));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

fn line(yaml: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(yaml, "{text}").expect("a String takes every text");
}

/// The text plain where YAML reads it back as it is, else quoted.
fn scalar(text: &str) -> String {
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    let yaml = serde_saphyr::to_string_with_options(&text, options);
    yaml.expect("every text has a form in YAML")
        .trim_end()
        .to_owned()
}

/// All keys as a table of Markdown.
#[cfg(test)]
pub(super) fn to_markdown() -> String {
    let mut table = String::from("| key | variable | default | |\n|---|---|---|---|\n");
    let defaults = Config::default();
    for key in KEYS.iter() {
        let default = match ((key.show)(&defaults), key.default) {
            (_, Some(words)) => words.to_owned(),
            (Value::Null, None) => "none".to_owned(),
            (Value::Array(items), None) if items.is_empty() => "none".to_owned(),
            (Value::Object(entries), None) if entries.is_empty() => "none".to_owned(),
            (value, None) => format!("`{}`", flow(&value)),
        };
        let (path, variable, help) = (&key.path, key.variable(), &key.help);
        line(
            &mut table,
            format_args!("| `{path}` | `{variable}` | {default} | {help} |"),
        );
    }
    table
}

/// The JSON schema of the file.
pub(super) fn to_schema() -> Value {
    let defaults = Config::default();
    let mut properties = Map::new();
    for key in KEYS.iter() {
        match key.path.split_once('.') {
            None => drop(properties.insert(key.path.clone(), schema(key, &defaults))),
            Some((section, leaf)) => {
                let section = properties.entry(section).or_insert_with(
                    || json!({"type": "object", "additionalProperties": false, "properties": {}}),
                );
                section["properties"][leaf] = schema(key, &defaults);
            }
        }
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The configuration of proxy-nsmgr",
        "type": "object",
        "additionalProperties": false,
        "properties": properties,
    })
}

fn schema(key: &Key<Config>, defaults: &Config) -> Value {
    let mut schema = match key.shape {
        Shape::Text => json!({"type": "string"}),
        Shape::Bool => json!({"type": "boolean"}),
        Shape::Integer(least, most) => {
            json!({"type": "integer", "minimum": least, "maximum": most})
        }
        Shape::Size => json!({"type": ["string", "integer"]}),
        Shape::Words => json!({"enum": key.placeholder.split('|').collect::<Vec<_>>()}),
        Shape::List => json!({"type": ["array", "string"], "items": {"type": "string"}}),
        Shape::Map => json!({"type": ["object", "string"]}),
    };
    schema["description"] = key.help.as_str().into();
    let default = (key.show)(defaults);
    if key.default.is_none() && !default.is_null() {
        schema["default"] = default;
    }
    schema
}
