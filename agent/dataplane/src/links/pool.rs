//! Threads that work in network namespaces.
//!
//! A job enters whatever namespaces it needs. Afterwards its thread goes home to the node's namespace, or ends when it cannot: a
//! thread that stayed would keep a pod's namespace alive, with the links in it. No job relies on where it starts, and no thread does
//! anything else, so no work of the agent ever happens in the wrong namespace.
//!
//! The threads are kept for a while, for waking one takes a busy machine far less than starting one: the scheduler lets a new thread
//! wait behind all others (2.5 ms where a woken one took 0.1, measured with four times as many runnable threads as processors).

use std::{
    collections::VecDeque,
    fmt, io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use crate::netns::Netns;

/// Stack of a thread, bytes: netlink buffers are on the heap, and nothing recurses.
const STACK: usize = 256 * 1024;

/// How long a thread waits for another job. Longer than clients' usual refresh of some seconds, so that a node in use keeps its
/// threads.
const IDLE: Duration = Duration::from_secs(30);

type Job = Box<dyn FnOnce() + Send>;

/// A bounded number of threads, started when needed. Dropped, it lets them finish what is queued.
pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    name: &'static str,
    home: Netns,
    limit: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Pool {
    pub(super) fn new(name: &'static str, home: Netns, limit: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                name,
                home,
                limit,
                state: Mutex::default(),
                wake: Condvar::new(),
            }),
        }
    }

    /// Queues a job. An error: there is no thread to do it. A job that is dropped undone was lost so later.
    pub(super) fn run(&self, job: Job) -> io::Result<()> {
        let mut state = self.shared.lock();
        if state.queue.len() < state.idle {
            state.queue.push_back(job);
            self.shared.wake.notify_one();
            return Ok(());
        }
        // At the limit, or when no further thread can be had, those that there are will come to it.
        if state.threads < self.shared.limit
            && let Err(error) = Shared::start(&self.shared, &mut state)
            && state.threads == 0
        {
            return Err(error);
        }
        state.queue.push_back(job);
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(shared: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let worker = shared.clone();
        thread::Builder::new()
            .name(shared.name.to_owned())
            .stack_size(STACK)
            .spawn(move || Self::work(&worker))?;
        state.threads += 1;
        Ok(())
    }

    fn work(shared: &Arc<Self>) {
        while let Some(job) = shared.next() {
            // Whoever waits for it learns of a panic by the channel that is dropped then.
            let _ = catch_unwind(AssertUnwindSafe(job));
            if let Err(error) = shared.home.enter() {
                tracing::warn!(%error, thread = shared.name, "a thread ends: it cannot return to the node's network namespace");
                return shared.clone().replace();
            }
        }
    }

    /// The next job. None: there was none for long, or there will be none.
    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let (woken, waited) = self
                .wake
                .wait_timeout(state, IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                break;
            }
        }
        state.threads -= 1;
        None
    }

    /// Ends the calling thread's part and has another one go on, should there be anything to do.
    fn replace(self: Arc<Self>) {
        let mut state = self.lock();
        state.threads -= 1;
        if state.queue.is_empty() {
            return;
        }
        if let Err(error) = Self::start(&self, &mut state)
            && state.threads == 0
        {
            tracing::error!(%error, lost = state.queue.len(), "no thread for work in network namespaces");
            state.queue.clear();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.lock();
        f.debug_struct("Pool")
            .field("name", &self.shared.name)
            .field("threads", &state.threads)
            .field("queue", &state.queue.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn pool(limit: usize) -> Pool {
        Pool::new("test", Netns::current().unwrap(), limit)
    }

    fn threads(pool: &Pool) -> usize {
        pool.shared.lock().threads
    }

    #[test]
    fn works_at_once_up_to_its_limit() {
        let pool = pool(2);
        let (started, starts) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let released = Arc::new(Mutex::new(released));
        for _ in 0..4 {
            let (started, released) = (started.clone(), released.clone());
            pool.run(Box::new(move || {
                started.send(()).unwrap();
                released.lock().unwrap().recv().unwrap();
            }))
            .unwrap();
        }
        assert_eq!((starts.recv(), starts.recv()), (Ok(()), Ok(())));
        assert_eq!(
            (threads(&pool), starts.try_recv()),
            (2, Err(mpsc::TryRecvError::Empty))
        );
        for _ in 0..4 {
            release.send(()).unwrap();
        }
        assert_eq!((starts.recv(), starts.recv()), (Ok(()), Ok(())));
        assert_eq!(threads(&pool), 2);
    }

    #[test]
    fn a_thread_is_used_again() {
        let pool = pool(8);
        let (sender, receiver) = mpsc::channel();
        for _ in 0..20 {
            let sender = sender.clone();
            pool.run(Box::new(move || {
                sender.send(thread::current().id()).unwrap()
            }))
            .unwrap();
            receiver.recv().unwrap();
            // It waits again a moment later.
            while pool.shared.lock().idle == 0 {
                thread::yield_now();
            }
        }
        assert_eq!(threads(&pool), 1);
    }

    #[test]
    fn survives_a_panic() {
        let pool = pool(1);
        let (sender, receiver) = mpsc::channel::<u32>();
        let first = sender.clone();
        pool.run(Box::new(move || {
            let _sender = first;
            panic!("expected: a job that panics");
        }))
        .unwrap();
        pool.run(Box::new(move || sender.send(1).unwrap())).unwrap();
        assert_eq!(
            (receiver.recv(), receiver.recv()),
            (Ok(1), Err(mpsc::RecvError))
        );
    }

    #[test]
    fn dropped_it_finishes_and_goes() {
        let pool = pool(1);
        let (sender, receiver) = mpsc::channel();
        for job in 0..3 {
            let sender = sender.clone();
            pool.run(Box::new(move || sender.send(job).unwrap()))
                .unwrap();
        }
        let shared = Arc::downgrade(&pool.shared);
        drop((pool, sender));
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [0, 1, 2]);
        while shared.strong_count() > 0 {
            thread::yield_now();
        }
    }
}
