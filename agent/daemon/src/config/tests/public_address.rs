//! The sources of the node's public address.

use super::*;

#[test]
fn sources_of_the_public_address_have_several_forms() {
    let config = load("");
    let shown = |yaml: &str| {
        let loaded = World::new(yaml).load().unwrap();
        let text = loaded.to_yaml();
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with("metadata:"));
        line.unwrap().split(" #").next().unwrap().trim().to_owned()
    };
    assert_eq!(config.public_address.kubernetes, KubernetesApi::Auto);
    for auto in ["", "public_address: {metadata: auto}"] {
        assert_eq!(shown(auto), "metadata: auto");
    }
    for none in ["off", "'off'", "[]"] {
        assert_eq!(
            shown(&format!("public_address: {{metadata: {none}}}")),
            "metadata: []"
        );
    }
    for off in ["off", "'off'"] {
        let config = load(&format!("public_address: {{kubernetes: {off}}}"));
        assert_eq!(config.public_address.kubernetes, KubernetesApi::Off);
    }
    assert_eq!(
        shown("public_address: {metadata: 'equinix, aws=http://127.0.0.1:1/'}"),
        r#"metadata: ["equinix", "aws=http://127.0.0.1:1"]"#
    );
    let config = load(
        "public_address:\n  kubernetes: https://10.0.0.1:6443\n  node_name: node-1\n  stun: [192.0.2.1, 'stun.example:19302']\n",
    );
    assert_eq!(
        config.public_address.kubernetes.to_string(),
        "https://10.0.0.1:6443"
    );
    let stun: Vec<String> = config
        .public_address
        .stun
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(stun, ["192.0.2.1:3478", "stun.example:19302"]);
    for (yaml, expected) in [
        ("metadata: [aws, aws]", "aws once"),
        ("metadata: ibm", "aws, gcp, equinix or azure"),
        ("metadata: aws=ftp://x", "http://host"),
        ("kubernetes: maybe", "auto, off, or http://host"),
        ("node_name: a/b", "Kubernetes node"),
        ("interval: 0s", "above 0"),
        ("ip: 0.0.0.0", "one host"),
    ] {
        let error = World::new(&format!("public_address: {{{yaml}}}")).error();
        assert!(error.contains(expected), "{yaml}: {error}");
    }
}
