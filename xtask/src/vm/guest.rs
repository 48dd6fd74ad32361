//! `xtask vm-guest`: process 1 of the guest. It starts the command, sends its output and exit status to the host, and reaps
//! orphans.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, wait},
    },
    unistd::{Pid, pause},
};
use serde::{Deserialize, Serialize};

use super::{
    accelerator::Accelerator,
    channel::{self, Frame},
    environment,
    interruption::status_of_number,
};

/// Where init.sh puts this program and its task.
const DIR: &str = "/run/xtask-vm";

/// The kernel makes the port's device soon after the machine's start.
const PORT_DEADLINE: Duration = Duration::from_secs(20);

/// What the guest is there for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Task {
    /// The program and its arguments.
    command: Vec<String>,
    dir: PathBuf,
    environment: BTreeMap<String, String>,
}

impl Task {
    /// The command as the caller of this process would run it.
    ///
    /// # Errors
    /// When the current directory is gone.
    pub(super) fn of_caller(command: &[String], accelerator: Accelerator) -> Result<Self> {
        Ok(Self {
            command: command.to_owned(),
            dir: env::current_dir().context("find the current directory")?,
            environment: environment::for_guest(accelerator),
        })
    }
}

/// This program as the guest has it.
pub(super) fn program() -> String {
    format!("{DIR}/xtask")
}

/// Runs the task; never returns in the guest, since a kernel panics without process 1.
///
/// # Errors
/// When this is no guest, or the host cannot be reached.
pub(crate) fn main() -> Result<()> {
    if Pid::this().as_raw() != 1 {
        bail!("vm-guest is the first process of a virtual machine that `cargo xtask vm` starts");
    }
    let port = Arc::new(Mutex::new(open_port()?));
    let last = run(&port).unwrap_or_else(|error| Frame::Failed(format!("{error:#}")));
    send(&port, &last).context("send the exit status")?;
    loop {
        pause();
    }
}

type Port = Arc<Mutex<File>>;

fn send(port: &Port, frame: &Frame) -> io::Result<()> {
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    frame.write_to(&mut *port)
}

/// Runs the command and returns the frame that ends the session.
fn run(port: &Port) -> Result<Frame> {
    let path = Path::new(DIR).join("task.json");
    let task = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let task: Task = serde_json::from_slice(&task)?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the release")?;
    send(port, &Frame::Started(release.trim().to_owned()))?;
    let Some((program, arguments)) = task.command.split_first() else {
        bail!("there is no command");
    };
    if !task.dir.is_dir() {
        bail!(
            "the guest does not see the directory {}",
            task.dir.display()
        );
    }
    let spawned = Command::new(program)
        .args(arguments)
        .current_dir(&task.dir)
        .env_clear()
        .envs(&task.environment)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return Ok(not_started(program, &task, &error)),
    };
    let streams = [
        forward(port, child.stdout.take(), Frame::Stdout),
        forward(port, child.stderr.take(), Frame::Stderr),
    ];
    let status = wait_for(child.id())?;
    // What the command left running would keep its output open.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    for stream in streams {
        let copied = stream.join();
        copied.map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(Frame::Exit(status))
}

/// As shells have it: 127 for what is not there, 126 for what cannot be executed.
fn not_started(program: &str, task: &Task, error: &io::Error) -> Frame {
    if error.kind() == io::ErrorKind::NotFound {
        let path = task.environment.get("PATH").map_or("", String::as_str);
        let reason = format!("{program}: not found in the guest, whose PATH is {path}");
        Frame::NotStarted(127, reason)
    } else {
        Frame::NotStarted(126, format!("{program}: cannot be started: {error}"))
    }
}

fn forward(
    port: &Port,
    stream: Option<impl Read + Send + 'static>,
    frame: fn(Vec<u8>) -> Frame,
) -> JoinHandle<io::Result<()>> {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let Some(mut stream) = stream else {
            return Ok(());
        };
        let mut buffer = [0; 16 * 1024];
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(()),
                n => send(&port, &frame(buffer[..n].to_vec()))?,
            }
        }
    })
}

/// Waits for the command's end and returns its status; other processes that end meanwhile are orphans.
fn wait_for(pid: u32) -> Result<u8> {
    loop {
        match wait() {
            Ok(WaitStatus::Exited(ended, code)) if ended.as_raw().unsigned_abs() == pid => {
                return Ok(u8::try_from(code & 0xff).unwrap_or(u8::MAX));
            }
            Ok(WaitStatus::Signaled(ended, signal, _)) if ended.as_raw().unsigned_abs() == pid => {
                return Ok(status_of_number(signal as i32));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for the command"),
        }
    }
}

/// Opens the port to the host.
fn open_port() -> Result<File> {
    let mut found = Ok(None);
    let waited = nsm_world::wait_until("the port to the host", PORT_DEADLINE, || {
        found = port_device(Path::new("/sys/class/virtio-ports"));
        !matches!(found, Ok(None))
    });
    let device = found?.with_context(|| format!("{waited:?}"))?;
    OpenOptions::new()
        .write(true)
        .open(&device)
        .with_context(|| format!("open {}", device.display()))
}

/// The device of the port with our name, or `None` as long as there is none.
fn port_device(ports: &Path) -> Result<Option<PathBuf>> {
    let Ok(entries) = fs::read_dir(ports) else {
        return Ok(None);
    };
    for entry in entries {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == channel::PORT {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let ports = dir.path();
        assert_eq!(port_device(&ports.join("none")).unwrap(), None);
        for (device, name) in [("vport0p1", "other\n"), ("vport0p2", "xtask.vm\n")] {
            fs::create_dir(ports.join(device)).unwrap();
            fs::write(ports.join(device).join("name"), name).unwrap();
        }
        assert_eq!(port_device(ports).unwrap(), Some("/dev/vport0p2".into()));
    }

    #[test]
    fn a_command_that_is_not_there_has_the_status_of_shells() {
        let task = Task {
            command: vec!["nothing".to_owned()],
            dir: "/".into(),
            environment: BTreeMap::from([("PATH".to_owned(), "/bin".to_owned())]),
        };
        let missing = io::Error::from(io::ErrorKind::NotFound);
        let Frame::NotStarted(127, reason) = not_started("nothing", &task, &missing) else {
            panic!("another frame");
        };
        assert!(reason.contains("PATH is /bin"), "{reason}");
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        assert!(matches!(
            not_started("dir", &task, &denied),
            Frame::NotStarted(126, _)
        ));
    }

    #[test]
    fn a_task_is_read_as_it_was_written() {
        let task = Task {
            command: ["sh", "-c", "echo 'a b' \"$X\"\n"]
                .map(str::to_owned)
                .to_vec(),
            dir: "/tmp/with space".into(),
            environment: BTreeMap::from([("X".to_owned(), "ü \" '".to_owned())]),
        };
        let sent = serde_json::to_vec(&task).unwrap();
        assert_eq!(serde_json::from_slice::<Task>(&sent).unwrap(), task);
    }
}
