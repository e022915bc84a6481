//! Work that cannot be interrupted and may hang: done in a thread, which is given up when its time is over.
//!
//! In: a piece of work. Out: its result, if it came in time. Must not: leave a second thread behind where all went well,
//! for what comes next forks.

use std::sync::mpsc;
use std::time::Duration;

/// The work's result, or `None` after `limit`; nobody can stop it then, and its result goes nowhere.
pub fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || sender.send(work()));
    let result = receiver.recv_timeout(limit).ok()?;
    let _ = thread.join();
    Some(result)
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
}
