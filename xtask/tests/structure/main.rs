//! The structure of the agent's source: rooms import downwards, a function is a page, a file is one thing.
//!
//! A room is a module right below a crate's root. The check reads tokens: paths that begin with `crate`, `self` or `super`, in code and
//! inside macros. Test modules are left out. A path that reaches an item by a re-export counts for the module that re-exports it.

mod circles;
mod source;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use source::{Module, Source};

/// Crates whose modules must not import each other in circles.
const CRATES: &[&str] = &[
    "agent/core",
    "agent/discovery",
    "agent/controlplane",
    "agent/dataplane",
    "agent/daemon",
    "ebpf/common",
    "xtask",
];

/// A function longer than a screen is a list of steps that want names.
const FUNCTION_LINES: usize = 80;

/// A longer file holds two things.
const FILE_LINES: usize = 600;

/// Lints whose exemption hides what the checks here are about.
const NOT_ALLOWED: &[&str] = &["too_many_arguments", "too_many_lines"];

fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().expect("xtask lies in the root").to_owned()
}

/// Every `.rs` file below `folder`, sorted.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
    {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The modules of a crate, without those of tests.
fn modules_of(krate: &str) -> BTreeMap<Module, (PathBuf, Source)> {
    let src = root().join(krate).join("src");
    let mut modules = BTreeMap::new();
    for file in files_below(&src) {
        let relative = file.strip_prefix(&src).expect("below src");
        let module = source::module_of(relative);
        if module.iter().any(|part| part == "tests") {
            continue;
        }
        let text = fs::read_to_string(&file).expect("a readable file");
        let parsed =
            Source::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        modules.insert(module, (file, parsed));
    }
    modules
}

/// Which module imports which. A module and one below it are one house: each may name the other's items.
fn imports(modules: &BTreeMap<Module, (PathBuf, Source)>) -> BTreeMap<Module, BTreeSet<Module>> {
    let known: BTreeSet<&Module> = modules.keys().collect();
    let mut arrows: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
    for (module, (_, source)) in modules {
        for path in &source.paths {
            let Some(to) = source::resolve(module, path, &known) else {
                continue;
            };
            if !to.starts_with(module) && !module.starts_with(&to) {
                arrows.entry(module.clone()).or_default().insert(to);
            }
        }
    }
    arrows
}

/// The arrows between rooms, of those between files.
fn between_rooms(files: &BTreeMap<Module, BTreeSet<Module>>) -> BTreeMap<Module, BTreeSet<Module>> {
    let mut rooms: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
    for (from, targets) in files {
        for to in targets {
            if let ([from, ..], [to, ..]) = (from.as_slice(), to.as_slice())
                && from != to
            {
                rooms
                    .entry(vec![from.clone()])
                    .or_default()
                    .insert(vec![to.clone()]);
            }
        }
    }
    rooms
}

#[test]
fn no_modules_import_each_other_in_a_circle() {
    let mut found = Vec::new();
    for krate in CRATES {
        let files = imports(&modules_of(krate));
        for (what, arrows) in [("rooms", between_rooms(&files)), ("files", files)] {
            for circle in circles::of(&arrows) {
                let names: Vec<String> = circle.iter().map(|module| module.join("/")).collect();
                found.push(format!("{krate}: circle of {what}: {}", names.join(", ")));
            }
        }
    }
    assert!(
        found.is_empty(),
        "move the shared type below its users, or pass the part instead of the whole:\n{}",
        found.join("\n")
    );
}

#[test]
fn functions_are_pages() {
    let mut found = Vec::new();
    for krate in CRATES {
        // Tests may hold tables of any length.
        for (file, source) in modules_of(krate).values() {
            for function in source
                .functions
                .iter()
                .filter(|function| function.lines > FUNCTION_LINES)
            {
                found.push(format!(
                    "{}:{}: fn {} has {} lines, {FUNCTION_LINES} at most",
                    file.display(),
                    function.line,
                    function.name,
                    function.lines
                ));
            }
            for lint in source
                .allowed
                .iter()
                .filter(|lint| NOT_ALLOWED.contains(&lint.as_str()))
            {
                found.push(format!(
                    "{}: allows {lint}: arguments that travel together are a type",
                    file.display()
                ));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn files_hold_one_thing() {
    let mut found = Vec::new();
    for krate in CRATES {
        for file in files_below(&root().join(krate)) {
            let lines = fs::read_to_string(&file)
                .expect("a readable file")
                .lines()
                .count();
            if lines > FILE_LINES {
                found.push(format!(
                    "{}: {lines} lines, {FILE_LINES} at most",
                    file.display()
                ));
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}
