//! Configures the guest's interfaces over route netlink: what CNI gave the pod's namespace on the host.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use catamaran_guest_protocol::v1::{ConfigureInterfaceRequest, Neighbour, Route};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::error::{Context, Error, Result};

/// How long a plugged device may take to appear; emulated guests are slow.
const APPEARS_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Longest interface name, without the terminating NUL.
const NAME_MAX: usize = 15;
/// Bounds of one request.
const ENTRIES_MAX: usize = 1024;

/// Brings the interface with the request's MAC into the request's state.
pub(crate) async fn configure(request: &ConfigureInterfaceRequest) -> Result<()> {
    let plan = Plan::new(request)?;
    let mut netlink = Netlink::open()?;
    let found = wait_for(&mut netlink, &request.mac).await?;
    if found.name != request.name {
        netlink.set_link(found.index, |link| link.header.change_mask = LinkFlags::Up)?;
        netlink.set_link(found.index, |link| {
            link.attributes.push(LinkAttribute::IfName(request.name.clone()));
        })?;
    }
    netlink.set_link(found.index, |link| {
        if request.mtu != 0 {
            link.attributes.push(LinkAttribute::Mtu(request.mtu));
        }
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
    })?;
    for (address, prefix) in &plan.addresses {
        netlink.add_address(found.index, *address, *prefix)?;
    }
    // Routes to neighbours on the link first: gateways are reached through them.
    for route in plan
        .routes
        .iter()
        .filter(|route| route.gateway.is_none())
        .chain(plan.routes.iter().filter(|route| route.gateway.is_some()))
    {
        netlink.add_route(found.index, route)?;
    }
    for (address, neighbour) in &plan.neighbours {
        netlink.add_neighbour(found.index, *address, neighbour)?;
    }
    Ok(())
}

/// Sets loopback up; it gets its addresses from the kernel.
pub(crate) fn loopback_up() -> Result<()> {
    let mut netlink = Netlink::open()?;
    let loopback = netlink
        .links()?
        .into_iter()
        .find(|link| link.name == "lo")
        .ok_or_else(|| Error::Unsupported("the guest kernel has no loopback interface".into()))?;
    netlink.set_link(loopback.index, |link| {
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
    })
}

async fn wait_for(netlink: &mut Netlink, mac: &[u8]) -> Result<Link> {
    let deadline = Instant::now() + APPEARS_WITHIN;
    loop {
        if let Some(link) = netlink.links()?.into_iter().find(|link| link.mac == mac) {
            return Ok(link);
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout(format!(
                "no interface with MAC {} appeared within {} s",
                mac.iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect::<Vec<_>>()
                    .join(":"),
                APPEARS_WITHIN.as_secs()
            )));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

struct RoutePlan {
    destination: Option<(IpAddr, u8)>,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    scope: u8,
    priority: u32,
    onlink: bool,
}

/// A request, checked.
struct Plan {
    addresses: Vec<(IpAddr, u8)>,
    routes: Vec<RoutePlan>,
    neighbours: Vec<(IpAddr, Neighbour)>,
}

impl Plan {
    fn new(request: &ConfigureInterfaceRequest) -> Result<Self> {
        if request.mac.len() != 6 {
            return Err(Error::Invalid(format!(
                "mac must be 6 bytes, not {}",
                request.mac.len()
            )));
        }
        let name = request.name.as_bytes();
        if name.is_empty()
            || name.len() > NAME_MAX
            || name
                .iter()
                .any(|byte| byte.is_ascii_whitespace() || matches!(byte, b'/' | b':' | 0))
            || matches!(name, b"." | b"..")
        {
            return Err(Error::Invalid(format!(
                "name {:?} is no interface name",
                request.name
            )));
        }
        if [
            request.addresses.len(),
            request.routes.len(),
            request.neighbours.len(),
        ]
        .iter()
        .any(|count| *count > ENTRIES_MAX)
        {
            return Err(Error::Invalid(format!(
                "more than {ENTRIES_MAX} addresses, routes or neighbours"
            )));
        }
        let addresses = request
            .addresses
            .iter()
            .map(|address| cidr("addresses", address))
            .collect::<Result<_>>()?;
        let routes = request.routes.iter().map(route_plan).collect::<Result<_>>()?;
        let neighbours = request
            .neighbours
            .iter()
            .map(|neighbour| Ok((ip("neighbours.address", &neighbour.address)?, neighbour.clone())))
            .collect::<Result<_>>()?;
        Ok(Self {
            addresses,
            routes,
            neighbours,
        })
    }
}

fn route_plan(route: &Route) -> Result<RoutePlan> {
    let optional = |field: &str, text: &str| (!text.is_empty()).then(|| ip(field, text)).transpose();
    let destination = (!route.destination.is_empty())
        .then(|| cidr("routes.destination", &route.destination))
        .transpose()?;
    let gateway = optional("routes.gateway", &route.gateway)?;
    let source = optional("routes.source", &route.source)?;
    let scope = u8::try_from(route.scope)
        .map_err(|_| Error::Invalid(format!("routes.scope {} is no route scope", route.scope)))?;
    let mut families = destination
        .map(|(ip, _)| ip)
        .into_iter()
        .chain(gateway)
        .chain(source)
        .map(|ip| ip.is_ipv4());
    match families.next() {
        None => {
            return Err(Error::Invalid(
                "a route needs a destination, a gateway or a source".into(),
            ));
        }
        Some(first) if families.any(|family| family != first) => {
            return Err(Error::Invalid("a route mixes IPv4 and IPv6".into()));
        }
        Some(_) => {}
    }
    Ok(RoutePlan {
        destination,
        gateway,
        source,
        scope,
        priority: route.priority,
        onlink: route.onlink,
    })
}

fn ip(field: &str, text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| Error::Invalid(format!("{field}: {text:?} is no IP address")))
}

fn cidr(field: &str, text: &str) -> Result<(IpAddr, u8)> {
    let wrong = || Error::Invalid(format!("{field}: {text:?} is not in CIDR notation"));
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if prefix > longest {
        Err(wrong())
    } else {
        Ok((address, prefix))
    }
}

struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
}

/// A route netlink socket; the kernel answers while a request is sent, so nothing here waits.
struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    fn open() -> Result<Self> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            Ok(socket)
        };
        Ok(Self {
            socket: open().context(|| "cannot open route netlink".into())?,
            sequence: 0,
        })
    }

    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let message =
                    NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
                // Messages are padded to four bytes.
                let length = (message.header.length as usize).next_multiple_of(4).max(16);
                rest = rest.get(length..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    fn links(&mut self) -> Result<Vec<Link>> {
        let answers = self
            .request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)
            .context(|| "cannot list interfaces".into())?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| {
                let RouteNetlinkMessage::NewLink(link) = answer else {
                    return None;
                };
                let mut found = Link {
                    index: link.header.index,
                    name: String::new(),
                    mac: Vec::new(),
                };
                for attribute in link.attributes {
                    match attribute {
                        LinkAttribute::IfName(name) => found.name = name,
                        LinkAttribute::Address(mac) => found.mac = mac,
                        _ => {}
                    }
                }
                Some(found)
            })
            .collect())
    }

    fn set_link(&mut self, index: u32, change: impl FnOnce(&mut LinkMessage)) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        change(&mut link);
        self.request(RouteNetlinkMessage::SetLink(link), NLM_F_ACK)
            .map(drop)
            .context(|| format!("cannot configure interface {index}"))
    }

    fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = prefix;
        message.header.family = family(address);
        message.attributes.push(AddressAttribute::Address(address));
        match address {
            IpAddr::V4(v4) => {
                message.attributes.push(AddressAttribute::Local(address));
                if prefix < 31 {
                    let host = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
                    message
                        .attributes
                        .push(AddressAttribute::Broadcast((u32::from(v4) | host).into()));
                }
            }
            // CNI has made sure that the address is the pod's own; waiting a second for it helps nobody.
            IpAddr::V6(_) => message.header.flags = AddressHeaderFlags::Nodad,
        }
        self.request(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map(drop)
        .context(|| format!("cannot add address {address}/{prefix}"))
    }

    fn add_route(&mut self, index: u32, route: &RoutePlan) -> Result<()> {
        let mut message = RouteMessage::default();
        let any = route
            .destination
            .map(|(ip, _)| ip)
            .or(route.gateway)
            .or(route.source);
        message.header.address_family = any.map_or(AddressFamily::Inet, family);
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = RouteScope::from(route.scope);
        message.header.kind = RouteType::Unicast;
        if route.onlink {
            message.header.flags = RouteFlags::Onlink;
        }
        if let Some((destination, prefix)) = route.destination {
            message.header.destination_prefix_length = prefix;
            message
                .attributes
                .push(RouteAttribute::Destination(route_address(destination)));
        }
        if let Some(gateway) = route.gateway {
            message
                .attributes
                .push(RouteAttribute::Gateway(route_address(gateway)));
        }
        if let Some(source) = route.source {
            message
                .attributes
                .push(RouteAttribute::PrefSource(route_address(source)));
        }
        if route.priority != 0 {
            message.attributes.push(RouteAttribute::Priority(route.priority));
        }
        message.attributes.push(RouteAttribute::Oif(index));
        self.request(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map(drop)
        .context(|| {
            let to = route
                .destination
                .map_or("default".into(), |(ip, prefix)| format!("{ip}/{prefix}"));
            let via = route
                .gateway
                .map_or(String::new(), |gateway| format!(" via {gateway}"));
            format!("cannot add route {to}{via}")
        })
    }

    fn add_neighbour(&mut self, index: u32, address: IpAddr, neighbour: &Neighbour) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = index;
        let state = u16::try_from(neighbour.state)
            .map_err(|_| Error::Invalid(format!("neighbours.state {} is no state", neighbour.state)))?;
        message.header.state = if state == 0 {
            NeighbourState::Permanent
        } else {
            state.into()
        };
        message.header.kind = RouteType::Unicast;
        message
            .attributes
            .push(NeighbourAttribute::Destination(match address {
                IpAddr::V4(address) => NeighbourAddress::Inet(address),
                IpAddr::V6(address) => NeighbourAddress::Inet6(address),
            }));
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(neighbour.mac.clone()));
        self.request(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map(drop)
        .context(|| format!("cannot add neighbour {address}"))
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> ConfigureInterfaceRequest {
        ConfigureInterfaceRequest {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: vec!["10.1.0.2/16".into(), "fd00::2/64".into()],
            routes: vec![Route {
                gateway: "10.1.0.1".into(),
                ..Route::default()
            }],
            neighbours: Vec::new(),
        }
    }

    #[test]
    fn a_good_request_becomes_a_plan() {
        let plan = Plan::new(&request()).unwrap();
        assert_eq!(plan.addresses.len(), 2);
        assert_eq!(plan.routes[0].gateway, Some("10.1.0.1".parse().unwrap()));
        assert_eq!(plan.routes[0].destination, None);
    }

    #[test]
    fn wrong_fields_are_named() {
        let refused = |change: fn(&mut ConfigureInterfaceRequest), word: &str| {
            let mut request = request();
            change(&mut request);
            let error = Plan::new(&request).err().expect("refused").to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(|r| r.mac = vec![1], "mac");
        refused(|r| r.name = "a/b".into(), "name");
        refused(|r| r.name = "a".repeat(16), "name");
        refused(|r| r.addresses = vec!["10.1.0.2".into()], "addresses");
        refused(|r| r.addresses = vec!["10.1.0.2/33".into()], "addresses");
        refused(|r| r.routes[0].gateway = "x".into(), "routes.gateway");
        refused(|r| r.routes[0].destination = "fd00::/8".into(), "mixes");
        refused(|r| r.routes[0].gateway.clear(), "destination");
        refused(|r| r.routes[0].scope = 300, "scope");
    }
}
