//! The processes of a mesh in a world: agents on nodes, endpoints and clients in pods. The one place that knows the
//! command lines and the configuration of `proxy-nsmgr`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::Duration,
};

use serde_json::Value;

use crate::{
    Node, Pod, Process, World, WorldError,
    process::AGENT_PREFIX,
    wait::{patient, wait_for},
};

/// The agent's deadlines by their variables, as they are by default.
const DEADLINES: [(&str, Duration); 3] = [
    ("NSM_RESOLVER_TIMEOUT", Duration::from_secs(2)),
    ("NSM_REQUEST_TIMEOUT", CALL_DEADLINE),
    ("NSM_DIAL_TIMEOUT", Duration::from_secs(5)),
];

/// A call's deadline, by default, of agents and clients.
const CALL_DEADLINE: Duration = Duration::from_secs(15);

/// An agent starts within a fraction of a second; loading BPF on a loaded machine takes longer.
const READY_DEADLINE: Duration = Duration::from_secs(20);

/// Registering with an agent on the same machine takes milliseconds.
const REGISTERED_DEADLINE: Duration = Duration::from_secs(15);

/// An agent that runs on a node.
#[derive(Debug)]
pub struct Agent {
    /// Its process.
    pub process: Process,
    program: PathBuf,
    node: Node,
}

/// An endpoint that serves out of a pod.
#[derive(Debug)]
pub struct Endpoint {
    /// Its process.
    pub process: Process,
}

/// A client that asks for a service on behalf of a pod.
#[derive(Debug)]
pub struct Client {
    /// Its process; each line of its stdout is a JSON object with an `event`.
    pub process: Process,
}

impl Agent {
    /// Starts `program agent` on a node, configured for this world, and does not wait for it. `adjust` may add flags and
    /// variables, which come after the file and so override it.
    ///
    /// # Errors
    /// When the configuration cannot be written or the process not started.
    pub fn start(
        world: &World,
        node: &Node,
        program: &Path,
        adjust: impl FnOnce(&mut Command),
    ) -> Result<Self, WorldError> {
        let mut command = Self::command(node, program)?;
        adjust(&mut command);
        Self::start_as(world, node, program, command)
    }

    /// Starts what [`Self::command`] has given, after whoever asked for it has changed the node's configuration.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start_as(
        world: &World,
        node: &Node,
        program: &Path,
        command: Command,
    ) -> Result<Self, WorldError> {
        let process = world.spawn(&format!("{AGENT_PREFIX}{}", node.name()), command)?;
        Ok(Self {
            process,
            program: program.to_owned(),
            node: node.clone(),
        })
    }

    /// The command of `program agent` on a node, with the node's configuration written; for those who wrap it.
    ///
    /// # Errors
    /// When the configuration cannot be written.
    pub fn command(node: &Node, program: &Path) -> Result<Command, WorldError> {
        let config = node.run_dir().join("agent.yaml");
        let map = map_ip_file(node);
        let pairs: String = node
            .ip_map()
            .iter()
            .map(|(own, public)| format!("{own}: {public}\n"))
            .collect();
        let written = fs::write(&map, pairs).and_then(|()| fs::write(&config, configuration(node)));
        written.map_err(WorldError::io(format!("write {}", config.display())))?;
        let mut command = program_on(node, program)?;
        command.arg("agent").arg("--config").arg(&config);
        // The agent's own deadlines, where the machine is slow by nature; a test's flags override them.
        for (variable, deadline) in DEADLINES {
            if patient(deadline) > deadline {
                command.env(variable, format!("{}s", patient(deadline).as_secs()));
            }
        }
        Ok(command)
    }

    /// Waits until the agent says that all of it is in place.
    ///
    /// # Errors
    /// When it ends, or is not ready in time; with its own words about what it waits for.
    pub fn wait_ready(&self) -> Result<(), WorldError> {
        let mut last = String::from("it was not asked yet");
        let ready = wait_for(String::new(), READY_DEADLINE, || {
            if self.process.exited().is_some() {
                return Some(false);
            }
            match self.status() {
                Ok(status) if status["ready"] == true => return Some(true),
                Ok(status) => last = format!("it waits for {}", status["waiting_for"]),
                Err(error) => last = error.to_string(),
            }
            None
        });
        match ready {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(self
                .process
                .in_vain(&format!("agent {} to be ready ({last})", self.node.name()))),
        }
    }

    /// The node it runs on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Where clients and endpoints of its node connect.
    pub fn nsmgr_url(&self) -> String {
        format!("unix://{}", self.node.run_dir().join("nsm.sock").display())
    }

    /// Where it answers `status`.
    pub fn admin_url(&self) -> String {
        admin_url(&self.node)
    }

    /// Its IP map file, which it watches.
    pub fn map_ip_file(&self) -> PathBuf {
        map_ip_file(&self.node)
    }

    /// What `proxy-nsmgr status --json` says.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn status(&self) -> Result<Value, WorldError> {
        let text = self.status_output(&["--json"])?;
        serde_json::from_str(&text).map_err(|error| WorldError::Program {
            program: "proxy-nsmgr status --json".into(),
            input: self.admin_url(),
            message: format!("{error} in {text:?}"),
        })
    }

    /// What `proxy-nsmgr status` shows a person.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn status_table(&self) -> Result<String, WorldError> {
        self.status_output(&[])
    }

    fn status_output(&self, arguments: &[&str]) -> Result<String, WorldError> {
        let admin = self.admin_url();
        let mut command = Command::new(&self.program);
        let output = command
            .args(["status", "--admin", &admin])
            .args(arguments)
            .output();
        let output = output.map_err(WorldError::io(format!("start {}", self.program.display())))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(WorldError::Program {
            program: "proxy-nsmgr status".into(),
            input: admin,
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// Has the agent close everything and end, by `proxy-nsmgr drain`, and waits for it.
    ///
    /// # Errors
    /// When the command fails, or the agent does not end well in `deadline`.
    pub fn drain(&self, deadline: Duration) -> Result<(), WorldError> {
        let admin = self.admin_url();
        let mut command = program_on(&self.node, &self.program)?;
        command.args(["drain", "--admin", &admin]);
        let output = command.output();
        let output = output.map_err(WorldError::io("start proxy-nsmgr drain"))?;
        let status = self.process.wait(deadline)?;
        if output.status.success() && status.success() {
            return Ok(());
        }
        Err(WorldError::Program {
            program: "proxy-nsmgr drain".into(),
            input: admin,
            message: format!(
                "{}; the agent ended with {status}",
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        })
    }

    /// The command of `proxy-nsmgr connect` for a pod of this node, without `--json`.
    ///
    /// # Errors
    /// When the node's namespace is gone.
    pub fn connect_command(&self, pod: &Pod, service: &str) -> Result<Command, WorldError> {
        let mut command = program_on(&self.node, &self.program)?;
        command
            .args([
                "connect",
                service,
                "--connect-to",
                &self.nsmgr_url(),
                "--netns",
            ])
            .arg(pod.netns());
        Ok(command)
    }

    /// Starts a client that asks for `service` for a pod, and does not wait for it.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn connect(
        &self,
        world: &World,
        pod: &Pod,
        service: &str,
        adjust: impl FnOnce(&mut Command),
    ) -> Result<Client, WorldError> {
        let mut command = self.connect_command(pod, service)?;
        command.arg("--json");
        adjust(&mut command);
        let chosen = command.get_args().any(|argument| argument == "--timeout");
        if !chosen && patient(CALL_DEADLINE) > CALL_DEADLINE {
            let deadline = patient(CALL_DEADLINE).as_secs();
            command.args(["--timeout", &format!("{deadline}s")]);
        }
        let process = world.spawn(&format!("client-{}", pod.name()), command)?;
        Ok(Client { process })
    }

    /// Starts an endpoint that serves `service` out of a pod, and waits until it is registered.
    ///
    /// # Errors
    /// When it cannot be started, or does not register in time.
    pub fn endpoint(
        &self,
        world: &World,
        pod: &Pod,
        service: &str,
        cidr: &str,
        adjust: impl FnOnce(&mut Command),
    ) -> Result<Endpoint, WorldError> {
        let mut command = program_on(&self.node, &self.program)?;
        let socket = self.node.run_dir().join(format!("{}.sock", pod.name()));
        command.args([
            "endpoint",
            "--json",
            "--service",
            service,
            "--cidr",
            cidr,
            "--name",
            pod.name(),
        ]);
        command
            .args(["--connect-to", &self.nsmgr_url(), "--netns"])
            .arg(pod.netns());
        command.arg("--listen").arg(socket);
        adjust(&mut command);
        let process = world.spawn(&format!("endpoint-{}", pod.name()), command)?;
        wait_for_event(&process, "registered", REGISTERED_DEADLINE)?;
        Ok(Endpoint { process })
    }
}

impl Endpoint {
    /// Ends it as Ctrl-C would: it unregisters first.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn stop(&self, deadline: Duration) -> Result<ExitStatus, WorldError> {
        self.process.terminate(deadline)
    }
}

impl Client {
    /// Waits for an event of that name ("connected", "refreshed", "down", "closed", "error") and returns it.
    ///
    /// # Errors
    /// When it does not come in time, or the client ends without it.
    pub fn wait_for_event(&self, event: &str, deadline: Duration) -> Result<Value, WorldError> {
        wait_for_event(&self.process, event, deadline)
    }

    /// Closes the connection as Ctrl-C would, and waits for the process to end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn close(&self, deadline: Duration) -> Result<ExitStatus, WorldError> {
        self.process.terminate(deadline)
    }
}

/// The program on a node, deaf to the variables of whoever runs the test: they would override its configuration.
fn program_on(node: &Node, program: &Path) -> Result<Command, WorldError> {
    let mut command = node.command(program)?;
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"NSM_") || name == "SPIFFE_ENDPOINT_SOCKET" {
            command.env_remove(name);
        }
    }
    Ok(command)
}

fn wait_for_event(process: &Process, event: &str, deadline: Duration) -> Result<Value, WorldError> {
    process.wait_for(&format!("the event {event:?}"), deadline, |line| {
        let value: Value = serde_json::from_str(line).ok()?;
        (value["event"] == event).then_some(value)
    })
}

fn admin_url(node: &Node) -> String {
    format!("unix://{}", node.run_dir().join("admin.sock").display())
}

fn map_ip_file(node: &Node) -> PathBuf {
    node.run_dir().join("map-ip.yaml")
}

/// The agent's configuration file.
fn configuration(node: &Node) -> String {
    format!(
        "name: {name}\n\
         domain: {domain}\n\
         insecure: true\n\
         listen:\n\
        \x20 nsmgr: \"unix://{run}/nsm.sock\"\n\
        \x20 admin: \"{admin}\"\n\
        \x20 proxy: \"tcp://0.0.0.0:5006\"\n\
        \x20 registry: \"tcp://0.0.0.0:5005\"\n\
         resolver:\n\
        \x20 servers: [\"{dns}\"]\n\
         tunnel:\n\
        \x20 ip: \"{ip}\"\n\
        \x20 port: 4789\n\
         map_ip_file: {map}\n\
         bpf:\n\
        \x20 pin_dir: {pins}\n\
        \x20 interfaces: [{interface}]\n",
        name = node.name(),
        domain = node.domain(),
        run = node.run_dir().display(),
        admin = admin_url(node),
        dns = node.dns_address(),
        ip = node.private_ip(),
        map = map_ip_file(node).display(),
        pins = node.pin_dir().display(),
        interface = node.interface(),
    )
}
