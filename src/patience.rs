//! Work that cannot be interrupted and may hang: done in a thread, which is given up when its time is over.
//!
//! In: a piece of work. Out: its result, if it came in time. Must not: leave a second thread behind where all went well,
//! for what comes next forks.

use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::time::ClockId;

/// The work's result, or `None` after `limit`; nobody can stop it then, and its result goes nowhere.
pub fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let begin = Instant::now();
    bounded(work, |_| limit.saturating_sub(begin.elapsed()))
}

/// The same where the work computes: the limit is of its own time on a processor, which others may be using.
pub fn within_work<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    bounded(work, |thread| limit.saturating_sub(processor_time(thread)))
}

/// Asks what time is left each time that this has passed.
fn bounded<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
    left: impl Fn(&Thread<T>) -> Duration,
) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || sender.send(work()));
    let result = loop {
        let left = left(&thread);
        if left.is_zero() {
            return None;
        }
        match receiver.recv_timeout(left.max(Duration::from_millis(1))) {
            Ok(result) => break result,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    };
    let _ = thread.join();
    Some(result)
}

type Thread<T> = JoinHandle<Result<(), mpsc::SendError<T>>>;

/// What a thread has used; nothing once it has ended.
fn processor_time<T>(thread: &JoinHandle<T>) -> Duration {
    let mut clock = 0;
    // SAFETY: the thread is not joined, so its number is valid; the clock's outlives the call.
    if unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) } != 0 {
        return Duration::ZERO;
    }
    nix::time::clock_gettime(ClockId::from_raw(clock)).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_in_time_counts_and_nothing_else() {
        assert_eq!(within(Duration::from_secs(60), || 1), Some(1));
        let slow = || std::thread::sleep(Duration::from_millis(500));
        assert_eq!(within(Duration::from_millis(1), slow), None);
    }

    #[test]
    fn waiting_is_no_work() {
        let waiting = || std::thread::sleep(Duration::from_millis(500));
        assert_eq!(within_work(Duration::from_millis(300), waiting), Some(()));
        let busy = || {
            let used = || Duration::from(ClockId::CLOCK_THREAD_CPUTIME_ID.now().unwrap());
            while used() < Duration::from_secs(2) {}
        };
        assert_eq!(within_work(Duration::from_millis(50), busy), None);
    }
}
