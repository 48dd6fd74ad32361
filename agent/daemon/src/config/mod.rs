//! The configuration: typed, checked, and each value with its source.
//!
//! Four layers, each over the one before: defaults, the YAML file, the environment, the flags. [`keys`] declares every key once; parser,
//! flag, variable, `--print-config`, the README's table and the JSON schema follow from the declaration. The defaults alone give an
//! agent that is a whole domain.
//!
//! All mistakes of all layers are collected and reported together, each with file and line, key, value, and what is allowed. What is
//! loaded needs no further check but those that depend on the running machine (is the port free, does the path exist).

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt, io,
    path::{Path, PathBuf},
};

mod flags;
mod identity;
mod keys;
mod kinds;
mod names;
mod node;
mod prefixes;
mod print;
mod table;
mod value;

pub(crate) use self::{
    flags::ConfigFlags,
    identity::Source as IdentitySource,
    keys::{Config, Log, PublicAddress, Tunnel},
    kinds::{Hook, KubernetesApi, LogFormat, MapIpFile, MetadataServices, TokenAlgorithm},
    value::{ListenUrl, parse_duration},
};
use self::{
    keys::KEYS,
    names::LISTEN_ON,
    node::{Bad, Entry, Node, Value},
    table::Key,
};

/// The configuration file where neither `--config` nor `NSM_CONFIG_FILE` names one. Only this one may be absent.
pub(crate) const DEFAULT_FILE: &str = "/etc/proxy-nsmgr/config.yaml";

/// The variable that names the configuration file.
const FILE_VARIABLE: &str = "NSM_CONFIG_FILE";

/// Variables that other commands of this program read.
const OTHER_VARIABLES: [&str; 3] = [FILE_VARIABLE, "NSM_CONNECT_TO", "NSM_ADMIN_URL"];

/// The prefix of our variables, and of those of every NSM component.
const PREFIX: &str = "NSM_";

/// Where a value came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Source {
    /// No layer sets the value.
    #[default]
    Default,
    /// A line of the configuration file.
    File { path: PathBuf, line: u64 },
    /// A variable of the environment.
    Environment(String),
    /// A flag, with its dashes.
    Flag(String),
}

/// The program's input: what [`Config::load`] reads.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inputs {
    /// The file that `--config` names.
    pub(crate) file: Option<PathBuf>,
    /// The environment.
    pub(crate) environment: BTreeMap<OsString, OsString>,
    /// The flags that are keys, with their texts.
    pub(crate) flags: ConfigFlags,
}

/// A configuration with the source of each value.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    /// The configuration itself.
    pub(crate) config: Config,
    /// What is unusual but no error, one sentence each; for the log, which starts later.
    pub(crate) warnings: Vec<String>,
    /// Keys that a layer set, with the last source.
    sources: BTreeMap<&'static str, Source>,
}

/// One mistake in a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Where it stands.
    pub(crate) source: Source,
    /// What is wrong there.
    pub(crate) what: String,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// The file is no YAML.
    #[error("{}:{line}: the file is no YAML: {cause}", path.display())]
    Yaml {
        /// The file.
        path: PathBuf,
        /// The line at which reading ended.
        line: u64,
        /// The parser's reason.
        cause: String,
    },
    /// Keys or values are wrong.
    #[error("{}", join(.0))]
    Invalid(Vec<Problem>),
}

/// What changed between two configurations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Keys that take effect on a reload.
    pub(crate) reloadable: Vec<&'static str>,
    /// Keys that take effect after a restart only.
    pub(crate) restart: Vec<&'static str>,
}

impl Config {
    /// Reads the four layers.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is no YAML; else every wrong key and value of all layers.
    pub(crate) fn load(inputs: &Inputs) -> Result<Loaded, ConfigError> {
        let mut layers = Layers::default();
        if let Some((path, root)) = read_file(inputs)? {
            layers.file(&path, root);
        }
        layers.environment(&inputs.environment);
        for (key, text) in inputs.flags.iter() {
            layers.apply(key, &Node::text(text), Source::Flag(key.flag()));
        }
        layers.finish()
    }

    /// The keys that differ: those that a running agent takes over, and those that need a restart.
    ///
    /// The content of the IP map file is no part of this: the agent follows it.
    pub(crate) fn reloadable_changes(old: &Self, new: &Self) -> Changes {
        let mut changes = Changes::default();
        for key in KEYS.iter().filter(|key| (key.show)(old) != (key.show)(new)) {
            if key.reloads {
                changes.reloadable.push(&key.path);
            } else {
                changes.restart.push(&key.path);
            }
        }
        changes
    }
}

impl Loaded {
    /// The configuration as a YAML file that gives the same one, each value with its source.
    pub(crate) fn to_yaml(&self) -> String {
        print::to_yaml(&self.config, |key| {
            self.sources.get(key).unwrap_or(&Source::Default)
        })
    }
}

/// Reads the text of a configuration file over the defaults; nothing else is read.
///
/// # Errors
/// The text is no YAML; else every wrong key and value.
pub(crate) fn of_text(text: &str) -> Result<Loaded, ConfigError> {
    let path = PathBuf::new();
    let mut layers = Layers::default();
    let root = parse_yaml(text).map_err(|(line, cause)| ConfigError::Yaml {
        path: path.clone(),
        line,
        cause,
    })?;
    layers.file(&path, root);
    layers.finish()
}

/// The JSON schema of the configuration file, for editors and checks before a deployment.
pub(crate) fn schema() -> String {
    format!("{:#}", print::to_schema())
}

/// The layers as they are laid over each other.
#[derive(Default)]
struct Layers {
    config: Config,
    sources: BTreeMap<&'static str, Source>,
    warnings: Vec<String>,
    problems: Vec<Problem>,
}

impl Layers {
    fn file(&mut self, path: &Path, root: Node) {
        let source = |line| Source::File {
            path: path.to_owned(),
            line,
        };
        match root.value {
            Value::Null => {}
            Value::Map(entries) => self.entries(&source, "", entries),
            _ => self.problem(
                source(root.line),
                "the file holds no keys: write lines such as `name: node-1`".to_owned(),
            ),
        }
    }

    fn entries(&mut self, source: &impl Fn(u64) -> Source, prefix: &str, entries: Vec<Entry>) {
        for Entry { line, key, node } in entries {
            let path = format!("{prefix}{key}");
            if let Some(found) = KEYS.iter().find(|known| known.path == path) {
                if node.value != Value::Null {
                    self.apply(found, &node, source(line));
                }
                continue;
            }
            let section = format!("{path}.");
            if !KEYS.iter().any(|known| known.path.starts_with(&section)) {
                let message = names::unknown(&path);
                self.problem(source(line), message);
                continue;
            }
            match node.value {
                Value::Map(inner) => self.entries(source, &section, inner),
                Value::Null => {}
                _ => self.problem(
                    source(line),
                    format!("{path}: {} is no section: keys stand below it", node.value),
                ),
            }
        }
    }

    fn environment(&mut self, variables: &BTreeMap<OsString, OsString>) {
        let mut found = BTreeMap::new();
        for (name, text) in variables {
            let is_ours = |name: &&str| {
                name.starts_with(PREFIX) || KEYS.iter().any(|key| key.variable() == **name)
            };
            let Some(name) = name.to_str().filter(is_ours) else {
                continue;
            };
            let source = Source::Environment(name.to_owned());
            match text.to_str() {
                Some(text) => {
                    found.insert(name, text);
                }
                None => self.problem(source, "the value is no UTF-8".to_owned()),
            }
        }
        // First, so that a variable of one listener wins over the list of all.
        if let Some(text) = found.remove(LISTEN_ON) {
            let source = Source::Environment(LISTEN_ON.to_owned());
            match names::listen_on(text) {
                Ok(urls) => {
                    for (key, url) in urls {
                        self.apply(key, &Node::text(&url), source.clone());
                    }
                }
                Err(what) => self.problem(source, what),
            }
        }
        for key in KEYS.iter() {
            // A manifest with nothing filled in sets an empty variable: it counts as absent.
            if let Some(text) = found.remove(key.variable().as_str())
                && !text.is_empty()
            {
                let source = Source::Environment(key.variable());
                self.apply(key, &Node::text(text), source);
            }
        }
        for name in found
            .into_keys()
            .filter(|name| !OTHER_VARIABLES.contains(name))
        {
            self.warnings.push(format!(
                "the environment variable {name} is no key of this agent and is ignored"
            ));
        }
    }

    fn apply(&mut self, key: &'static Key<Config>, node: &Node, source: Source) {
        match (key.apply)(&mut self.config, node) {
            Ok(()) => {
                self.sources.insert(&key.path, source);
            }
            Err(Bad {
                line,
                value,
                allowed,
            }) => {
                let source = match source {
                    Source::File { path, .. } if line > 0 => Source::File { path, line },
                    source => source,
                };
                let what = format!("{}: {value} is not allowed: {allowed}", key.path);
                self.problem(source, what);
            }
        }
    }

    fn problem(&mut self, source: Source, what: String) {
        self.problems.push(Problem { source, what });
    }

    fn finish(mut self) -> Result<Loaded, ConfigError> {
        if self.problems.is_empty() {
            for (path, what) in self.config.contradictions() {
                let source = self.sources.get(path).cloned().unwrap_or(Source::Default);
                self.problem(source, what);
            }
        }
        if !self.problems.is_empty() {
            return Err(ConfigError::Invalid(self.problems));
        }
        Ok(Loaded {
            config: self.config,
            warnings: self.warnings,
            sources: self.sources,
        })
    }
}

fn read_file(inputs: &Inputs) -> Result<Option<(PathBuf, Node)>, ConfigError> {
    let named = inputs.file.clone().or_else(|| {
        let variable = inputs.environment.get(std::ffi::OsStr::new(FILE_VARIABLE));
        variable.filter(|path| !path.is_empty()).map(PathBuf::from)
    });
    let (path, required) = match named {
        Some(path) => (path, true),
        None => (PathBuf::from(DEFAULT_FILE), false),
    };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !required => return Ok(None),
        Err(cause) => return Err(ConfigError::Read { path, cause }),
    };
    let root = parse_yaml(&text).map_err(|(line, cause)| ConfigError::Yaml {
        path: path.clone(),
        line,
        cause,
    })?;
    Ok(Some((path, root)))
}

fn parse_yaml(text: &str) -> Result<Node, (u64, String)> {
    serde_saphyr::from_str::<Option<Node>>(text)
        .map(|root| {
            root.unwrap_or(Node {
                line: 0,
                value: Value::Null,
            })
        })
        .map_err(|error| {
            let error = error.without_snippet();
            let line = error.location().map_or(0, |location| location.line());
            (line, error.to_string())
        })
}

fn join(problems: &[Problem]) -> String {
    let lines: Vec<_> = problems.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.what)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Flag(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.reloadable.is_empty() && self.restart.is_empty() {
            return f.write_str("nothing changed");
        }
        if !self.reloadable.is_empty() {
            write!(f, "reloaded: {}", self.reloadable.join(", "))?;
        }
        if !self.restart.is_empty() {
            let between = if self.reloadable.is_empty() { "" } else { "; " };
            write!(f, "{between}needs a restart: {}", self.restart.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
