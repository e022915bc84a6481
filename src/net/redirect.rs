//! Cross-connects an interface and a tap: what comes in on one goes out on the other.
//!
//! clsact with mirred, in the kernel alone. Some of what comes in stays with the namespace's own stack, so that sockets
//! opened inside it (an engine's, asking name servers) keep working: the ports of [`OWN_PORTS`], and copies of the
//! neighbours' answers.

use std::io;
use std::ops::RangeInclusive;

use anyhow::{Context, Result, anyhow};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterFlower, TcFilterFlowerOption as Flower, TcFilterMatchAll, TcFilterMatchAllOption,
    TcHandle, TcHeader, TcMessage, TcMirror, TcMirrorActionType, TcOption,
};

use super::netlink::Netlink;
use super::snapshot::Interface;

/// Local ports of sockets inside the namespace: above the guest's own default range, and one mask wide.
pub const OWN_PORTS: RangeInclusive<u16> = 0xfc00..=0xffff;
const OWN_PORTS_MASK: u16 = 0xfc00;

/// The handle of what a link has one of: clsact, or the older ingress.
const INGRESS: u16 = 0xffff;

const ARP: u16 = libc::ETH_P_ARP as u16;
const IPV4: u16 = libc::ETH_P_IP as u16;
const IPV6: u16 = libc::ETH_P_IPV6 as u16;
const ALL: u16 = libc::ETH_P_ALL as u16;
const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;
const ICMPV6: u8 = libc::IPPROTO_ICMPV6 as u8;
const ARP_REPLY: u8 = 2;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// Fails if an interface has ingress rules already: they are somebody else's, and to be left alone.
pub fn refuse_taken(netlink: &mut Netlink, interfaces: &[Interface]) -> Result<()> {
    for message in netlink.dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()))? {
        let RouteNetlinkMessage::NewQueueDiscipline(TcMessage { header, .. }) = message else { continue };
        if header.handle.major == INGRESS
            && let Some(of) = interfaces.iter().find(|interface| interface.index as i32 == header.index)
        {
            return Err(taken()).with_context(|| format!("network interface {}", of.name));
        }
    }
    Ok(())
}

fn taken() -> anyhow::Error {
    anyhow!("somebody else's ingress rules are there already")
}

/// Connects both, given by index. If it fails, neither is.
pub fn connect(netlink: &mut Netlink, interface: u32, tap: u32) -> Result<()> {
    open(netlink, interface)?;
    let connected = open(netlink, tap).and_then(|()| {
        let filled = fill(netlink, interface, tap);
        filled.inspect_err(|_| drop(disconnect(netlink, tap)))
    });
    connected.inspect_err(|_| drop(disconnect(netlink, interface)))
}

fn open(netlink: &mut Netlink, link: u32) -> Result<()> {
    let mut qdisc = message(link, TcHandle::CLSACT, "clsact");
    qdisc.header.handle = TcHandle { major: INGRESS, minor: 0 };
    let made = netlink.request(RouteNetlinkMessage::NewQueueDiscipline(qdisc), NLM_F_CREATE | NLM_F_EXCL);
    made.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => taken(),
        io::ErrorKind::NotFound => anyhow!("the kernel has no clsact (module sch_ingress)"),
        _ => error.into(),
    })
}

fn fill(netlink: &mut Netlink, interface: u32, tap: u32) -> Result<()> {
    let copy = || mirred(tap, TcMirrorActionType::EgressMirror, TcActionType::Ok);
    let answers = [
        (ARP, vec![Flower::ArpOp(ARP_REPLY), Flower::ArpOpMask(0xff)]),
        (
            IPV6,
            vec![
                Flower::IpProto(ICMPV6),
                Flower::Icmpv6Type(NEIGHBOUR_ADVERTISEMENT),
                Flower::Icmpv6TypeMask(0xff),
            ],
        ),
    ];
    for (priority, (protocol, mut keys)) in (1..).zip(answers) {
        keys.push(Flower::Actions(vec![copy()]));
        flower(netlink, interface, priority, protocol, keys)?;
    }
    for (priority, protocol, transport) in [(3, IPV4, UDP), (3, IPV4, TCP), (4, IPV6, UDP), (4, IPV6, TCP)] {
        let port = *OWN_PORTS.start();
        let (key, mask) = match transport {
            UDP => (Flower::UdpDst(port), Flower::UdpDstMask(OWN_PORTS_MASK)),
            _ => (Flower::TcpDst(port), Flower::TcpDstMask(OWN_PORTS_MASK)),
        };
        // A filter without an action lets pass.
        flower(netlink, interface, priority, protocol, vec![Flower::IpProto(transport), key, mask])?;
    }
    redirect(netlink, interface, tap)?;
    redirect(netlink, tap, interface)
}

/// Undoes [`connect`] on one of them.
pub fn disconnect(netlink: &mut Netlink, link: u32) -> io::Result<()> {
    let qdisc = message(link, TcHandle::CLSACT, "clsact");
    netlink.request(RouteNetlinkMessage::DelQueueDiscipline(qdisc), 0)
}

fn redirect(netlink: &mut Netlink, from: u32, to: u32) -> Result<()> {
    let action = mirred(to, TcMirrorActionType::EgressRedir, TcActionType::Stolen);
    let options = vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]))];
    filter(netlink, from, 10, ALL, TcFilterMatchAll::KIND, options)
}

fn flower(netlink: &mut Netlink, link: u32, priority: u16, protocol: u16, keys: Vec<Flower>) -> Result<()> {
    let options = std::iter::once(Flower::EthType(protocol)).chain(keys).map(TcOption::Flower).collect();
    filter(netlink, link, priority, protocol, TcFilterFlower::KIND, options)
}

fn filter(
    netlink: &mut Netlink,
    link: u32,
    priority: u16,
    protocol: u16,
    kind: &str,
    options: Vec<TcOption>,
) -> Result<()> {
    let ingress = TcHandle { major: INGRESS, minor: TcHandle::MIN_INGRESS };
    let mut filter = message(link, ingress, kind);
    filter.header.info = u32::from(priority) << 16 | u32::from(protocol.to_be());
    filter.attributes.push(TcAttribute::Options(options));
    let made = netlink.request(RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_CREATE);
    made.with_context(|| format!("redirect its traffic (kernel modules cls_{kind} and act_mirred)"))
}

fn message(link: u32, parent: TcHandle, kind: &str) -> TcMessage {
    let header = TcHeader { index: link as i32, parent, ..TcHeader::default() };
    TcMessage::from_parts(header, vec![TcAttribute::Kind(kind.into())])
}

fn mirred(to: u32, how: TcMirrorActionType, then: TcActionType) -> TcAction {
    let mut parameters = TcMirror::default();
    parameters.generic.action = then;
    parameters.eaction = how;
    parameters.ifindex = to;
    let options = vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(parameters))];
    let mut action = TcAction::default();
    action.attributes =
        vec![TcActionAttribute::Kind(TcActionMirror::KIND.into()), TcActionAttribute::Options(options)];
    action
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_mask_covers_exactly_the_own_ports() {
        let masked = |port: u16| port & OWN_PORTS_MASK == *OWN_PORTS.start();
        assert!((0..=u16::MAX).all(|port| masked(port) == OWN_PORTS.contains(&port)));
        // ip_local_port_range's default, which the guest has.
        assert!(!OWN_PORTS.contains(&60_999));
    }
}
