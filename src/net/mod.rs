//! The VM takes the container's place in its network namespace.
//!
//! Each interface found there is cross-connected with a tap, the host's end of one of the VM's NICs, which takes over
//! name, MAC, MTU, addresses and routes. How many NICs there are is settled before the VM boots, which interfaces they
//! stand for only at `start`: engines plug before, between and after. In: a plan, a network namespace. Out: taps and
//! filters there, messages for the guest, and on `clean` nothing of them. Must not: touch a namespace that is not
//! the container's alone.

pub mod localhost;
mod netlink;
mod redirect;
mod snapshot;
mod steer;
mod tap;
pub mod watch;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use a3s_box_proto::{Nic, Setting};
use anyhow::{Context, Result, bail};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use serde::{Deserialize, Serialize};

use crate::plan::network::{MODE, Mode, NICS, Wish};
use crate::plan::{Namespace, Plan, vm::Network};
use crate::store::ProcessId;
use crate::userns::Root;
use crate::vmm::MOST_NICS;
use netlink::Netlink;
use redirect::OWN_PORTS;
use snapshot::Interface;
pub use tap::{NODE, name};
use watch::Standing;

/// The range of local ports of whoever's network namespace it is.
const PORTS: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// What a container has in its network namespace, for `start` and `delete`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Site {
    lasting: Option<Lasting>,
    /// How many NICs the VM has.
    nics: u8,
    /// Interfaces that are, or were about to be, cross-connected.
    connected: Vec<u32>,
}

/// A namespace that outlives the container.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Lasting {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// Its range of local ports, before [`OWN_PORTS`] was it.
    ports: String,
}

/// Decides how the VM is connected. Out: the namespace to join, opened while its path means what the caller meant.
pub fn choose(plan: &mut Plan) -> Result<(Option<File>, Option<Site>)> {
    let mut joined = None;
    if let Namespace::Join(path) = &plan.namespaces.network {
        let file = File::open(path).with_context(|| shown(path))?;
        if [1, std::process::id()].iter().any(|pid| is_network_of(&file, *pid)) {
            plan.namespaces.network = Namespace::Inherit;
        } else {
            joined = Some((path.clone(), file));
        }
    }
    let mode = match (plan.network.mode, &plan.namespaces.network) {
        (Mode::Tap, Namespace::Inherit) => {
            bail!(
                "network-mode \"tap\" (annotation {MODE}, or this host's configuration) needs a network namespace of the container's own, not the host's"
            )
        }
        (Mode::Auto, Namespace::Inherit) => Mode::Tsi,
        (Mode::Auto, _) => Mode::Tap,
        (mode, _) => mode,
    };
    let mut found = None;
    plan.vm.network = match mode {
        Mode::None => Network::None,
        Mode::Tsi => Network::Tsi,
        // The stand-in for tests has no NICs.
        Mode::Auto | Mode::Tap if MOST_NICS == 0 => Network::None,
        Mode::Auto | Mode::Tap => match found.insert(site(joined.as_ref(), plan.network)?).nics {
            0 => Network::None,
            nics => Network::Tap(nics),
        },
    };
    Ok((joined.map(|(_, file)| file), found))
}

fn site(joined: Option<&(PathBuf, File)>, wish: Wish) -> Result<Site> {
    let Some((path, file)) = joined else {
        let nics = wish.nics.unwrap_or(if tap::possible() { wish.spare } else { 0 });
        return Ok(Site { lasting: None, nics, connected: Vec::new() });
    };
    let nics = count(path, file, wish.nics)?;
    let stat = file.metadata().with_context(|| shown(path))?;
    let read = || std::fs::read_to_string(PORTS).context(PORTS);
    let ports = netlink::inside(file.as_fd(), read).with_context(|| shown(path))?;
    let lasting = Lasting { path: path.clone(), device: stat.dev(), inode: stat.ino(), ports };
    Ok(Site { lasting: Some(lasting), nics, connected: Vec::new() })
}

/// How the joining of a namespace is named in errors.
pub fn shown(path: &Path) -> String {
    format!("linux.namespaces: join network namespace {}", path.display())
}

/// How many NICs a namespace by path needs. Its interfaces are known already.
fn count(path: &Path, file: &File, wanted: Option<u8>) -> Result<u8> {
    let links = Netlink::open_in(file.as_fd()).and_then(|mut netlink| snapshot::links(&mut netlink));
    let links = links.with_context(|| shown(path))?;
    if !links.taps.is_empty() {
        bail!(
            "{}: another container's VM stands in it, and VMs cannot share one (annotation {MODE}=tsi can)",
            shown(path)
        );
    }
    if is_of_process(path) {
        bail!(
            "{}: taking over its traffic would cut off the process it belongs to (annotation {MODE}=tsi shares it)",
            shown(path)
        );
    }
    let found = links.interfaces.len();
    enough(found, wanted.unwrap_or(MOST_NICS))?;
    Ok(wanted.unwrap_or(found as u8))
}

fn enough(found: usize, nics: u8) -> Result<()> {
    if found > nics.into() {
        bail!(
            "{found} network interfaces are more than the VM's {nics} NICs (annotation {NICS}, {MOST_NICS} at most, which need {NODE})"
        );
    }
    Ok(())
}

/// `/proc/PID/…`: engines bind namespaces that are a container's own elsewhere.
fn is_of_process(path: &Path) -> bool {
    let mut names = path.components().filter(|component| *component != Component::RootDir);
    names.next() == Some(Component::Normal("proc".as_ref()))
}

fn is_network_of(fd: &File, pid: u32) -> bool {
    let other = std::fs::metadata(format!("/proc/{pid}/ns/net"));
    fd.metadata().ok().zip(other.ok()).is_some_and(|(a, b)| (a.dev(), a.ino()) == (b.dev(), b.ino()))
}

/// Makes the taps of a VM in the calling process's network namespace, brings up
/// its loopback, and keeps a range of local ports for its stack.
pub fn prepare(network: &Network, root: Option<Root>) -> Result<()> {
    let Network::Tap(nics) = network else { return Ok(()) };
    let owner = root.map_or(nix::unistd::geteuid().as_raw(), |root| root.uid);
    (0..*nics).try_for_each(|slot| tap::make(slot, owner))?;
    Netlink::open()?.request(snapshot::up(snapshot::LOOPBACK, Vec::new()), 0).context("bring lo up")?;
    let range = format!("{} {}", OWN_PORTS.start(), OWN_PORTS.end());
    std::fs::write(PORTS, range).context(PORTS)
}

/// What makes the guest's NICs interfaces.
pub struct Plugged {
    /// NICs that move to the container.
    pub nics: Vec<Nic>,
    /// What is set there.
    pub settings: Vec<Setting>,
    /// For [`watch`], where the namespace is the container's own.
    pub standing: Option<Standing>,
}

/// Connects the interfaces that are in the monitor's network namespace now; there may be none. `note` records what is
/// about to be done.
pub fn plug(
    site: &mut Site,
    monitor: ProcessId,
    note: impl FnOnce(&Site) -> Result<()>,
) -> Result<Option<Plugged>> {
    let namespace = File::open(format!("/proc/{}/ns/net", monitor.pid));
    let namespace = namespace.context("the container's network namespace")?;
    // The number may have become another process's before.
    if !monitor.is_alive() {
        bail!("cannot start a container that has stopped");
    }
    let mut netlink = Netlink::open_in(namespace.as_fd())?;
    let links = snapshot::links(&mut netlink)?;
    if links.interfaces.is_empty() {
        return Ok(None);
    }
    enough(links.interfaces.len(), site.nics)?;
    // What a start that failed left behind.
    for link in &site.connected {
        let _ = redirect::disconnect(&mut netlink, *link);
    }
    redirect::refuse_taken(&mut netlink, &links.interfaces)?;
    let taps = links.taps.iter().map(|(_, index)| *index);
    site.connected = links.interfaces.iter().map(|interface| interface.index).chain(taps).collect();
    note(site)?;
    let settings =
        snapshot::settings(&mut netlink, &links.interfaces).context("read the network's settings")?;
    let (mut nics, mut taken) = (Vec::new(), Vec::new());
    for (slot, interface) in (0..).zip(&links.interfaces) {
        let tap = links.tap(slot);
        let tap = tap.with_context(|| format!("network interface {}: it is gone", name(slot)))?;
        attach(&mut netlink, interface, tap)?;
        nics.push(snapshot::nic(slot, interface));
        taken.push((slot, interface.index));
    }
    let standing = Standing { nics: site.nics, taken, settings: settings.clone() };
    let standing = site.lasting.is_none().then_some(standing);
    Ok(Some(Plugged { nics, settings, standing }))
}

/// Cross-connects an interface and the tap that takes its place.
fn attach(netlink: &mut Netlink, interface: &Interface, tap: u32) -> Result<()> {
    connect(netlink, interface, tap).with_context(|| format!("network interface {}", interface.name))
}

fn connect(netlink: &mut Netlink, interface: &Interface, tap: u32) -> Result<()> {
    let mut quiet = LinkMessage::default();
    quiet.header.index = tap;
    quiet.attributes = vec![snapshot::no_own_addresses()];
    // A host without IPv6 refuses, and has nothing to keep quiet.
    let _ = netlink.request(RouteNetlinkMessage::SetLink(quiet), 0);
    netlink
        .request(snapshot::up(tap, vec![LinkAttribute::Mtu(interface.mtu)]), 0)
        .context("bring its tap up")?;
    redirect::connect(netlink, interface.index, tap)
}

/// Removes taps and filters from a namespace that outlives the container, and gives it its ports back. The container's processes are gone.
pub fn clean(site: &Site) -> Result<()> {
    let Some(Lasting { path, device, inode, ports }) = &site.lasting else { return Ok(()) };
    let shown = || format!("clean up network namespace {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file.with_context(shown)?,
    };
    let stat = file.metadata().with_context(shown)?;
    if (stat.dev(), stat.ino()) != (*device, *inode) {
        return Ok(());
    }
    let mut netlink = Netlink::open_in(file.as_fd()).with_context(shown)?;
    for link in &site.connected {
        // It may be gone, or never have been connected.
        let _ = redirect::disconnect(&mut netlink, *link);
    }
    for (_, index) in snapshot::links(&mut netlink).with_context(shown)?.taps {
        let mut link = LinkMessage::default();
        link.header.index = index;
        netlink.request(RouteNetlinkMessage::DelLink(link), 0).with_context(shown)?;
    }
    netlink::inside(file.as_fd(), || std::fs::write(PORTS, ports).context(PORTS)).with_context(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_of_processes_are_told_from_those_bound_elsewhere() {
        for path in ["/proc/1/ns/net", "/proc/self/ns/net", "//proc/1/task/1/ns/net"] {
            assert!(is_of_process(Path::new(path)), "{path}");
        }
        for path in ["/run/netns/a", "/var/run/docker/netns/proc"] {
            assert!(!is_of_process(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn too_many_interfaces_name_the_annotation() {
        assert!(enough(2, 2).is_ok());
        assert!(enough(3, 2).unwrap_err().to_string().contains("annotation a3s.box/nics"));
    }
}
