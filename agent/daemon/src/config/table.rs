//! What a key is: its names, its kind of value, and its place in [`Config`].
//!
//! [`settings!`] makes a struct and its keys out of one declaration. A [`Kind`] defines how a value of a type is read, shown and
//! described.
//!
//! [`Config`]: super::Config

use serde_json::Value;

use super::node::{Bad, Node};

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

/// Reads a value from its node.
type Read<T> = Box<dyn Fn(&Node) -> Result<T, Bad> + Send + Sync>;

/// How values of the type `T` are read and shown.
pub(super) struct Kind<T> {
    placeholder: String,
    shape: Shape,
    is_secret: bool,
    read: Read<T>,
    show: Box<dyn Fn(&T) -> Value + Send + Sync>,
}

impl<T: 'static> Kind<T> {
    /// A kind with a form of its own.
    pub(super) fn new(
        placeholder: impl Into<String>,
        shape: Shape,
        read: impl Fn(&Node) -> Result<T, Bad> + Send + Sync + 'static,
        show: impl Fn(&T) -> Value + Send + Sync + 'static,
    ) -> Self {
        Self {
            placeholder: placeholder.into(),
            shape,
            is_secret: false,
            read: Box::new(read),
            show: Box::new(show),
        }
    }

    /// A kind of single value; `parse` gives the value, or what is allowed.
    pub(super) fn one<E: ToString, V: Into<Value>>(
        placeholder: &str,
        shape: Shape,
        parse: impl Fn(&str) -> Result<T, E> + Send + Sync + 'static,
        show: impl Fn(&T) -> V + Send + Sync + 'static,
    ) -> Self {
        let read = move |node: &Node| node.parse(&parse);
        Self::new(placeholder, shape, read, move |value| show(value).into())
    }

    /// The same, or nothing.
    pub(super) fn optional(self) -> Kind<Option<T>> {
        let Self { read, show, .. } = self;
        let show = move |value: &Option<T>| value.as_ref().map_or(Value::Null, &show);
        Kind::new(
            self.placeholder,
            self.shape,
            move |node| read(node).map(Some),
            show,
        )
    }

    /// A list of the same.
    pub(super) fn list(self) -> Kind<Vec<T>> {
        let Self { read, show, .. } = self;
        let show = move |values: &Vec<T>| values.iter().map(&show).collect();
        let placeholder = format!("{},…", self.placeholder);
        Kind::new(placeholder, Shape::List, move |node| node.list(&read), show)
    }

    /// The same in another type.
    pub(super) fn map<U: 'static>(self, to: fn(T) -> U, from: fn(&U) -> &T) -> Kind<U> {
        let Self { read, show, .. } = self;
        let show = move |value: &U| show(from(value));
        Kind::new(
            self.placeholder,
            self.shape,
            move |node| read(node).map(to),
            show,
        )
    }

    /// The same, left out of messages and of what is printed.
    pub(super) fn secret(mut self) -> Self {
        self.is_secret = true;
        self
    }

    /// The key of a field.
    pub(super) fn keys<C: 'static>(
        self,
        name: &str,
        help: &[&str],
        (get, get_mut): Field<C, T>,
    ) -> [Key<C>; 1] {
        let help: Vec<_> = help.iter().map(|line| line.trim()).collect();
        let Self {
            read,
            show,
            is_secret,
            ..
        } = self;
        [Key {
            path: name.to_owned(),
            variable: None,
            default: None,
            placeholder: self.placeholder,
            help: help.join(" "),
            reloads: false,
            is_secret,
            shape: self.shape,
            apply: Box::new(move |settings, node| {
                *get_mut(settings) = read(node).map_err(|bad| match is_secret {
                    true => bad.without_value(),
                    false => bad,
                })?;
                Ok(())
            }),
            show: Box::new(move |settings| show(get(settings))),
        }]
    }
}

/// A struct of settings.
pub(super) trait Settings: Default {
    /// The keys of its fields, in the order of their declaration.
    fn keys() -> Vec<Key<Self>>;
}

/// Where a field of `C` is.
pub(super) type Field<C, T> = (fn(&C) -> &T, fn(&mut C) -> &mut T);

/// A field that holds [`Settings`]: their keys stand below its name.
pub(super) struct Section;

impl Section {
    pub(super) fn keys<C: 'static, T: Settings + 'static>(
        self,
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
