//! Exit codes and messages of command lines that cannot work, and the configuration as printed.

use crate::support::{run, soon};

#[tokio::test]
async fn a_wrong_word_is_a_usage_error() {
    for words in [
        &["connect", "a@", "--netns", "1"][..],
        &[
            "connect",
            "a",
            "--netns",
            "1",
            "--interface",
            "interface-too-long",
        ],
        &["endpoint", "--service", "a", "--cidr", "x", "--netns", "1"],
        &["status", "--bogus"],
        &["agent", "--bogus"],
        &[],
    ] {
        let (code, out, error) = run(words).await;
        assert_eq!(code, 2, "{words:?}: {error}");
        assert_eq!(out, "");
        assert!(error.contains("--help"), "{words:?}: {error}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_a_failure_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = format!("unix://{}/nsm.sock", dir.path().display());
    let netns = "/proc/self/ns/net";
    let cidr = "172.16.1.0/24";
    let config = dir.path().join("config.yaml");
    std::fs::write(&config, "tunel:\n  port: 1\nname: a@b\n").unwrap();
    for (words, reason) in [
        (
            &["connect", "a", "--netns", netns, "--connect-to", &nowhere][..],
            "is the agent running",
        ),
        (
            &["connect", "a", "--netns", "/etc/passwd"],
            "is no network namespace",
        ),
        (&["connect", "a", "--netns", "/nowhere"], "No such file"),
        (
            &["connect", "a", "--netns", "4294967295"],
            "/proc/4294967295/ns/net",
        ),
        (
            &[
                "endpoint",
                "--service",
                "a",
                "--cidr",
                "172.16.1.1/32",
                "--netns",
                netns,
            ],
            "172.16.1.1/32",
        ),
        (
            &[
                "endpoint",
                "--service",
                "a",
                "--cidr",
                cidr,
                "--cidr",
                cidr,
                "--netns",
                netns,
            ],
            "overlap",
        ),
        (
            &[
                "endpoint",
                "--service",
                "a",
                "--cidr",
                cidr,
                "--netns",
                netns,
                "--connect-to",
                &nowhere,
            ],
            &nowhere,
        ),
        (&["status", "--admin", &nowhere], "no agent is running"),
        (&["agent", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (
            &["agent", "--config", config.to_str().unwrap()],
            "config.yaml:1: tunel: no such key",
        ),
        (
            &["agent", "--tunnel-port", "x"],
            "--tunnel-port: tunnel.port: \"x\" is not allowed",
        ),
    ] {
        let (code, out, error) = run(words).await;
        assert_eq!(code, 1, "{words:?}: {error}");
        assert_eq!(out, "", "{words:?}");
        assert!(
            error.starts_with("proxy-nsmgr: ") && error.contains(reason),
            "{words:?}: {error}"
        );
    }
}

#[tokio::test]
async fn the_configuration_in_force_is_printed_and_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.yaml");
    std::fs::write(&config, "domain: cluster-1.example\n").unwrap();
    let config = config.to_str().unwrap();
    let print = async |more: &[&str]| {
        let mut words = vec!["agent", "--print-config", "--config", config];
        words.extend(more);
        let (code, out, error) = run(&words).await;
        assert_eq!((code, error.as_str()), (0, ""));
        out
    };
    let first = print(&["--name", "node-1", "--tunnel-port", "14789"]).await;
    assert!(
        first.contains("domain: cluster-1.example") && first.contains("config.yaml:1"),
        "{first}"
    );
    assert!(first.contains("# --tunnel-port"), "{first}");
    std::fs::write(config, &first).unwrap();
    let values = |yaml: &str| -> Vec<String> {
        let values = yaml
            .lines()
            .map(|line| line.split(" # ").next().unwrap().trim_end());
        values.map(str::to_owned).collect()
    };
    assert_eq!(values(&print(&[]).await), values(&first));
}

#[tokio::test]
async fn the_version_is_told() {
    let (code, out, _) = soon("the version", run(&["--version"])).await;
    assert_eq!(code, 0);
    assert_eq!(
        out.trim(),
        format!("proxy-nsmgr {}", env!("CARGO_PKG_VERSION"))
    );
}
