//! A process, as far as its peers can tell: tasks and sockets that go at once when it is killed.

use nix::sched::{CloneFlags, unshare};
use tokio::runtime::{Builder, Runtime};

/// A runtime of one thread.
pub(crate) struct Process {
    runtime: Option<Runtime>,
}

impl Process {
    /// Runs `setup` inside; what it spawns lives until the process is killed.
    pub(crate) async fn start<T: Send + 'static>(
        setup: impl Future<Output = T> + Send + 'static,
    ) -> (Self, T) {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let made = runtime.spawn(setup).await.expect("the process starts");
        (
            Self {
                runtime: Some(runtime),
            },
            made,
        )
    }

    /// Ends it as `kill -9` does: no drain, no goodbye.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Does `work` on a thread in a network namespace of its own: its sockets are those of another pod.
pub(crate) async fn apart(work: impl Future<Output = ()> + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
        let runtime = Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(work);
    });
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    if let Err(panic) = joined.expect("joining does not panic") {
        std::panic::resume_unwind(panic);
    }
}
