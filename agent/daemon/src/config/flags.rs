//! The flags that are keys: one for each entry of the table.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::keys::{KEYS, Key};

/// What was said by flags, one text a key.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConfigFlags(Vec<(&'static str, String)>);

impl ConfigFlags {
    /// Each key that was said, with its text.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static Key, &str)> {
        self.0.iter().filter_map(|(path, text)| {
            let key = KEYS.iter().find(|key| key.path == *path)?;
            Some((key, text.as_str()))
        })
    }
}

impl Args for ConfigFlags {
    fn augment_args(command: Command) -> Command {
        command.args(KEYS.iter().map(|key| {
            let is_list = key.placeholder.ends_with('…');
            let arg = Arg::new(key.path)
                .long(key.flag_name())
                .value_name(key.placeholder)
                .help(format!("{} [env: {}]", key.help, key.variable()))
                .help_heading("Configuration keys")
                .allow_hyphen_values(false);
            match (is_list, key.placeholder) {
                (true, _) => arg.action(ArgAction::Append),
                (false, "BOOL") => arg.num_args(0..=1).default_missing_value("true"),
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
        for key in KEYS {
            if let Some(texts) = matches.get_many::<String>(key.path) {
                let texts: Vec<_> = texts.map(String::as_str).collect();
                self.0.push((key.path, texts.join(",")));
            }
        }
        Ok(())
    }
}
