//! The socket on which the endpoint serves.

use std::{
    io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use tokio::net::UnixListener;

/// The default place of sockets, beside the agent's own.
const RUN_DIR: &str = "/run/proxy-nsmgr";

/// The longest path of a socket (`sun_path` of unix(7), without the final NUL).
const MAX_PATH: usize = 107;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Its path does not fit.
    #[error("the socket's path {path} has {} bytes, at most {MAX_PATH} are allowed: choose another with --listen", path.as_os_str().len())]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Another process serves there.
    #[error("another process serves on {0}: choose another path with --listen")]
    Taken(PathBuf),
    /// It is something else than a socket.
    #[error("{0} is there and is no socket: choose another path with --listen")]
    NotSocket(PathBuf),
    /// The system refuses.
    #[error("cannot serve on {path}: {cause}; choose another path with --listen")]
    System {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
}

/// A socket's file, removed when this is dropped.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

impl SocketFile {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody else may have been quicker: it is gone either way.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Listens at `path`, or at a path of our own that ends in `name`.
///
/// # Errors
///
/// The path is too long, taken, or refused by the system.
pub(crate) fn listen(
    path: Option<&Path>,
    name: &str,
) -> Result<(UnixListener, SocketFile), SocketError> {
    let path = match path {
        // The agent has another working directory.
        Some(path) => std::path::absolute(path).map_err(|cause| SocketError::System {
            path: path.to_owned(),
            cause,
        })?,
        None => {
            let run = Path::new(RUN_DIR);
            let usable = std::fs::create_dir_all(run).is_ok()
                && nix::unistd::access(run, nix::unistd::AccessFlags::W_OK).is_ok();
            let dir = if usable {
                run.to_owned()
            } else {
                std::env::temp_dir()
            };
            // A name may hold what a file's may not.
            let file = name.replace('/', "_");
            dir.join(format!("{file}-{}.sock", std::process::id()))
        }
    };
    if path.as_os_str().len() > MAX_PATH {
        return Err(SocketError::TooLong { path });
    }
    clear(&path)?;
    match UnixListener::bind(&path) {
        Ok(listener) => Ok((listener, SocketFile(path))),
        Err(cause) => Err(SocketError::System { path, cause }),
    }
}

/// Removes a socket that a process which is gone left behind.
fn clear(path: &Path) -> Result<(), SocketError> {
    use std::os::unix::fs::FileTypeExt as _;
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotSocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::Taken(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|cause| SocketError::System {
                path: path.to_owned(),
                cause,
            })
        }
        Err(cause) => Err(SocketError::System {
            path: path.to_owned(),
            cause,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_gone_with_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        let (listener, file) = listen(Some(&path), "x").unwrap();
        assert!(matches!(
            listen(Some(&path), "x"),
            Err(SocketError::Taken(_))
        ));
        // Left behind, as after a kill.
        drop(listener);
        std::mem::forget(file);
        let (_listener, file) = listen(Some(&path), "x").unwrap();
        assert_eq!(file.path(), path);
        drop(file);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_path_that_cannot_be_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(
            listen(Some(&file), "x"),
            Err(SocketError::NotSocket(_))
        ));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(
            listen(Some(&long), "x"),
            Err(SocketError::TooLong { .. })
        ));
        let error = listen(Some(&dir.path().join("no/x.sock")), "x")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("No such file") && error.contains("--listen"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_socket_of_our_own_is_found() {
        let (_listener, file) = listen(None, "a/b").unwrap();
        assert!(file.path().exists());
        let name = file.path().file_name().unwrap().to_str().unwrap();
        assert_eq!(name, format!("a_b-{}.sock", std::process::id()));
    }
}
