//! The agent connects to endpoints as root. A caller must not reach through it a socket that the kernel refuses to the caller.
//!
//! The attacker is this program again, run as another user by util-linux's `setpriv`.

use std::{
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use nsm_controlplane::{
    identity::token::TokenSource,
    transport::{
        dial::dial_with,
        unix::{Descriptors, Passed},
    },
};
use nsm_proto::registry::{
    NetworkService, NetworkServiceEndpoint,
    network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
};
use tokio::{io::AsyncReadExt as _, net::UnixListener, process::Command, sync::mpsc};
use tonic::{Code, Request, transport::Channel};

use crate::support::{Agent, Client, World, assert_refusal, within};

/// `nobody` and `nogroup`.
const NOBODY: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

/// Where the attacker finds the agent, and the socket that it wants to reach.
const AGENT: &str = "NSM_TEST_AGENT";
const VICTIM: &str = "NSM_TEST_VICTIM";

/// A service of root's, on a socket that nobody else may connect to. Its folder is open.
struct Victim {
    path: PathBuf,
    /// What has come by each connection, when that has ended.
    received: mpsc::UnboundedReceiver<Vec<u8>>,
}

impl Victim {
    fn listen(folder: &Path) -> Self {
        let path = folder.join("priv.sock");
        let listener = UnixListener::bind(&path).expect("a socket");
        permit(&path, 0o600);
        let (sender, received) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut bytes = Vec::new();
                let _ = stream.read_to_end(&mut bytes).await;
                let _ = sender.send(bytes);
            }
        });
        Self { path, received }
    }

    /// Everything that has come.
    fn received(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Ok(bytes) = self.received.try_recv() {
            all.extend(bytes);
        }
        all
    }
}

fn permit(path: &Path, mode: u32) {
    let mode = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(path, mode).expect("the mode");
}

/// Runs the attacker as `nobody`; gives what it writes.
async fn attack(agent: &Agent, victim: &Victim) -> String {
    let program = std::env::current_exe().expect("this program");
    let attacker = Command::new("setpriv")
        .args(NOBODY)
        .arg(program)
        .args([
            "deputy::the_attacker",
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env(AGENT, &agent.node_url)
        .env(VICTIM, &victim.path)
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .output();
    let output = within(attacker).await.expect("setpriv");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: runs a client as another user"]
async fn a_socket_of_another_user_is_not_reached_through_the_agent() {
    let world = World::two().await;
    let [a, _] = world.agents();
    let socket = a.node_url.strip_prefix("unix://").expect("a socket");
    permit(a.folder.path(), 0o755);
    permit(Path::new(socket), 0o666);
    let mut victim = Victim::listen(a.folder.path());
    let said = attack(a, &victim).await;
    for line in [
        // The kernel keeps it from the attacker itself.
        "connects: Err(PermissionDenied)",
        "registers its path: PermissionDenied only root of the node may register an endpoint by the path",
        // Its file may be looked up, which shows no right to connect.
        "registers its descriptor: granted",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }
    let client = Client::on_node(a).await;
    let service = NetworkService {
        name: "stolen".to_owned(),
        ..NetworkService::default()
    };
    let registered = client.register_service(service).await;
    registered.expect("registered");
    let status = client.refused(client.request_for("stolen")).await;
    let words = ["is not of the user and pod that registered it"];
    assert_refusal(&status, Code::Unavailable, &words);
    assert_eq!(victim.received(), Vec::<u8>::new());
}

/// What the attacker does; it writes what it gets.
#[tokio::test]
#[ignore = "needs another test, which runs it as another user"]
async fn the_attacker() {
    let (Ok(agent), Ok(victim)) = (std::env::var(AGENT), std::env::var(VICTIM)) else {
        return;
    };
    let connected = tokio::net::UnixStream::connect(&victim).await;
    println!(
        "connects: {:?}",
        connected.map(drop).map_err(|error| error.kind())
    );
    let descriptors = Arc::<Descriptors>::default();
    let url = agent.parse().expect("a URL");
    let dialled = dial_with(&url, &descriptors, None, Duration::from_secs(5)).await;
    let channel = dialled.expect("the agent's socket is open to all").channel;
    let registered = register(&channel, format!("unix://{victim}")).await;
    println!("registers its path: {registered}");
    // O_PATH asks for no right of the file's.
    let file = std::fs::File::options()
        .read(true)
        .custom_flags(nix::libc::O_PATH)
        .open(&victim)
        .expect("it can be looked up");
    let metadata = file.metadata().expect("its inode");
    descriptors.send(Passed::new(file.into()));
    let url = format!("inode://{}/{}", metadata.dev(), metadata.ino());
    println!(
        "registers its descriptor: {}",
        register(&channel, url).await
    );
}

async fn register(channel: &Channel, url: String) -> String {
    let mut request = Request::new(NetworkServiceEndpoint {
        name: "thief".to_owned(),
        network_service_names: vec!["stolen".to_owned()],
        url,
        ..NetworkServiceEndpoint::default()
    });
    TokenSource::hs256("spiffe://tests/thief", b"secret", Duration::from_secs(600))
        .apply(request.metadata_mut());
    let mut endpoints = NetworkServiceEndpointRegistryClient::new(channel.clone());
    outcome(endpoints.register(request).await)
}

fn outcome<T>(outcome: Result<T, tonic::Status>) -> String {
    match outcome {
        Ok(_) => "granted".to_owned(),
        Err(status) => format!("{:?} {}", status.code(), status.message()),
    }
}
