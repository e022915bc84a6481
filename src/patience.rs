//! Work that cannot be interrupted and may hang: done in a thread, which is given up when its time is over.
//!
//! In: a piece of work. Out: its result, if it came in time. Must not: leave a second thread behind where all went well,
//! for what comes next forks.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// The work's result, or `None` after `limit`; nobody can stop it then, and its result goes nowhere.
pub fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || sender.send(work()));
    let result = receiver.recv_timeout(limit).ok()?;
    let _ = thread.join();
    Some(result)
}

/// The same where the work computes: the limit is of this process's time on a processor, which others may be using.
pub fn within_work<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    let begin = processor_time();
    let thread = std::thread::spawn(move || sender.send(work()));
    let result = loop {
        let left = limit.saturating_sub(processor_time().saturating_sub(begin));
        if left.is_zero() {
            return None;
        }
        // It cannot be used up any sooner.
        match receiver.recv_timeout(left.max(Duration::from_millis(1))) {
            Ok(result) => break result,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    };
    let _ = thread.join();
    Some(result)
}

fn processor_time() -> Duration {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID);
    now.map_or(Duration::MAX, Duration::from)
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
            let begin = processor_time();
            while processor_time() - begin < Duration::from_secs(2) {}
        };
        assert_eq!(within_work(Duration::from_millis(50), busy), None);
    }
}
