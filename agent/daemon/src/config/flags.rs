//! The flags that are keys: one for each.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::{
    Config,
    keys::KEYS,
    table::{Key, Shape},
};

/// The values that flags give, one text a key.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConfigFlags(Vec<(&'static str, String)>);

impl ConfigFlags {
    /// Each key that a flag sets, with its text.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static Key<Config>, &str)> {
        self.0.iter().filter_map(|(path, text)| {
            let key = KEYS.iter().find(|key| key.path == *path)?;
            Some((key, text.as_str()))
        })
    }
}

impl Args for ConfigFlags {
    fn augment_args(command: Command) -> Command {
        command.args(KEYS.iter().map(|key| {
            let arg = Arg::new(key.path.as_str())
                .long(key.flag_name())
                .value_name(key.placeholder.as_str())
                .help(format!("{} [env: {}]", key.help, key.variable()))
                .help_heading("Configuration keys")
                .allow_hyphen_values(false);
            match key.shape {
                Shape::List | Shape::Map => arg.action(ArgAction::Append),
                Shape::Bool => arg.num_args(0..=1).default_missing_value("true"),
                _ => arg,
            }
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for ConfigFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for key in KEYS.iter() {
            if let Some(texts) = matches.get_many::<String>(&key.path) {
                let texts: Vec<_> = texts.map(String::as_str).collect();
                self.0.push((&key.path, texts.join(",")));
            }
        }
        Ok(())
    }
}
