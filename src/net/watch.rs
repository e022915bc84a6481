//! Interfaces that come and go while a container runs, which no engine calls the runtime for.
//!
//! A process of its own that holds CAP_NET_ADMIN over the container's network namespace, and no other capability. In: the
//! kernel's notices of links, addresses and routes there. Out: an interface that comes takes a spare NIC, one that goes
//! gives its NIC back, and the guest is told, also of addresses and routes that are new. Must not: read a byte of the
//! guest's outside a child that has given up everything, or run where the namespace outlives the container.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use a3s_box_proto::{Nic, Request, Setting};
use anyhow::{Context, Result};
use caps::Capability;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::localhost::ended_well;
use super::netlink::Netlink;
use super::snapshot::{self, Interface, Links};
use super::{attach, redirect};
use crate::courier::{self, bear};
use crate::jail;

/// An engine's changes come as one once it has made none for this long.
const QUIET: Duration = Duration::from_millis(200);
/// How long after a failure it is tried again, at first and at last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What stands for what, and what the guest was told last.
pub struct Standing {
    /// How many NICs there are.
    pub nics: u8,
    /// Slots and the numbers of their interfaces.
    pub taken: Vec<(u8, u32)>,
    /// As they were sent.
    pub settings: Vec<Setting>,
}

/// Watches until the monitor ends, in the calling process's network namespace.
pub fn live(id: &str, mut standing: Standing) -> Result<()> {
    let notices = listen().context("listen for changes of the network")?;
    let mut netlink = Netlink::open()?;
    jail::drop_privileges_but(&[Capability::CAP_NET_ADMIN])?;
    let mut pause = FIRST_PAUSE;
    loop {
        if standing.catch_up(id, &mut netlink).is_ok() {
            pause = FIRST_PAUSE;
            await_change(&notices)?;
        } else {
            // An engine may be half-way through. Attempts are noticed as changes themselves, so these cannot be waited for.
            std::thread::sleep(pause);
            pause = LONGEST_PAUSE.min(pause * 2);
        }
    }
}

fn listen() -> nix::Result<OwnedFd> {
    let groups = libc::RTMGRP_LINK
        | libc::RTMGRP_IPV4_IFADDR
        | libc::RTMGRP_IPV6_IFADDR
        | libc::RTMGRP_IPV4_ROUTE
        | libc::RTMGRP_IPV6_ROUTE;
    let route = SockProtocol::NetlinkRoute;
    let notices = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, route)?;
    bind(notices.as_raw_fd(), &NetlinkAddr::new(0, groups as u32))?;
    Ok(notices)
}

/// Waits for changes to come and to end.
fn await_change(notices: &OwnedFd) -> Result<()> {
    let quiet = PollTimeout::try_from(QUIET).unwrap_or(PollTimeout::ZERO);
    let mut patience = PollTimeout::NONE;
    while poll(&mut [PollFd::new(notices.as_fd(), PollFlags::POLLIN)], patience)? > 0 {
        // What was said does not matter, nor that some of it was lost: all is looked at.
        let _ = recv(notices.as_raw_fd(), &mut [0; 1], MsgFlags::empty());
        patience = quiet;
    }
    Ok(())
}

impl Standing {
    /// Makes the guest's network what the namespace's is now.
    fn catch_up(&mut self, id: &str, netlink: &mut Netlink) -> Result<()> {
        let links = snapshot::links(netlink)?;
        let mut left = Ok(());
        for (slot, index) in self.taken.clone() {
            if !links.interfaces.iter().any(|interface| interface.index == index) {
                // One that the guest still has is no NIC to spare.
                match tell(&Request::Unplug { container: id.into(), slot, index }) {
                    Ok(()) => self.release(netlink, &links, slot),
                    Err(error) => left = Err(error),
                }
            }
        }
        let mut nics = Vec::new();
        for interface in &links.interfaces {
            if self.has(interface) {
                continue;
            }
            let Some((slot, tap)) = self.spare().and_then(|slot| Some((slot, links.tap(slot)?))) else {
                break;
            };
            if attach(netlink, interface, tap).is_ok() {
                self.taken.push((slot, interface.index));
                nics.push(snapshot::nic(slot, interface));
            }
        }
        let told = self.tell_all(id, netlink, &links, nics.clone());
        if told.is_err() {
            // All as it was, until the next attempt.
            for (slot, index) in self.taken.clone() {
                if nics.iter().any(|nic| nic.slot == slot) {
                    self.release(netlink, &links, slot);
                    let _ = tell(&Request::Unplug { container: id.into(), slot, index });
                }
            }
        }
        told.and(left)
    }

    fn tell_all(&mut self, id: &str, netlink: &mut Netlink, links: &Links, nics: Vec<Nic>) -> Result<()> {
        let taken = links.interfaces.iter().filter(|interface| self.has(interface)).cloned();
        let settings = snapshot::settings(netlink, &taken.collect::<Vec<_>>())?;
        if nics.is_empty() && settings == self.settings {
            return Ok(());
        }
        tell(&Request::Plug { container: id.into(), nics, settings: settings.clone() })?;
        self.settings = settings;
        Ok(())
    }

    /// Undoes [`attach`].
    fn release(&mut self, netlink: &mut Netlink, links: &Links, slot: u8) {
        for (_, index) in self.taken.extract_if(.., |(of, _)| *of == slot) {
            for link in links.tap(slot).into_iter().chain([index]) {
                // It may be what is gone.
                let _ = redirect::disconnect(netlink, link);
            }
        }
    }

    fn has(&self, interface: &Interface) -> bool {
        self.taken.iter().any(|(_, index)| *index == interface.index)
    }

    /// A slot that stands for nothing.
    fn spare(&self) -> Option<u8> {
        (0..self.nics).find(|slot| self.taken.iter().all(|(of, _)| of != slot))
    }
}

/// Tells the guest, by a child without privilege.
fn tell(request: &Request) -> Result<()> {
    let child = bear(|| {
        jail::keep_only(&[]);
        jail::drop_privileges()?;
        courier::ask(courier::dial()?, request).map(drop)
    })?;
    ended_well(child)
}
