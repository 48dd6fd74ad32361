//! What the checks read of a source file: its paths, its functions, the lints that it allows.

use std::{collections::BTreeSet, path::Path, str::FromStr as _};

use proc_macro2::{Delimiter, Group, Ident, LexError, TokenStream, TokenTree};

/// A module, by the names on the way from the crate's root.
pub(crate) type Module = Vec<String>;

/// A source file.
#[derive(Debug, Default)]
pub(crate) struct Source {
    /// Paths that begin with `crate`, `self` or `super`, outside of test modules.
    pub(crate) paths: Vec<Vec<String>>,
    pub(crate) functions: Vec<Function>,
    /// Names of lints in `allow(…)` and `expect(…)`, without the tool's prefix.
    pub(crate) allowed: Vec<String>,
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Function {
    pub(crate) name: String,
    /// Where it begins, from 1.
    pub(crate) line: usize,
    /// From its `fn` to its last brace.
    pub(crate) lines: usize,
}

/// The module that a file below `src` is.
pub(crate) fn module_of(file: &Path) -> Module {
    let mut module: Module = file
        .with_extension("")
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if module
        .last()
        .is_some_and(|last| matches!(last.as_str(), "mod" | "lib" | "main"))
    {
        module.pop();
    }
    module
}

/// The module that a path of `module` leads to; none where that is the crate's root.
pub(crate) fn resolve(
    module: &Module,
    path: &[String],
    known: &BTreeSet<&Module>,
) -> Option<Module> {
    let (first, mut rest) = path.split_first()?;
    let mut full = match first.as_str() {
        "crate" => Module::new(),
        "super" => module[..module.len().saturating_sub(1)].to_vec(),
        _ => module.clone(),
    };
    while let Some((first, more)) = rest.split_first()
        && first == "super"
    {
        full.pop();
        rest = more;
    }
    full.extend_from_slice(rest);
    while !full.is_empty() && !known.contains(&full) {
        full.pop();
    }
    (!full.is_empty()).then_some(full)
}

impl Source {
    pub(crate) fn parse(text: &str) -> Result<Self, LexError> {
        let mut source = Self::default();
        source.read(TokenStream::from_str(text)?);
        Ok(source)
    }

    fn read(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            if let Some(behind) = test_module(&tokens, at) {
                at = behind;
                continue;
            }
            match &tokens[at] {
                TokenTree::Ident(ident) if ident == "fn" => self.read_function(&tokens, at),
                TokenTree::Ident(ident) if ident == "allow" || ident == "expect" => {
                    self.read_allowed(tokens.get(at + 1));
                }
                TokenTree::Ident(ident) if begins_path(ident) && !follows_path(&tokens, at) => {
                    self.read_path(vec![ident.to_string()], &tokens[at + 1..]);
                }
                _ => {}
            }
            if let TokenTree::Group(group) = &tokens[at] {
                self.read(group.stream());
            }
            at += 1;
        }
    }

    fn read_function(&mut self, tokens: &[TokenTree], at: usize) {
        let Some(TokenTree::Ident(name)) = tokens.get(at + 1) else {
            return;
        };
        let is_end = |token: &&TokenTree| match token {
            TokenTree::Punct(punct) => punct.as_char() == ';',
            TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
            _ => false,
        };
        if let Some(TokenTree::Group(body)) = tokens[at..].iter().find(is_end) {
            let line = tokens[at].span().start().line;
            self.functions.push(Function {
                name: name.to_string(),
                line,
                lines: body.span_close().end().line + 1 - line,
            });
        }
    }

    fn read_allowed(&mut self, list: Option<&TokenTree>) {
        if let Some(TokenTree::Group(list)) = list {
            let idents = list.stream().into_iter().filter_map(|token| match token {
                TokenTree::Ident(ident) => Some(ident.to_string()),
                _ => None,
            });
            self.allowed.extend(idents);
        }
    }

    /// Reads on behind the names in `path`; of a group in braces each path.
    fn read_path(&mut self, mut path: Vec<String>, tokens: &[TokenTree]) {
        let mut rest = tokens;
        while let [
            TokenTree::Punct(one),
            TokenTree::Punct(two),
            next,
            more @ ..,
        ] = rest
            && one.as_char() == ':'
            && two.as_char() == ':'
        {
            match next {
                TokenTree::Ident(ident) => path.push(ident.to_string()),
                TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
                    self.read_group(&path, group);
                    return;
                }
                _ => break,
            }
            rest = more;
        }
        if path.len() > 1 {
            self.paths.push(path);
        }
    }

    /// Reads `{a::b, c}` behind `path::`.
    fn read_group(&mut self, path: &[String], group: &Group) {
        let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
        let is_comma =
            |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ',');
        for item in tokens.split(is_comma) {
            if let Some((TokenTree::Ident(first), more)) = item.split_first() {
                let mut path = path.to_vec();
                if first != "self" {
                    path.push(first.to_string());
                }
                self.read_path(path, more);
            }
        }
    }
}

/// Whether a path within the crate can begin with the name.
fn begins_path(ident: &Ident) -> bool {
    ident == "crate" || ident == "self" || ident == "super"
}

/// Whether the token continues a path (`a::self`, `pub(crate)` does not).
fn follows_path(tokens: &[TokenTree], at: usize) -> bool {
    at > 0
        && matches!(&tokens[at - 1], TokenTree::Punct(punct) if punct.as_char() == ':')
        && at > 1
        && matches!(&tokens[at - 2], TokenTree::Punct(punct) if punct.as_char() == ':')
}

/// Where what follows `#[cfg(test)] mod NAME { … }` begins, when that is what begins at `at`.
fn test_module(tokens: &[TokenTree], at: usize) -> Option<usize> {
    let [
        TokenTree::Punct(hash),
        TokenTree::Group(attribute),
        TokenTree::Ident(keyword),
        _,
        TokenTree::Group(body),
        ..,
    ] = tokens.get(at..)?
    else {
        return None;
    };
    let is_test =
        hash.as_char() == '#' && attribute.stream().to_string().replace(' ', "") == "cfg(test)";
    (is_test && keyword == "mod" && body.delimiter() == Delimiter::Brace).then_some(at + 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(text: &str) -> Vec<String> {
        let source = Source::parse(text).unwrap();
        source.paths.iter().map(|path| path.join("::")).collect()
    }

    #[test]
    fn paths_are_found_in_use_in_code_and_in_macros() {
        let text = "use crate::{a::{B, self}, c::D as E}; pub(crate) fn f(self) -> super::G { m!(crate::h::I) }";
        assert_eq!(
            paths(text),
            [
                "crate::a::B",
                "crate::a",
                "crate::c::D",
                "super::G",
                "crate::h::I"
            ]
        );
        assert!(paths("#[cfg(test)] mod tests { use super::*; use crate::a::B; }").is_empty());
        assert_eq!(paths("mod inner { use crate::a::B; }"), ["crate::a::B"]);
        assert!(
            paths("/// [`crate::a::B`]\nstruct S;").is_empty(),
            "links in docs import nothing"
        );
    }

    #[test]
    fn functions_have_their_lines() {
        let source =
            Source::parse("trait T { fn f(); }\n\nfn long(\n) {\n    one();\n}\nfn short() {}")
                .unwrap();
        let found: Vec<_> = source
            .functions
            .iter()
            .map(|it| (it.name.as_str(), it.line, it.lines))
            .collect();
        assert_eq!(found, [("long", 3, 4), ("short", 7, 1)]);
    }

    #[test]
    fn allowed_lints_are_found() {
        let source =
            Source::parse("#[expect(clippy::too_many_arguments, reason = \"x\")] fn f() {}")
                .unwrap();
        assert!(
            source
                .allowed
                .iter()
                .any(|lint| lint == "too_many_arguments")
        );
    }

    #[test]
    fn paths_lead_to_modules() {
        let module = |text: &str| -> Module { text.split("::").map(str::to_owned).collect() };
        let all = [module("a"), module("a::b"), module("c")];
        let known: BTreeSet<&Module> = all.iter().collect();
        let resolved = |from: &str, path: &str| resolve(&module(from), &module(path), &known);
        assert_eq!(resolved("a::b", "crate::c::Type"), Some(module("c")));
        assert_eq!(resolved("a::b", "super::Type"), Some(module("a")));
        assert_eq!(resolved("a::b", "super::super::c::Type"), Some(module("c")));
        assert_eq!(resolved("a", "self::b::Type"), Some(module("a::b")));
        assert_eq!(resolved("a", "crate::Type"), None);
    }
}
