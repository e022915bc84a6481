//! Credit: how much of a stream may be on its way.
//!
//! libkrun writes to a host peer from its main thread, so one full socket would stall every connection of the VM
//! and even its exit. A sender therefore never has more than [`WINDOW`] outstanding per stream; two streams' windows
//! fit a Unix socket's default buffer (208 KiB), frame overhead included. In: sizes sent and credited. Out: how much
//! may go now. Must not: trust a peer's credit beyond what was sent.

/// Bytes outstanding per stream, frame charges included.
pub const WINDOW: u32 = 64 << 10;
/// What each data frame costs beside its bytes: the kernel accounts about this much per small packet.
pub const FRAME_COST: u32 = 1 << 10;

/// The sender's side of one stream.
#[derive(Debug)]
pub struct Window {
    free: u32,
}

impl Default for Window {
    fn default() -> Self {
        Window { free: WINDOW }
    }
}

impl Window {
    /// How many bytes the next data frame may hold; 0 means wait for credit.
    pub fn allowance(&self) -> usize {
        self.free.saturating_sub(FRAME_COST).min(crate::frame::MAX_DATA as u32) as usize
    }

    /// Notes a data frame of `bytes` as sent. `bytes` must not exceed the allowance.
    pub fn sent(&mut self, bytes: usize) {
        self.free = self.free.saturating_sub(cost(bytes));
    }

    /// Takes credit back; what a hostile peer grants beyond the window is dropped.
    pub fn credited(&mut self, credit: u32) {
        self.free = self.free.saturating_add(credit).min(WINDOW);
    }
}

/// The credit that a data frame of `bytes` uses, to be granted back once it is consumed.
pub fn cost(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX).saturating_add(FRAME_COST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_stops_at_the_window_and_goes_on_with_credit() {
        let mut window = Window::default();
        let mut outstanding = Vec::new();
        while window.allowance() > 0 {
            let n = window.allowance().min(10_000);
            window.sent(n);
            outstanding.push(n);
        }
        let total: u32 = outstanding.iter().map(|n| cost(*n)).sum();
        assert!(total <= WINDOW, "{total}");
        window.credited(cost(outstanding[0]));
        assert!(window.allowance() > 0);
    }

    #[test]
    fn one_byte_frames_are_bounded_too() {
        let mut window = Window::default();
        let mut frames = 0;
        while window.allowance() > 0 {
            window.sent(1);
            frames += 1;
        }
        assert!(frames <= 64, "{frames}");
    }

    #[test]
    fn credit_out_of_nothing_is_dropped() {
        let mut window = Window::default();
        window.credited(u32::MAX);
        window.sent(window.allowance());
        window.sent(window.allowance());
        assert_eq!(window.allowance(), 0);
    }
}
