//! `xtask vm-guest`: process 1 of the guest. It starts the command, sends its output and exit status to the host, and reaps
//! orphans.

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    libc,
    sys::signal::{Signal, kill},
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
            dir: current_directory()?,
            environment: environment::for_guest(accelerator),
        })
    }
}

/// The current directory, whose name goes to the guest as text.
fn current_directory() -> Result<PathBuf> {
    let dir = env::current_dir().context("find the current directory")?;
    ensure!(
        dir.to_str().is_some(),
        "the name of the current directory {} is not UTF-8: run the command in another one",
        dir.display()
    );
    Ok(dir)
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
        match wait_for_any() {
            Ok((ended, status)) if ended.cast_unsigned() == pid => return Ok(status_of(status)),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for the command"),
        }
    }
}

/// Waits for the end of one child. nix's `wait` fails for one that a real-time signal has ended.
fn wait_for_any() -> Result<(libc::pid_t, ExitStatus), Errno> {
    let mut status = 0;
    // SAFETY: the kernel writes the status to the variable, which outlives the call.
    let pid = unsafe { libc::wait(&raw mut status) };
    Errno::result(pid).map(|pid| (pid, ExitStatus::from_raw(status)))
}

/// As shells have it.
fn status_of(ended: ExitStatus) -> u8 {
    match (ended.code(), ended.signal()) {
        (Some(code), _) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        (None, signal) => status_of_number(signal.unwrap_or_default()),
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
    fn the_end_by_any_signal_is_a_status() {
        for (end, status) in [("exit 3", 3), ("kill -9 $$", 137), ("kill -34 $$", 162)] {
            let ended = Command::new("sh").args(["-c", end]).status().unwrap();
            assert_eq!(status_of(ended), status, "{end}");
        }
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
