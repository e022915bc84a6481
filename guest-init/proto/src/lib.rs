//! The control protocol between the host's processes and guest-init.
//!
//! # Layout
//! - [`frame`]: bytes to frames and back, bounded, fed from any transport.
//! - [`message`]: what a message frame says: requests, outcomes, events.
//! - [`container`]: what a request to build a container or a process holds.
//! - [`credit`]: how much one side may send before the other has consumed it.
//! - [`sockets`]: what is said about sockets of the host's that containers use.
//!
//! In: bytes and typed values. Out: typed values and bytes. Must not: do any I/O, look at a clock, or trust a peer.

use std::time::Duration;

pub mod container;
pub mod credit;
pub mod frame;
pub mod message;
pub mod sockets;

pub use container::*;
pub use credit::Window;
pub use frame::{Decoder, Frame, Stream};
pub use message::*;

/// Version of this protocol. Both ends come out of one binary, so it only ever differs when an old
/// container's guest is addressed by a newer a3s-box; the greeting tells.
pub const VERSION: u16 = 3;

/// How often the guest says that it works on a request whose outcome takes longer.
pub const WORKING: Duration = Duration::from_secs(3);

/// The vsock port on which guest-init listens; the host's socket is mapped to it.
pub const CONTROL_PORT: u32 = 1024;

/// What guest-init prints on the console once the port can be dialled.
pub const LISTENING: &str = "a3s-box: guest-init listens";
