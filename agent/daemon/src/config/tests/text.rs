//! The keys as text: what is printed, the flags, the README, the schema.

use super::*;

#[test]
fn what_is_printed_gives_the_same_configuration() {
    for yaml in [
        "",
        "name: '007'\nlog: {level: 'info,h2=warn'}\nadvertise_url: tcp://[2001:db8::1]:1\n",
        "name: 'null'\nresolver: {hosts: {a.example: '192.0.2.1:7', b.example: {registry: '2001:db8::1', proxy: gw.example}}, servers: [192.0.2.53]}\n",
        "name: '1e3'\nbpf: {interfaces: [eth0], enabled: false}\nmap_ip_file: 'a: b # c'\n",
        "name: '#x'\ntoken: {spiffe_id: 'spiffe://a/b'}\nmap_ip_file: '0x10'\n",
    ] {
        let first = World::new(yaml).load().unwrap();
        let printed = first.to_yaml();
        let second = load(&printed);
        let expected = Config {
            // Printed, it is named.
            map_ip_file: MapIpFile {
                is_required: true,
                ..first.config.map_ip_file.clone()
            },
            ..first.config.clone()
        };
        assert_eq!(second, expected, "{printed}");
    }
}

#[test]
fn a_secret_is_never_shown() {
    let loaded = World::new("token:\n  secret: hunter2\n").load().unwrap();
    let yaml = loaded.to_yaml();
    assert!(
        !yaml.contains("hunter2") && yaml.contains("hidden, from "),
        "{yaml}"
    );
    let error = World::new("token:\n  secret: [hunter2]\n").error();
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn every_key_has_its_own_flag_and_variable() {
    let mut names = std::collections::BTreeSet::new();
    for key in KEYS.iter() {
        assert!(names.insert(key.flag()), "{}", key.path);
        assert!(names.insert(key.variable()), "{}", key.path);
        assert!(
            !OTHER_VARIABLES.contains(&key.variable().as_str()),
            "{}",
            key.path
        );
    }
    <ConfigFlags as clap::Args>::augment_args(clap::Command::new("agent")).debug_assert();
}

/// With `UPDATE_README` set the table is written instead.
#[test]
fn the_readme_has_every_key() {
    const MARKS: [&str; 2] = ["<!-- keys: begin -->\n", "<!-- keys: end -->"];
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let [start, end] = MARKS.map(|mark| readme.find(mark).unwrap());
    let (start, table) = (start + MARKS[0].len(), print::to_markdown());
    if std::env::var_os("UPDATE_README").is_some() {
        let readme = format!("{}{table}{}", &readme[..start], &readme[end..]);
        std::fs::write(&path, readme).unwrap();
        return;
    }
    assert!(
        readme[start..end] == table,
        "the README's table is not that of the keys: run \
         `UPDATE_README=1 cargo test -p proxy-nsmgr the_readme_has_every_key`"
    );
}

#[test]
fn the_schema_has_every_key_with_its_default() {
    let schema: serde_json::Value = serde_json::from_str(&schema()).unwrap();
    let property = |path: &str| {
        let mut at = &schema;
        for part in path.split('.') {
            assert_eq!(at["additionalProperties"], false, "{path}");
            at = &at["properties"][part];
        }
        at
    };
    for key in KEYS.iter() {
        assert_eq!(property(&key.path)["description"], key.help, "{}", key.path);
    }
    assert_eq!(property("tunnel.port")["default"], 4789);
    assert_eq!(property("bpf.hook")["enum"][1], "tcx");
    assert!(property("name")["default"].is_null());
}
