//! What a network namespace holds, as messages by which the guest makes the same.
//!
//! In: the kernel's own dumps. Out: rtnetlink messages under the same interface numbers, so that the guest only has to
//! send them. Must not: change anything.

use std::collections::HashSet;

use a3s_box_proto::{Nic, Setting};
use anyhow::{Context, Result, bail};
use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol};

use super::netlink::Netlink;
use super::tap;

/// The number of every namespace's loopback interface.
pub const LOOPBACK: u32 = 1;

/// An interface whose place a NIC takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MTU.
    pub mtu: u32,
    mac: Vec<u8>,
}

/// The links of a namespace: interfaces in use, and taps of VMs with their slots.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Links {
    /// In order of their numbers.
    pub interfaces: Vec<Interface>,
    /// Slot and number.
    pub taps: Vec<(u8, u32)>,
}

impl Links {
    /// The number of a slot's tap.
    pub fn tap(&self, slot: u8) -> Option<u32> {
        self.taps.iter().find(|(of, _)| *of == slot).map(|(_, index)| *index)
    }
}

/// Looks for interfaces. One that is down is none: kernels put fallback tunnels into every namespace.
pub fn links(netlink: &mut Netlink) -> Result<Links> {
    let dump =
        netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default())).context("list interfaces")?;
    let mut links = Links::default();
    for message in dump {
        if let RouteNetlinkMessage::NewLink(link) = message {
            sort(link, &mut links)?;
        }
    }
    links.interfaces.sort_by_key(|interface| interface.index);
    Ok(links)
}

fn sort(link: LinkMessage, links: &mut Links) -> Result<()> {
    let index = link.header.index;
    let (mut name, mut mtu, mut mac) = (String::new(), 0, Vec::new());
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text,
            LinkAttribute::Mtu(number) => mtu = number,
            LinkAttribute::Address(bytes) => mac = bytes,
            _ => {}
        }
    }
    if let Some(slot) = tap::slot(&name) {
        links.taps.push((slot, index));
    } else if link.header.link_layer_type == LinkLayerType::Loopback
        || !link.header.flags.contains(LinkFlags::Up)
    {
    } else if link.header.link_layer_type == LinkLayerType::Ether && mac.len() == 6 {
        links.interfaces.push(Interface { index, name, mtu, mac });
    } else {
        bail!("network interface {name}: it is not an Ethernet, which is all that a VM can take over");
    }
    Ok(())
}

/// What moves a NIC to its container and makes it the interface.
pub fn nic(slot: u8, interface: &Interface) -> Nic {
    let mut link = LinkMessage::default();
    link.attributes = vec![
        LinkAttribute::NewIfIndex(interface.index as i32),
        LinkAttribute::IfName(interface.name.clone()),
        LinkAttribute::Address(interface.mac.clone()),
        LinkAttribute::Mtu(interface.mtu),
        no_own_addresses(),
    ];
    let link = setting(interface.name.clone(), RouteNetlinkMessage::NewLink(link), 0);
    Nic { slot, link }
}

/// Keeps IPv6 from giving an interface a link-local address of its own.
pub fn no_own_addresses() -> LinkAttribute {
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        In6AddrGenMode::None,
    )])])
}

/// Brings a link up.
pub fn up(index: u32, more: Vec<LinkAttribute>) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes = more;
    RouteNetlinkMessage::NewLink(link)
}

/// Addresses, routes and fixed neighbours of the interfaces, in the order in which they can be made.
pub fn settings(netlink: &mut Netlink, interfaces: &[Interface]) -> Result<Vec<Setting>> {
    let indexes: HashSet<u32> = interfaces.iter().map(|interface| interface.index).collect();
    let mut settings = Vec::new();
    for interface in interfaces {
        settings.push(setting(format!("{}: up", interface.name), up(interface.index, Vec::new()), 0));
    }
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    for message in netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        let RouteNetlinkMessage::NewAddress(message) = message else { continue };
        if let Some((what, message)) = address(message, &indexes) {
            settings.push(setting(what, RouteNetlinkMessage::NewAddress(message), flags));
        }
    }
    let mut routes = Vec::new();
    for message in netlink.dump(RouteNetlinkMessage::GetRoute(RouteMessage::default()))? {
        let RouteNetlinkMessage::NewRoute(message) = message else { continue };
        routes.extend(route(message, &indexes));
    }
    // A gateway must be reachable by a route that is there already.
    routes.sort_by_key(|message| has_gateway(&message.attributes));
    for message in routes {
        settings.push(setting(describe(&message), RouteNetlinkMessage::NewRoute(message), flags));
    }
    for message in netlink.dump(RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))? {
        let RouteNetlinkMessage::NewNeighbour(message) = message else { continue };
        if let Some(message) = neighbour(message, &indexes) {
            settings.push(setting("neighbour".into(), RouteNetlinkMessage::NewNeighbour(message), flags));
        }
    }
    Ok(settings)
}

fn setting(what: String, message: RouteNetlinkMessage, flags: u16) -> Setting {
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    Setting { what, kind: message.message_type(), flags, body }
}

/// The address as another stack takes it over: nobody asks again whether it is free.
fn address(mut message: AddressMessage, indexes: &HashSet<u32>) -> Option<(String, AddressMessage)> {
    const STATES: AddressFlags = AddressFlags::Tentative
        .union(AddressFlags::Dadfailed)
        .union(AddressFlags::Optimistic)
        .union(AddressFlags::Permanent)
        .union(AddressFlags::Secondary)
        .union(AddressFlags::Deprecated);
    let mut shown = String::new();
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    message.attributes.retain(|attribute| match attribute {
        AddressAttribute::Address(address) | AddressAttribute::Local(address) => {
            shown = format!("address {address}/{}", message.header.prefix_len);
            true
        }
        AddressAttribute::Flags(all) => {
            flags = *all;
            false
        }
        AddressAttribute::TargetNetNsId(_) | AddressAttribute::Other(_) => false,
        _ => true,
    });
    let on_loopback = message.header.index == LOOPBACK && !is_loopback(&message.attributes);
    if !indexes.contains(&message.header.index) && !on_loopback {
        return None;
    }
    flags = flags.difference(STATES).union(AddressFlags::Nodad);
    message.header.flags = AddressHeaderFlags::from_bits_retain(flags.bits() as u8);
    message.attributes.push(AddressAttribute::Flags(flags));
    Some((shown, message))
}

fn is_loopback(attributes: &[AddressAttribute]) -> bool {
    attributes.iter().any(|attribute| match attribute {
        AddressAttribute::Address(address) | AddressAttribute::Local(address) => address.is_loopback(),
        _ => false,
    })
}

/// A route over the interfaces, without what the kernel adds by itself.
fn route(mut message: RouteMessage, indexes: &HashSet<u32>) -> Option<RouteMessage> {
    // The guest kernel has no other table than main: it would put all routes into one.
    if message.header.protocol == RouteProtocol::Kernel || table(&message) != u32::from(libc::RT_TABLE_MAIN) {
        return None;
    }
    let ours = message.attributes.iter().all(|attribute| match attribute {
        RouteAttribute::Oif(index) => indexes.contains(index) || *index == LOOPBACK,
        RouteAttribute::MultiPath(hops) => hops.iter().all(|hop| indexes.contains(&hop.interface_index)),
        _ => true,
    });
    message.attributes.retain(|attribute| {
        use RouteAttribute::{CacheInfo, NhId, Other};
        !matches!(attribute, CacheInfo(_) | NhId(_) | Other(_))
    });
    // What is observed of a route (dead, offloaded, …) is no part of it.
    message.header.flags = message.header.flags.intersection(netlink_packet_route::route::RouteFlags::Onlink);
    ours.then_some(message)
}

fn table(message: &RouteMessage) -> u32 {
    let long = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    long.unwrap_or(message.header.table.into())
}

fn has_gateway(attributes: &[RouteAttribute]) -> bool {
    use RouteAttribute::{Gateway, MultiPath, Via};
    attributes.iter().any(|attribute| matches!(attribute, Gateway(_) | MultiPath(_) | Via(_)))
}

fn describe(message: &RouteMessage) -> String {
    use netlink_packet_route::route::RouteAddress::{Inet, Inet6};
    let to = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(Inet(address)) => Some(address.to_string()),
        RouteAttribute::Destination(Inet6(address)) => Some(address.to_string()),
        _ => None,
    });
    match to {
        Some(to) => format!("route to {to}/{}", message.header.destination_prefix_length),
        None => "default route".into(),
    }
}

fn neighbour(mut message: NeighbourMessage, indexes: &HashSet<u32>) -> Option<NeighbourMessage> {
    if message.header.state != NeighbourState::Permanent || !indexes.contains(&message.header.ifindex) {
        return None;
    }
    message.attributes.retain(|attribute| {
        matches!(attribute, NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_))
    });
    Some(message)
}
