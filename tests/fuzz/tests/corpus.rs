//! The committed inputs, replayed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use nsm_fuzz::{ALL, Target};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

fn names_in(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    entries
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.into_string().expect("a name in UTF-8"))
        .collect()
}

/// `cargo xtask fuzz` takes the names of targets from the folders.
#[test]
fn each_target_has_inputs_and_each_input_a_target() {
    let named: BTreeSet<String> = ALL.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(named.len(), ALL.len(), "two targets have one name");
    assert_eq!(names_in(&corpus()), named);
    for target in ALL {
        assert!(!names_in(&corpus().join(target.name)).is_empty());
        assert_eq!(Target::named(target.name).unwrap().name, target.name);
    }
    assert!(Target::named("nothing").is_none());
}

#[test]
fn no_committed_input_fails() {
    for target in ALL {
        let folder = corpus().join(target.name);
        for name in names_in(&folder) {
            // The name of a test's output: libtest shows it with the panic.
            println!("{}/{name}", target.name);
            (target.run)(&fs::read(folder.join(name)).unwrap());
        }
        (target.run)(&[]);
    }
}
