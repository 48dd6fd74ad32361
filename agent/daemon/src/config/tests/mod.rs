use std::time::Duration;

use nsm_controlplane::liveness::Reachability;

use super::{keys::Token, *};

mod public_address;
mod text;

fn env(pairs: &[(&str, &str)]) -> BTreeMap<OsString, OsString> {
    pairs
        .iter()
        .map(|(name, text)| (OsString::from(name), OsString::from(text)))
        .collect()
}

fn flags(words: &[&str]) -> ConfigFlags {
    use clap::{Args as _, FromArgMatches as _};
    let command = ConfigFlags::augment_args(clap::Command::new("agent"));
    let words = std::iter::once("agent").chain(words.iter().copied());
    ConfigFlags::from_arg_matches(&command.try_get_matches_from(words).unwrap()).unwrap()
}

/// A file with this text, and what `load` makes of it.
struct World {
    dir: tempfile::TempDir,
    inputs: Inputs,
}

impl World {
    fn new(yaml: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        std::fs::write(&path, yaml).unwrap();
        let inputs = Inputs {
            file: Some(path),
            ..Inputs::default()
        };
        Self { dir, inputs }
    }

    fn load(&self) -> Result<Loaded, ConfigError> {
        Config::load(&self.inputs)
    }

    /// The error's text, the file's path shortened.
    fn error(&self) -> String {
        let path = self.dir.path().join("config.yaml");
        let error = self.load().unwrap_err();
        error.to_string().replace(path.to_str().unwrap(), "FILE")
    }
}

fn load(yaml: &str) -> Config {
    World::new(yaml).load().unwrap().config
}

#[test]
fn without_any_layer_an_agent_is_a_whole_domain() {
    let config = load("");
    assert_eq!(config.domain.as_str(), "cluster.local");
    assert_eq!(config.upstream_nsmgr_url, None);
    assert_eq!(config.registry_url, None);
    assert!(config.forwarder);
    assert_eq!(
        config.listen.nsmgr.to_string(),
        "unix:///var/lib/networkservicemesh/nsm.io.sock"
    );
    assert_eq!(config.listen.proxy.to_string(), "tcp://0.0.0.0:5006");
    assert_eq!(config.max_token_lifetime, Duration::from_secs(600));
    assert_eq!(config.limits.max_message_bytes, 1 << 20);
    assert!(!config.map_ip_file.is_required);
    assert!(!config.name.is_empty());
    assert_eq!(config, load("# only a comment\n"));
    assert_eq!(config, load("tunnel:\nlog:\n  level:\n"));
}

#[test]
fn the_management_vni_is_one_of_our_own() {
    assert_eq!(load("").tunnel.management_vni.get(), 1);
    let other = load("tunnel: {management_vni: 16777215}");
    assert_eq!(other.tunnel.management_vni.get(), 16_777_215);
}

#[test]
fn each_policy_of_reachability_is_read() {
    assert_eq!(load("").reachability, Reachability::Prefer);
    for (name, policy) in [
        ("require", Reachability::Require),
        ("prefer", Reachability::Prefer),
        ("off", Reachability::Off),
    ] {
        assert_eq!(load(&format!("reachability: {name}")).reachability, policy);
    }
}

#[test]
fn each_kind_of_value_is_read() {
    let config = load(
        "name: node-1
domain: Cluster-1.Example
listen: {nsmgr: 'unix:///run/a.sock', proxy: 'tcp://[::]:6006'}
advertise_url: tcp://203.0.113.1:5006
registry_url: tcp://registry.nsm-system:5002
forwarder: off
resolver:
  servers: [192.0.2.53, '[2001:db8::53]:5353']
  hosts:
    cluster-2.example: 203.0.113.2
    cluster-3.example: {registry: '203.0.113.3:1', proxy: gw.example}
  timeout: 500ms
tunnel:
  ip: 10.0.0.1
  port: 14789
  mtu: 9000
map_ip_file: /etc/map.yaml
bpf: {enabled: false, interfaces: [eth0, eth1], hook: clsact}
max_token_lifetime: 1h30m
token:
  secret: 'top secret'
  spiffe_id: spiffe://cluster-1.example/x
limits: {max_message_bytes: 2MiB, max_connections: 7}
log: {level: 'debug,h2=warn', format: json}
",
    );
    assert_eq!(config.name, "node-1");
    assert_eq!(config.domain.as_str(), "cluster-1.example");
    assert_eq!(config.listen.proxy.to_string(), "tcp://[::]:6006");
    assert_eq!(
        config.advertise_url.as_ref().unwrap().to_string(),
        "tcp://203.0.113.1:5006"
    );
    assert!(!config.forwarder);
    assert_eq!(
        config.resolver.servers,
        [
            "192.0.2.53:53".parse().unwrap(),
            "[2001:db8::53]:5353".parse().unwrap()
        ]
    );
    let hosts = &config.resolver.hosts;
    let host = |name: &str| &hosts[&name.parse().unwrap()];
    let two = host("cluster-2.example");
    assert_eq!(
        (two.registry.to_string(), &two.proxy),
        ("203.0.113.2".to_owned(), &two.registry)
    );
    let three = host("cluster-3.example");
    assert_eq!(three.registry.to_string(), "203.0.113.3:1");
    assert_eq!(three.proxy.to_string(), "gw.example");
    assert_eq!(config.resolver.timeout, Duration::from_millis(500));
    assert_eq!(config.tunnel.port, 14789);
    assert_eq!(config.tunnel.mtu, 9000);
    assert!(config.map_ip_file.is_required);
    assert_eq!(config.bpf.interfaces.len(), 2);
    assert_eq!(config.bpf.hook, Hook::Clsact);
    assert_eq!(config.max_token_lifetime, Duration::from_secs(5400));
    assert_eq!(config.spiffe_id(), "spiffe://cluster-1.example/x");
    assert_eq!(config.limits.max_message_bytes, 2 << 20);
    assert_eq!(config.log.format, LogFormat::Json);
}

#[test]
fn flags_win_over_the_environment_over_the_file() {
    let mut world = World::new("name: file\ndomain: file.example\ntunnel: {port: 1}\n");
    world.inputs.environment = env(&[
        ("NSM_NAME", "environment"),
        ("NSM_TUNNEL_PORT", "2"),
        ("NSM_LOG_LEVEL", ""),
        ("HOME", "/root"),
    ]);
    world.inputs.flags = flags(&["--tunnel-port", "3", "--bpf-enabled=false", "--forwarder"]);
    let loaded = world.load().unwrap();
    let config = &loaded.config;
    assert_eq!(config.domain.as_str(), "file.example");
    assert_eq!(config.name, "environment");
    assert_eq!(config.tunnel.port, 3);
    assert!(!config.bpf.enabled && config.forwarder);
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    let yaml = loaded.to_yaml();
    let source = |start: &str| {
        let line = yaml
            .lines()
            .find(|line| line.trim_start().starts_with(start));
        line.unwrap().rsplit_once("# ").unwrap().1.to_owned()
    };
    assert_eq!(source("name:"), "NSM_NAME");
    assert!(source("domain:").ends_with("config.yaml:2"));
    assert_eq!(source("port:"), "--tunnel-port");
    assert_eq!(source("mtu:"), "default");
    assert_eq!(source("level:"), "default");
}

#[test]
fn flags_and_variables_have_lists_and_maps() {
    let mut world = World::new("");
    world.inputs.environment = env(&[(
        "NSM_RESOLVER_HOSTS",
        "a.example=192.0.2.1,b.example=gw.example:7",
    )]);
    world.inputs.flags = flags(&[
        "--resolver-servers",
        "192.0.2.53",
        "--resolver-servers=192.0.2.54,192.0.2.55",
    ]);
    let config = world.load().unwrap().config;
    assert_eq!(config.resolver.servers.len(), 3);
    let host = &config.resolver.hosts[&"b.example".parse().unwrap()];
    assert_eq!(host.proxy.to_string(), "gw.example:7");
}

#[test]
fn the_variables_of_nsm_are_read() {
    let mut world = World::new("");
    world.inputs.environment = env(&[
        ("NSM_LISTEN_ON", "unix:///run/nsm.sock,tcp://:5004"),
        ("NSM_REGISTRY_URL", "tcp://registry:5002"),
        ("NSM_MAP_IP_FILE_PATH", "/m.yaml"),
        ("NSM_MAX_TOKEN_LIFETIME", "10m0s"),
        ("NSM_LOG_LEVEL", "WARN"),
    ]);
    let config = world.load().unwrap().config;
    assert_eq!(config.listen.nsmgr.to_string(), "unix:///run/nsm.sock");
    assert_eq!(config.listen.proxy.to_string(), "tcp://0.0.0.0:5004");
    assert_eq!(
        config.registry_url.unwrap().to_string(),
        "tcp://registry:5002"
    );
    assert_eq!(config.map_ip_file.path, Path::new("/m.yaml"));
    assert!(config.map_ip_file.is_required);
    assert_eq!(config.log.level, "warn");

    // One listener by its own variable wins over the list.
    world.inputs.environment = env(&[
        ("NSM_LISTEN_ON", "tcp://:5004"),
        ("NSM_LISTEN_PROXY", "tcp://:6004"),
    ]);
    let config = world.load().unwrap().config;
    assert_eq!(config.listen.proxy.to_string(), "tcp://0.0.0.0:6004");

    world.inputs.environment = env(&[("NSM_LISTEN_ON", "tcp://:1,tcp://:2")]);
    assert!(
        world.error().starts_with("NSM_LISTEN_ON: "),
        "{}",
        world.error()
    );
}

#[test]
fn an_unknown_variable_is_a_warning() {
    let mut world = World::new("");
    world.inputs.environment = env(&[
        ("NSM_SERVICE_HOST", "10.96.0.1"),
        ("NSM_CONNECT_TO", "unix:///x"),
        ("OTHER", "x"),
    ]);
    let warnings = world.load().unwrap().warnings;
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("NSM_SERVICE_HOST"), "{warnings:?}");
}

#[test]
fn an_unknown_key_names_file_line_and_the_nearest_key() {
    let world = World::new("name: a\ntunel:\n  port: 1\ntunnel:\n  prot: 2\n\nregistry-url: x\n");
    assert_eq!(
        world.error(),
        "FILE:2: tunel: no such key; `proxy-nsmgr agent --print-config` lists all\n\
         FILE:5: tunnel.prot: no such key; did you mean tunnel.port?\n\
         FILE:7: registry-url: no such key; did you mean registry_url?"
    );
    assert_eq!(
        World::new("pin_dir: /x").error(),
        "FILE:1: pin_dir: no such key; did you mean bpf.pin_dir?"
    );
}

#[test]
fn a_bad_value_names_file_line_key_value_and_what_is_allowed() {
    let world = World::new(
        "tunnel:\n  port: 70000\n  ip: 0.0.0.0\n  mtu: 100\nresolver:\n  servers:\n    - 192.0.2.53\n    - dns.example\n",
    );
    assert_eq!(
        world.error(),
        "FILE:2: tunnel.port: \"70000\" is not allowed: a port between 1 and 65535\n\
         FILE:3: tunnel.ip: \"0.0.0.0\" is not allowed: the address of one host such as 192.0.2.1 or 2001:db8::1\n\
         FILE:4: tunnel.mtu: \"100\" is not allowed: 0 for the MTU of the underlay's link, or 576 to 65535\n\
         FILE:8: resolver.servers: dns.example is not allowed: the address of a DNS server such as 192.0.2.53, 192.0.2.53:53 or [2001:db8::53]:53"
            .replace("dns.example is", "\"dns.example\" is")
    );
    for (yaml, key) in [
        ("name: a@b", "name"),
        ("name: ''", "name"),
        ("domain: a..b", "domain"),
        ("domain: [a]", "domain"),
        ("advertise_url: 'tcp://0.0.0.0:5006'", "advertise_url"),
        ("advertise_url: 'tcp://[::]:5006'", "advertise_url"),
        ("listen: {proxy: 'tcp://0.0.0.0:0'}", "listen.proxy"),
        ("listen: {admin: 'tcp://0.0.0.0:1'}", "listen.admin"),
        ("registry_url: 192.0.2.1", "registry_url"),
        ("forwarder: maybe", "forwarder"),
        ("reachability: always", "reachability"),
        ("tunnel: {management_vni: 0}", "tunnel.management_vni"),
        (
            "tunnel: {management_vni: 16777216}",
            "tunnel.management_vni",
        ),
        ("resolver: {hosts: [a]}", "resolver.hosts"),
        ("resolver: {hosts: {a.example: a b}}", "resolver.hosts"),
        (
            "resolver: {hosts: {a.example: {registry: x}}}",
            "resolver.hosts",
        ),
        (
            "resolver: {hosts: {a.example: {registry: x, prox: y}}}",
            "resolver.hosts",
        ),
        ("resolver: {hosts: {a@b: x}}", "resolver.hosts"),
        ("resolver: {timeout: 0s}", "resolver.timeout"),
        ("resolver: {timeout: 5}", "resolver.timeout"),
        ("bpf: {interfaces: [an-interface-name]}", "bpf.interfaces"),
        ("bpf: {pin_dir: x}", "bpf.pin_dir"),
        ("bpf: {hook: xdp}", "bpf.hook"),
        ("max_token_lifetime: 1ms", "max_token_lifetime"),
        ("token: {algorithm: none}", "token.algorithm"),
        ("token: {spiffe_id: me}", "token.spiffe_id"),
        ("token: {audience: [spiffe://a/b, me]}", "token.audience"),
        ("forwarder_labels: {p2p: [a, b]}", "forwarder_labels"),
        ("listen: {nsmgr: 'tcp://:1'}", "listen.nsmgr"),
        ("listen: {forwarder: 'tcp://:1'}", "listen.forwarder"),
        ("limits: {max_connections: 0}", "limits.max_connections"),
        ("limits: {max_message_bytes: 1}", "limits.max_message_bytes"),
        ("log: {level: loud}", "log.level"),
        ("log: {format: xml}", "log.format"),
        ("log: info", "log"),
    ] {
        let error = World::new(yaml).error();
        assert!(
            error.starts_with(&format!("FILE:1: {key}: ")),
            "{yaml}: {error}"
        );
        assert!(!error.contains('\n'), "{yaml}: {error}");
    }
}

#[test]
fn a_bad_variable_and_a_bad_flag_are_named() {
    let mut world = World::new("");
    world.inputs.environment = env(&[("NSM_TUNNEL_PORT", "x")]);
    world.inputs.flags = flags(&["--log-level", "loud"]);
    let error = world.error();
    assert!(
        error.starts_with("NSM_TUNNEL_PORT: tunnel.port: \"x\" is not allowed"),
        "{error}"
    );
    assert!(
        error.contains("\n--log-level: log.level: \"loud\" is not allowed"),
        "{error}"
    );
}

#[test]
fn a_file_that_is_none_is_an_error() {
    let mut world = World::new("name: [a\nx: {");
    let error = world.error();
    assert!(
        error.starts_with("FILE:") && error.contains("no YAML"),
        "{error}"
    );
    assert!(World::new("just a text").error().contains("holds no keys"));
    assert!(
        World::new("name: a\nname: b\n").load().is_err(),
        "a key twice"
    );
    world.inputs.file = Some("/nowhere/config.yaml".into());
    let error = world.error();
    assert!(
        error.contains("/nowhere/config.yaml") && error.contains("No such file"),
        "{error}"
    );
    world.inputs.file = None;
    world.inputs.environment = env(&[("NSM_CONFIG_FILE", "/nowhere/other.yaml")]);
    assert!(world.error().contains("/nowhere/other.yaml"));
}

#[test]
fn the_names_of_nsms_own_forwarders_are_read() {
    let mut world = World::new("");
    world.inputs.environment = env(&[
        (
            "NSM_UPSTREAM_NSMGR_URL",
            "unix:///var/lib/networkservicemesh/nsm.io.sock",
        ),
        ("NSM_NSNAME", "my-forwarder"),
        ("NSM_LABELS", "p2p:true, zone:a"),
        ("NSM_REGISTRY_PROXY_URL", "tcp://nsmgr-proxy:5004"),
    ]);
    let config = world.load().unwrap().config;
    assert!(config.is_upstreams_forwarder());
    assert_eq!(config.forwarder_service, "my-forwarder");
    let labels = [("p2p", "true"), ("zone", "a")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    assert_eq!(config.forwarder_labels, labels.clone().into());
    assert_eq!(
        config.registry_proxy_url.unwrap().to_string(),
        "tcp://nsmgr-proxy:5004"
    );
    let from_file = load("forwarder_labels: {p2p: 'true', zone: a}\n");
    assert_eq!(from_file.forwarder_labels, labels.into());
    assert!(!from_file.is_upstreams_forwarder());
}

#[test]
fn contradictions_are_errors() {
    let error = World::new("token: {key_file: /run/svid_key.pem}\n").error();
    assert!(error.contains("set token.algorithm to es256"), "{error}");
    load("token: {key_file: /run/svid_key.pem, algorithm: es256}\n");
    let error = World::new("listen:\n  proxy: tcp://:5005\n").error();
    assert!(
        error.ends_with("listen.registry and listen.proxy are both tcp://0.0.0.0:5005"),
        "{error}"
    );
    let error = World::new("registry_url: tcp://0.0.0.0:5005\n").error();
    assert!(
        error.starts_with("FILE:1: registry_url is listen.registry"),
        "{error}"
    );
}

#[test]
fn an_agent_that_would_call_itself_is_found_in_each_spelling() {
    for (yaml, key) in [
        (
            "registry_url: tcp://1.2.3.4:5005/\nlisten: {registry: 'tcp://1.2.3.4:5005'}\n",
            "registry_url",
        ),
        (
            "registry_proxy_url: tcp://[0:0::1]:05005\nlisten: {registry: 'tcp://[::1]:5005'}\n",
            "registry_proxy_url",
        ),
        (
            "upstream_nsmgr_url: unix:/run/proxy-nsmgr/forwarder.sock\n",
            "upstream_nsmgr_url",
        ),
    ] {
        let error = World::new(yaml).error();
        assert!(
            error.starts_with(&format!("FILE:1: {key} is listen."))
                && error.ends_with("the agent would call itself for ever"),
            "{yaml}: {error}"
        );
    }
}

#[test]
fn each_spelling_of_a_peers_url_is_one_url() {
    for (spelling, canonical) in [
        ("tcp://h:5006/", "tcp://h:5006"),
        ("unix:/run/x.sock", "unix:///run/x.sock"),
    ] {
        for key in [
            "advertise_url",
            "upstream_nsmgr_url",
            "registry_url",
            "registry_proxy_url",
        ] {
            let config = load(&format!("{key}: {spelling}\n"));
            assert_eq!(config, load(&format!("{key}: {canonical}\n")), "{key}");
            let shown = KEYS.iter().find(|other| other.path == key).unwrap();
            assert_eq!((shown.show)(&config), canonical, "{key}");
        }
    }
}

#[test]
fn a_socket_that_was_passed_has_no_url_in_a_configuration() {
    for key in [
        "advertise_url",
        "upstream_nsmgr_url",
        "registry_url",
        "registry_proxy_url",
    ] {
        let world = World::new(&format!("{key}: inode://1/2\n"));
        assert!(world.load().is_err(), "{key}");
        let error = world.error();
        assert!(
            error.starts_with(&format!("FILE:1: {key}: \"inode://1/2\" is not allowed"))
                && error.ends_with("expected unix:///path or tcp://host:port"),
            "{error}"
        );
    }
}

#[test]
fn a_reload_lists_what_it_takes_over() {
    let old = load("log: {level: info}\n");
    assert_eq!(Config::reloadable_changes(&old, &old), Changes::default());
    assert_eq!(
        Config::reloadable_changes(&old, &old).to_string(),
        "nothing changed"
    );
    let new = load(
        "log: {level: debug}\nresolver: {hosts: {a.example: 192.0.2.1}, timeout: 1s}\ntunnel: {port: 1}\nmap_ip_file: /x\nrequest_timeout: 1s\ntoken: {secret: x}\n",
    );
    let changes = Config::reloadable_changes(&old, &new);
    assert_eq!(
        changes.reloadable,
        ["resolver.hosts", "resolver.timeout", "log.level"]
    );
    assert_eq!(
        changes.restart,
        [
            "tunnel.port",
            "map_ip_file",
            "token.secret",
            "request_timeout"
        ]
    );
    assert_eq!(
        changes.to_string(),
        "reloaded: resolver.hosts, resolver.timeout, log.level; needs a restart: tunnel.port, map_ip_file, token.secret, request_timeout"
    );
    let newer = Config {
        token: Token {
            secret: "y".to_owned(),
            ..new.token.clone()
        },
        ..new.clone()
    };
    assert_eq!(
        Config::reloadable_changes(&new, &newer).restart,
        ["token.secret"]
    );
}

proptest::proptest! {
    #[test]
    fn no_file_panics(yaml in "(name|tunnel|log|resolver|[a-z]{1,8}|[\\[\\]{}:,&*!|>'\"#%@`~ \n-]|[0-9]{1,4}){0,40}") {
        let _ = World::new(&yaml).load();
    }
}

#[test]
fn metrics_are_for_this_machine_by_default() {
    let listen = |yaml: &str| load(yaml).listen.metrics.map(|address| address.to_string());
    assert_eq!(listen("").as_deref(), Some("127.0.0.1:9006"));
    assert_eq!(
        listen("listen: {metrics: 'tcp://:9100'}").as_deref(),
        Some("0.0.0.0:9100")
    );
    assert_eq!(listen("listen: {metrics: off}"), None);
    for (yaml, expected) in [
        ("metrics: unix:///x", "tcp://address:port, or off"),
        (
            "metrics: tcp://0.0.0.0:5006",
            "listen.metrics and listen.proxy",
        ),
    ] {
        let error = World::new(&format!("listen: {{{yaml}}}")).error();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn tokens_have_no_audience_by_default() {
    assert!(load("").token.audience.is_empty());
    let config = load("token: {audience: [spiffe://a.example/proxy, 'spiffe://b.example/proxy']}");
    assert_eq!(
        config.token.audience,
        ["spiffe://a.example/proxy", "spiffe://b.example/proxy"]
    );
}
