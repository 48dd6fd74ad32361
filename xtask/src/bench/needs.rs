//! What the parts need: declared by each, and seen to for all of them before anything is measured.

use std::{collections::BTreeSet, fs};

use anyhow::{Context as _, Result, ensure};

use super::{
    Part,
    programs::{Built, Program, WORLD},
};
use crate::{
    cargo::Tree,
    interop::Go,
    packages::{self, Tool},
};

/// What one part needs.
struct Needs {
    /// To make network namespaces, links and BPF programs.
    root: bool,
    tools: &'static [&'static [Tool]],
    programs: &'static [Program],
    /// A Go toolchain, and the Go tests compiled with all that they import.
    go: bool,
}

fn needs(part: Part) -> Needs {
    let world = Needs {
        root: true,
        tools: &[packages::DEMO],
        programs: WORLD,
        go: false,
    };
    match part {
        Part::Core => Needs {
            root: false,
            tools: &[],
            programs: &[Program::Decisions],
            go: false,
        },
        Part::Bpf => Needs {
            programs: &[Program::BpfCost],
            ..world
        },
        Part::Setup | Part::Proxy | Part::Memory => world,
        Part::Throughput => Needs {
            tools: &[packages::DEMO, packages::THROUGHPUT],
            ..world
        },
        Part::Interop => Needs {
            root: false,
            tools: &[],
            programs: WORLD,
            go: true,
        },
        Part::Health => Needs {
            tools: &[packages::DEMO, packages::THROUGHPUT, packages::MAPS],
            programs: &[
                Program::Agent,
                Program::Dns,
                Program::Load,
                Program::HealthCost,
            ],
            ..world
        },
    }
}

/// The parts that have all they need, and those that cannot be measured here.
#[derive(Default)]
pub(super) struct Prepared {
    pub(super) ready: Vec<Part>,
    pub(super) refused: Vec<(Part, anyhow::Error)>,
    pub(super) built: Built,
    pub(super) go: Option<Go>,
}

/// Installs, checks and builds for `parts`. One that lacks something is said at once, and the others go on without it.
///
/// # Errors
/// When programs cannot be built.
pub(super) fn prepare(parts: &[Part]) -> Result<Prepared> {
    let mut prepared = Prepared::default();
    for &part in parts {
        match check(part, &mut prepared.go) {
            Ok(()) => prepared.ready.push(part),
            Err(error) => {
                eprintln!("==> {} cannot be measured: {error:#}", part.name());
                prepared.refused.push((part, error));
            }
        }
    }
    let wanted = programs(&prepared.ready);
    eprintln!("==> building {}", names(&wanted));
    prepared.built = Built::build(&Tree::present(), &wanted)?;
    Ok(prepared)
}

/// The programs of these parts.
pub(super) fn programs(parts: &[Part]) -> BTreeSet<Program> {
    let all = parts.iter().flat_map(|&part| needs(part).programs);
    all.copied().collect()
}

pub(super) fn names(programs: &BTreeSet<Program>) -> String {
    let names: Vec<_> = programs.iter().map(|program| program.name()).collect();
    names.join(", ")
}

fn check(part: Part, go: &mut Option<Go>) -> Result<()> {
    let needs = needs(part);
    if needs.root {
        ensure!(
            packages::is_root(),
            "it makes network namespaces: run it as root (sudo -E env PATH=$PATH cargo xtask bench)"
        );
        let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
        let lacks = lacks(&status)?;
        ensure!(
            lacks.is_empty(),
            "root lacks {} here: allow it to this container",
            lacks.join(", ")
        );
    }
    for tools in needs.tools {
        packages::ensure(tools)?;
    }
    if needs.go {
        *go = Some(compiled_go()?);
    }
    Ok(())
}

/// Go, with the tests that measure compiled and all that they import downloaded.
fn compiled_go() -> Result<Go> {
    let go = Go::find()?;
    let output = go
        .command(&["test", "-c", "-o", "/dev/null", "./sidebyside"])
        .output()
        .context("cannot start go test")?;
    ensure!(
        output.status.success(),
        "the Go tests do not compile: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(go)
}

/// What making namespaces, links and BPF programs takes, with the bits of capabilities(7).
const CAPABILITIES: [(&str, u32); 4] = [
    ("CAP_NET_ADMIN", 12),
    ("CAP_SYS_ADMIN", 21),
    ("CAP_PERFMON", 38),
    ("CAP_BPF", 39),
];

/// The capabilities that a process does not have, from its /proc/PID/status.
fn lacks(status: &str) -> Result<Vec<&'static str>> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    let effective = effective.context("/proc/self/status has no CapEff")?;
    let lacking = CAPABILITIES
        .iter()
        .filter(|(_, bit)| effective >> bit & 1 == 0);
    Ok(lacking.map(|(name, _)| *name).collect())
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn capabilities_that_lack_are_named() {
        let of = |bits: &str| lacks(&format!("Name:\tx\nCapEff:\t{bits}\n")).unwrap();
        assert!(of("000001ffffffffff").is_empty());
        assert_eq!(of("00000000a80425fb").len(), 4);
        assert_eq!(of("000000ffffdfffff"), ["CAP_SYS_ADMIN"]);
        assert!(lacks("Name:\tx\n").is_err());
    }

    #[test]
    fn what_a_part_does_to_maps_and_links_it_has_the_tools_for() {
        let has = |part, tools: &[Tool]| needs(part).tools.contains(&tools);
        // Tunnels are lost by bpftool, after minutes of other measurements.
        assert!(has(Part::Health, packages::MAPS));
        for part in [Part::Health, Part::Throughput] {
            assert!(has(part, packages::THROUGHPUT), "{part:?}");
        }
        for &part in Part::value_variants() {
            let needs = needs(part);
            assert!(!needs.programs.is_empty(), "{part:?}");
            assert_eq!(needs.root, has(part, packages::DEMO), "{part:?}");
        }
    }
}
