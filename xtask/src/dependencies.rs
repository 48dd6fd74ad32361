//! Who may import whom: the dependency rules of ARCHITECTURE.md, checked on what cargo says, not on what files look like.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::cargo::{BPF_PROGRAMS, cargo};

/// What a crate of ours may import of ours, and nothing else. Tests may import more: see [`Rule::tests`].
struct Rule {
    package: &'static str,
    /// Crates of ours that it may depend on.
    imports: &'static [&'static str],
    /// Crates of ours that its tests may use besides.
    tests: &'static [&'static str],
    /// Crates of others that it must not reach, not even through others: what would make it impure or slow to build.
    banned: &'static [&'static str],
}

const fn rule(
    package: &'static str,
    imports: &'static [&'static str],
    tests: &'static [&'static str],
    banned: &'static [&'static str],
) -> Rule {
    Rule {
        package,
        imports,
        tests,
        banned,
    }
}

/// Decisions take their inputs and `now` as parameters; with any of these in reach they could fetch them by themselves.
const IMPURE: &[&str] = &[
    "aya",
    "hickory-resolver",
    "mio",
    "netlink-sys",
    "nix",
    "rtnetlink",
    "socket2",
    "tokio",
    "tonic",
];

const RULES: &[Rule] = &[
    rule("nsm-core", &["nsm-ebpf-common"], &[], IMPURE),
    rule("nsm-proto", &[], &[], &[]),
    rule("nsm-ebpf-common", &[], &[], &["tokio", "tonic"]),
    rule(
        "nsm-dataplane",
        &["nsm-core", "nsm-ebpf-common"],
        &["nsm-world"],
        &["tonic"],
    ),
    rule(
        "nsm-discovery",
        &["nsm-core"],
        &[],
        &["aya", "netlink-packet-route", "rtnetlink", "tonic"],
    ),
    rule(
        "nsm-controlplane",
        &["nsm-core", "nsm-discovery", "nsm-proto"],
        &["nsm-spiffe", "nsm-world"],
        &["aya", "netlink-packet-route", "rtnetlink"],
    ),
    rule(
        "proxy-nsmgr",
        &[
            "nsm-controlplane",
            "nsm-core",
            "nsm-dataplane",
            "nsm-discovery",
            "nsm-ebpf-common",
            "nsm-proto",
        ],
        &["nsm-spiffe", "nsm-world"],
        &[],
    ),
    rule("nsm-ebpf-programs", &["nsm-ebpf-common"], &[], &["tokio"]),
    // Every command waits for it to compile.
    rule(
        "xtask",
        &["nsm-ebpf-common", "nsm-stats", "nsm-world"],
        &[],
        &["tokio", "tonic"],
    ),
    rule("nsm-spiffe", &["nsm-proto"], &[], &["aya"]),
    rule("nsm-stats", &[], &[], IMPURE),
    rule("nsm-world", &[], &[], &["tokio"]),
    rule("nsm-world-dns", &[], &[], &[]),
    rule(
        "nsm-e2e",
        &[
            "nsm-core",
            "nsm-ebpf-common",
            "nsm-proto",
            "nsm-spiffe",
            "nsm-world",
        ],
        &[],
        &[],
    ),
    rule(
        "nsm-fuzz",
        &[
            "nsm-controlplane",
            "nsm-core",
            "nsm-discovery",
            "nsm-ebpf-common",
            "nsm-ebpf-programs",
            "nsm-proto",
            "proxy-nsmgr",
        ],
        &[],
        &[],
    ),
    rule(
        "nsm-load",
        &["nsm-controlplane", "nsm-core", "nsm-proto", "nsm-stats"],
        &[],
        &[],
    ),
];

/// Checks both workspaces.
///
/// # Errors
/// When a rule is violated; all violations are in the error.
pub(crate) fn check() -> Result<()> {
    let mut violations = Vec::new();
    for manifest in ["Cargo.toml", BPF_PROGRAMS] {
        let mut command = cargo(&[
            "metadata",
            "--locked",
            "--format-version=1",
            "--manifest-path",
            manifest,
        ]);
        let output = command.output().context("cannot start cargo metadata")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "cargo metadata of {manifest} failed: {}",
            said.trim()
        );
        let metadata =
            serde_json::from_slice(&output.stdout).context("cargo metadata is no JSON")?;
        violations.extend(Graph::parse(&metadata)?.violations(RULES));
    }
    ensure!(
        violations.is_empty(),
        "dependency rules are violated:\n  {}",
        violations.join("\n  ")
    );
    eprintln!("    dependency rules hold");
    Ok(())
}

/// Packages and what they depend on, by package id.
struct Graph {
    names: BTreeMap<String, String>,
    /// Packages of the workspace.
    members: BTreeSet<String>,
    /// Packages that lie in our tree, members or not (the BPF workspace uses `ebpf/common` of ours).
    ours: BTreeSet<String>,
    edges: BTreeMap<String, Vec<Edge>>,
}

struct Edge {
    to: String,
    /// Whether it is for tests only.
    dev: bool,
    /// Whether it is there only with a feature of the depending package.
    optional: bool,
    /// Whether the depending package asks for features of the other.
    with_features: bool,
}

impl Graph {
    fn parse(metadata: &Value) -> Result<Self> {
        let list = |value: &Value, what: &str| {
            value
                .as_array()
                .cloned()
                .with_context(|| format!("cargo metadata has no {what}"))
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut graph = Self {
            names: BTreeMap::new(),
            members: list(&metadata["workspace_members"], "workspace_members")?
                .iter()
                .map(text)
                .collect(),
            ours: BTreeSet::new(),
            edges: BTreeMap::new(),
        };
        // As the manifests have them: by package id and name of the dependency.
        let mut declared = BTreeMap::new();
        for package in list(&metadata["packages"], "packages")? {
            let id = text(&package["id"]);
            for dependency in package["dependencies"].as_array().into_iter().flatten() {
                if dependency["kind"].is_null() {
                    let features = dependency["features"].as_array();
                    let with_features = features.is_some_and(|features| !features.is_empty());
                    let optional = dependency["optional"] == true;
                    let key = (id.clone(), text(&dependency["name"]));
                    declared.insert(key, (optional, with_features));
                }
            }
            // Path dependencies have no source.
            if package["source"].is_null() {
                graph.ours.insert(id.clone());
            }
            graph.names.insert(id, text(&package["name"]));
        }
        for node in list(&metadata["resolve"]["nodes"], "resolved dependencies")? {
            let mut edges = Vec::new();
            let from = text(&node["id"]);
            for dependency in list(&node["deps"], "dependencies")? {
                let kinds = list(&dependency["dep_kinds"], "kinds of dependencies")?;
                let dev = kinds.iter().all(|kind| kind["kind"] == "dev");
                // What only builds (`build.rs`) does not end up in the crate.
                if kinds.iter().all(|kind| kind["kind"] == "build") {
                    continue;
                }
                let to = text(&dependency["pkg"]);
                let key = (from.clone(), graph.name(&to).to_owned());
                let (optional, with_features) = declared.get(&key).copied().unwrap_or_default();
                edges.push(Edge {
                    to,
                    dev,
                    optional,
                    with_features,
                });
            }
            graph.edges.insert(from, edges);
        }
        Ok(graph)
    }

    /// Every violation of `rules`, as sentences.
    fn violations(&self, rules: &[Rule]) -> Vec<String> {
        self.members
            .iter()
            .flat_map(|id| self.violations_of(id, rules))
            .collect()
    }

    fn violations_of(&self, id: &str, rules: &[Rule]) -> Vec<String> {
        let name = self.name(id);
        let Some(rule) = rules.iter().find(|rule| rule.package == name) else {
            return vec![format!(
                "{name} has no rule: say in xtask/src/dependencies.rs what it may import"
            )];
        };
        let mut violations = Vec::new();
        for edge in self
            .edges(id)
            .iter()
            .filter(|edge| self.ours.contains(&edge.to))
        {
            let other = self.name(&edge.to);
            let allowed = rule.imports.contains(&other) || edge.dev && rule.tests.contains(&other);
            if !allowed {
                let how = if edge.dev {
                    "imports in its tests"
                } else {
                    "imports"
                };
                violations.push(format!("{name} {how} {other}, which it must not"));
            }
        }
        for way in self.ways(id) {
            let reached = *way.last().expect("a way has its start");
            if rule.banned.contains(&reached) {
                violations.push(format!(
                    "{name} must not reach {reached}: {}",
                    way.join(" → ")
                ));
            }
        }
        violations
    }

    /// A shortest way to each package that `start` reaches without its own or others' tests, as names.
    ///
    /// cargo resolves the features of a whole workspace at once. An optional dependency of a crate of ours therefore counts only on a
    /// way whose step to that crate asks for features of it.
    fn ways(&self, start: &str) -> Vec<Vec<&str>> {
        let mut seen = BTreeSet::from([(start, true)]);
        let mut ways = Vec::new();
        let mut frontier = vec![(start, true, vec![self.name(start)])];
        while !frontier.is_empty() {
            let mut next = Vec::new();
            for (id, with_features, way) in frontier {
                let counts = |edge: &&Edge| {
                    !edge.dev && (!edge.optional || with_features || !self.ours.contains(id))
                };
                for edge in self.edges(id).iter().filter(counts) {
                    if seen.insert((&edge.to, edge.with_features)) {
                        let longer = [way.as_slice(), &[self.name(&edge.to)]].concat();
                        next.push((edge.to.as_str(), edge.with_features, longer.clone()));
                        ways.push(longer);
                    }
                }
            }
            frontier = next;
        }
        ways
    }

    fn name(&self, id: &str) -> &str {
        self.names.get(id).map_or("?", String::as_str)
    }

    fn edges(&self, id: &str) -> &[Edge] {
        self.edges.get(id).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A graph as cargo tells it; members are those whose names start with `our-`.
    fn graph(edges: &[(&str, &str, Option<&str>)]) -> Graph {
        let names: BTreeSet<&str> = edges
            .iter()
            .flat_map(|(from, to, _)| [*from, *to])
            .collect();
        let ours = |name: &&&str| name.starts_with("our-");
        let source = |name: &str| (!name.starts_with("our-")).then_some("registry");
        let packages: Vec<_> = names
            .iter()
            .map(|name| json!({"id": name, "name": name, "source": source(name)}))
            .collect();
        let dependencies = |name: &str| -> Vec<Value> {
            let of = edges.iter().filter(|(from, _, _)| *from == name);
            of.map(|(_, to, kind)| json!({"pkg": to, "dep_kinds": [{"kind": kind}]}))
                .collect()
        };
        let nodes: Vec<_> = names
            .iter()
            .map(|name| json!({"id": name, "deps": dependencies(name)}))
            .collect();
        let members: Vec<_> = names.iter().filter(ours).collect();
        let metadata = json!({"workspace_members": members, "packages": packages, "resolve": {"nodes": nodes}});
        Graph::parse(&metadata).unwrap()
    }

    const SMALL: &[Rule] = &[
        rule("our-core", &[], &[], &["tokio"]),
        rule("our-left", &["our-core"], &["our-world"], &[]),
        rule("our-right", &["our-core"], &[], &[]),
        rule("our-world", &[], &[], &[]),
    ];

    /// A format crate whose optional `tokio` a dataplane asks for and a core does not.
    #[test]
    fn an_optional_dependency_counts_where_its_feature_is_asked_for() {
        let metadata = |features: Value| {
            let on_common = json!([{"name": "our-world", "kind": null, "features": features}]);
            json!({
                "workspace_members": ["our-core", "our-world"],
                "packages": [
                    {"id": "our-core", "name": "our-core", "dependencies": on_common},
                    {"id": "our-world", "name": "our-world", "dependencies":
                        [{"name": "tokio", "kind": null, "optional": true}]},
                    {"id": "tokio", "name": "tokio", "source": "registry"},
                ],
                "resolve": {"nodes": [
                    {"id": "our-core", "deps": [{"pkg": "our-world", "dep_kinds": [{"kind": null}]}]},
                    {"id": "our-world", "deps": [{"pkg": "tokio", "dep_kinds": [{"kind": null}]}]},
                    {"id": "tokio", "deps": []},
                ]},
            })
        };
        let rules = [
            rule("our-core", &["our-world"], &[], &["tokio"]),
            rule("our-world", &[], &[], &[]),
        ];
        let violations = |features| {
            Graph::parse(&metadata(features))
                .unwrap()
                .violations(&rules)
        };
        assert_eq!(violations(json!([])), Vec::<String>::new());
        assert_eq!(violations(json!(["user"])).len(), 1);
    }

    #[test]
    fn a_graph_within_the_rules_passes() {
        let fine = graph(&[
            ("our-left", "our-core", None),
            ("our-left", "our-world", Some("dev")),
            ("our-left", "tokio", None),
            ("our-right", "our-core", None),
            ("our-core", "serde", None),
            ("our-core", "tokio", Some("dev")),
            ("our-core", "tokio-build", Some("build")),
        ]);
        assert_eq!(fine.violations(SMALL), Vec::<String>::new());
    }

    #[test]
    fn a_forbidden_import_is_found_in_code_and_in_tests() {
        let siblings = graph(&[("our-left", "our-right", None)]);
        assert_eq!(
            siblings.violations(SMALL),
            ["our-left imports our-right, which it must not"]
        );
        let in_tests = graph(&[("our-left", "our-right", Some("dev"))]);
        assert_eq!(
            in_tests.violations(SMALL),
            ["our-left imports in its tests our-right, which it must not"]
        );
        let test_only = graph(&[("our-left", "our-world", None)]);
        assert_eq!(
            test_only.violations(SMALL).len(),
            1,
            "allowed in tests only"
        );
    }

    #[test]
    fn a_banned_crate_is_found_behind_another() {
        let hidden = graph(&[
            ("our-core", "serde", None),
            ("serde", "mid", None),
            ("mid", "tokio", None),
        ]);
        assert_eq!(
            hidden.violations(SMALL),
            ["our-core must not reach tokio: our-core → serde → mid → tokio"]
        );
    }

    #[test]
    fn a_crate_without_a_rule_is_found() {
        let fresh = graph(&[("our-new-crate", "serde", None)]);
        assert!(fresh.violations(SMALL)[0].contains("has no rule"));
    }

    #[test]
    fn the_two_planes_never_import_each_other() {
        let importing = |package: &str| {
            let rule = RULES.iter().find(|rule| rule.package == package).unwrap();
            [rule.imports, rule.tests].concat()
        };
        assert!(!importing("nsm-dataplane").contains(&"nsm-controlplane"));
        assert!(!importing("nsm-controlplane").contains(&"nsm-dataplane"));
    }
}
