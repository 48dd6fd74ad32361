//! What a key is: its names, its kind of value, and its place in [`Config`].
//!
//! [`settings!`] makes a struct and its keys out of one declaration. A [`Kind`] defines how a value of a type is read, shown and
//! described; the type of the field decides whether a kind stands for one value, an optional one or a list.
//!
//! [`Config`]: super::Config

use serde_json::Value;

use super::{
    node::{Bad, Node},
    value::{OFF, is_off},
};

/// One key of the settings `C`.
pub(crate) struct Key<C> {
    /// `section.key` or `key`.
    pub(super) path: String,
    /// NSM's name of the variable, where it is not the one that follows from the path.
    variable: Option<&'static str>,
    /// The default in words, where it depends on the machine.
    pub(super) default: Option<&'static str>,
    /// What stands behind the flag in help texts.
    pub(super) placeholder: String,
    /// One sentence for help texts, the README and the schema.
    pub(super) help: String,
    /// Whether a reload takes a new value over.
    pub(super) reloads: bool,
    /// Whether the value is not for the eyes of others.
    pub(super) is_secret: bool,
    /// The form of a value.
    pub(super) shape: Shape,
    /// Takes a value of any layer.
    pub(super) apply: Apply<C>,
    /// The value as it would stand in a file; null where nothing is set.
    pub(super) show: Show<C>,
}

type Apply<C> = Box<dyn Fn(&mut C, &Node) -> Result<(), Bad> + Send + Sync>;
type Show<C> = Box<dyn Fn(&C) -> Value + Send + Sync>;

/// The form of a value in the file, for flags and the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Text,
    Bool,
    /// A number within these bounds.
    Integer(u64, u64),
    /// A number of bytes, perhaps with a unit.
    Size,
    /// One of the words of the placeholder.
    Words,
    List,
    Map,
}

/// How values of the type `T` are read and shown.
pub(super) trait Kind<T> {
    fn placeholder(&self) -> String;
    fn shape(&self) -> Shape;
    fn read(&self, node: &Node) -> Result<T, Bad>;
    fn show(&self, value: &T) -> Value;

    /// Whether values are left out of messages and of what is printed.
    fn is_secret(&self) -> bool {
        false
    }
}

/// A struct of settings.
pub(super) trait Settings: Default {
    /// The keys of its fields, in the order of their declaration.
    fn keys() -> Vec<Key<Self>>;
}

/// Where a field of `C` is.
pub(super) type Field<C, T> = (fn(&C) -> &T, fn(&mut C) -> &mut T);

/// What a field declares: one key here, all keys of a struct with [`Section`].
pub(super) trait Declares<T>: Kind<T> + Sync {
    fn keys<C: 'static>(
        &'static self,
        name: &str,
        help: &[&str],
        (get, get_mut): Field<C, T>,
    ) -> [Key<C>; 1]
    where
        T: 'static,
    {
        let help: Vec<_> = help.iter().map(|line| line.trim()).collect();
        [Key {
            path: name.to_owned(),
            variable: None,
            default: None,
            placeholder: self.placeholder(),
            help: help.join(" "),
            reloads: false,
            is_secret: self.is_secret(),
            shape: self.shape(),
            apply: Box::new(move |settings, node| {
                *get_mut(settings) = self.read(node)?;
                Ok(())
            }),
            show: Box::new(move |settings| self.show(get(settings))),
        }]
    }
}

impl<T, K: Kind<T> + Sync> Declares<T> for K {}

/// A field that holds [`Settings`]: their keys stand below its name.
pub(super) struct Section;

impl Section {
    pub(super) fn keys<C: 'static, T: Settings + 'static>(
        &self,
        name: &str,
        _: &[&str],
        (get, get_mut): Field<C, T>,
    ) -> Vec<Key<C>> {
        let below = |key: Key<T>| Key {
            path: format!("{name}.{}", key.path),
            apply: Box::new(move |all: &mut C, node: &Node| (key.apply)(get_mut(all), node)),
            show: Box::new(move |all: &C| (key.show)(get(all))),
            variable: key.variable,
            default: key.default,
            placeholder: key.placeholder,
            help: key.help,
            reloads: key.reloads,
            is_secret: key.is_secret,
            shape: key.shape,
        };
        T::keys().into_iter().map(below).collect()
    }
}

impl<C> Key<C> {
    /// The flag, with its dashes.
    pub(super) fn flag(&self) -> String {
        format!("--{}", self.flag_name())
    }

    /// The flag without its dashes.
    pub(super) fn flag_name(&self) -> String {
        self.path.replace(['.', '_'], "-")
    }

    /// The variable.
    pub(super) fn variable(&self) -> String {
        match self.variable {
            Some(name) => name.to_owned(),
            None => format!("NSM_{}", self.path.replace('.', "_").to_ascii_uppercase()),
        }
    }

    /// The variable has a name of NSM's own.
    pub(super) fn variable_is(mut self, name: &'static str) -> Self {
        self.variable = Some(name);
        self
    }

    /// The default depends on the machine: these words describe it.
    pub(super) fn default_is(mut self, words: &'static str) -> Self {
        self.default = Some(words);
        self
    }

    /// A reload takes a new value over.
    pub(super) fn reloadable(mut self) -> Self {
        self.reloads = true;
        self
    }
}

/// A kind of single value. A field of the type `Option<T>` may have none, one of the type `Vec<T>` has a list.
pub(super) struct One<T> {
    pub(super) placeholder: &'static str,
    pub(super) shape: Shape,
    pub(super) is_secret: bool,
    /// The value, or what is allowed.
    pub(super) parse: fn(&str) -> Result<T, String>,
    pub(super) show: fn(&T) -> Value,
}

impl<T> Kind<T> for One<T> {
    fn placeholder(&self) -> String {
        self.placeholder.to_owned()
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn is_secret(&self) -> bool {
        self.is_secret
    }

    fn read(&self, node: &Node) -> Result<T, Bad> {
        node.parse(self.parse).map_err(|bad| match self.is_secret {
            true => bad.without_value(),
            false => bad,
        })
    }

    fn show(&self, value: &T) -> Value {
        (self.show)(value)
    }
}

impl<T> Kind<Option<T>> for One<T> {
    fn placeholder(&self) -> String {
        self.placeholder.to_owned()
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn read(&self, node: &Node) -> Result<Option<T>, Bad> {
        node.parse(self.parse).map(Some)
    }

    fn show(&self, value: &Option<T>) -> Value {
        value.as_ref().map_or(Value::Null, self.show)
    }
}

impl<T> Kind<Vec<T>> for One<T> {
    fn placeholder(&self) -> String {
        format!("{},…", self.placeholder)
    }

    fn shape(&self) -> Shape {
        Shape::List
    }

    fn read(&self, node: &Node) -> Result<Vec<T>, Bad> {
        node.list(self.parse)
    }

    fn show(&self, value: &Vec<T>) -> Value {
        value.iter().map(self.show).collect()
    }
}

/// One of a few words.
pub(super) struct Choice<T: 'static>(pub(super) &'static [(&'static str, T)]);

impl<T: Copy + PartialEq> Choice<T> {
    fn words(&self) -> Vec<&'static str> {
        self.0.iter().map(|(word, _)| *word).collect()
    }
}

impl<T: Copy + PartialEq> Kind<T> for Choice<T> {
    fn placeholder(&self) -> String {
        self.words().join("|")
    }

    fn shape(&self) -> Shape {
        Shape::Words
    }

    fn read(&self, node: &Node) -> Result<T, Bad> {
        node.parse(|text| {
            let is_meant = |word: &str| word == text || word == OFF && is_off(text);
            let found = self.0.iter().find(|(word, _)| is_meant(word));
            found.map(|(_, value)| *value).ok_or_else(|| {
                let (last, others) = self
                    .words()
                    .split_last()
                    .map_or(Default::default(), |(last, others)| {
                        (*last, others.join(", "))
                    });
                format!("{others} or {last}")
            })
        })
    }

    fn show(&self, value: &T) -> Value {
        let found = self.0.iter().find(|(_, other)| other == value);
        found.map(|(word, _)| *word).into()
    }
}

/// A value with a form of its own: a map, or a list that may be a word.
pub(super) struct Whole<T> {
    pub(super) placeholder: &'static str,
    pub(super) shape: Shape,
    pub(super) read: fn(&Node) -> Result<T, Bad>,
    pub(super) show: fn(&T) -> Value,
}

impl<T> Kind<T> for Whole<T> {
    fn placeholder(&self) -> String {
        self.placeholder.to_owned()
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn read(&self, node: &Node) -> Result<T, Bad> {
        (self.read)(node)
    }

    fn show(&self, value: &T) -> Value {
        (self.show)(value)
    }
}

/// Declares a struct of settings: for each field its documentation, which is the help text too, its type, its default and its kind;
/// then what is not as usual ([`Key::variable_is`], [`Key::default_is`], [`Key::reloadable`]).
macro_rules! settings {
    (
        $(#[$meta:meta])*
        $settings:ident {
            $($(#[doc = $help:literal])* $field:ident: $type:ty = $default:expr => $kind:expr $(, $option:ident($($argument:expr)?))*;)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub(crate) struct $settings {
            $($(#[doc = $help])* pub(crate) $field: $type,)*
        }

        impl Default for $settings {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl Settings for $settings {
            fn keys() -> Vec<Key<Self>> {
                let mut keys = Vec::new();
                $(
                    let field: Field<Self, $type> = (|it| &it.$field, |it| &mut it.$field);
                    let declared = $kind.keys(stringify!($field), &[$($help),*], field);
                    keys.extend(declared.into_iter()$(.map(|key| key.$option($($argument)?)))*);
                )*
                keys
            }
        }
    };
}
pub(super) use settings;
