//! What CNI left on the interfaces of a network namespace.

use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::{NetworkError, cidr};

/// An interface of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name, which the guest's gets too.
    pub name: String,
    /// Index in the namespace.
    pub index: u32,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
    /// CIDR notation.
    pub addresses: Vec<String>,
    /// Those that do not follow from an address, in an order that can be added: on-link ones first.
    pub routes: Vec<Route>,
    /// Permanent ones.
    pub neighbours: Vec<Neighbour>,
}

/// A route through an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// CIDR notation; `0.0.0.0/0` or `::/0` for a default route.
    pub destination: String,
    /// Next hop, if not on-link.
    pub gateway: Option<String>,
    /// Preferred source address.
    pub source: Option<String>,
    /// rtnetlink's number.
    pub scope: u8,
    /// Metric; 0: the kernel's default.
    pub priority: u32,
    /// The gateway is reachable though no route says so.
    pub onlink: bool,
}

/// A permanent neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub address: String,
    /// Its hardware address.
    pub mac: Vec<u8>,
    /// rtnetlink's number.
    pub state: u16,
}

/// All interfaces but loopback.
pub(super) async fn list(handle: &Handle) -> Result<Vec<Interface>, NetworkError> {
    let listed = |interface: &str| {
        let interface = interface.to_owned();
        move |source| NetworkError::Netlink {
            action: "list",
            interface,
            source,
        }
    };
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(listed("the pod's interfaces"))?;
    let mut interfaces = links
        .iter()
        .filter_map(from_link)
        .collect::<Result<Vec<Interface>, NetworkError>>()?;
    if interfaces.is_empty() {
        return Ok(interfaces);
    }
    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(listed("the pod's addresses"))?;
    let mut routes: Vec<RouteMessage> = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let query = match version {
            IpVersion::V4 => RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            IpVersion::V6 => RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        };
        let found: Vec<RouteMessage> = handle
            .route()
            .get(query)
            .execute()
            .try_collect()
            .await
            .map_err(listed("the pod's routes"))?;
        routes.extend(found);
    }
    let neighbours: Vec<NeighbourMessage> = handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(listed("the pod's neighbours"))?;
    for interface in &mut interfaces {
        let index = interface.index;
        let own = addresses.iter().filter(|address| address.header.index == index);
        interface.addresses = own.filter_map(from_address).collect();
        interface.routes = routes
            .iter()
            .filter_map(|route| from_route(route, index))
            .collect();
        interface.routes.sort_by_key(|route| route.gateway.is_some());
        let own = neighbours
            .iter()
            .filter(|neighbour| neighbour.header.ifindex == index);
        interface.neighbours = own.filter_map(from_neighbour).collect();
    }
    Ok(interfaces)
}

/// `None` for an interface that the guest has anyway (loopback) or that carries nothing (a tunnel's template,
/// down).
fn from_link(link: &LinkMessage) -> Option<Result<Interface, NetworkError>> {
    let flags = link.header.flags;
    if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) {
        return None;
    }
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(&bytes[..]).ok(),
        _ => None,
    });
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    let (true, Some(mac)) = (link.header.link_layer_type == LinkLayerType::Ether, mac) else {
        let reason = "it is no Ethernet interface";
        return Some(Err(NetworkError::Unsupported { name, reason }));
    };
    Some(Ok(Interface {
        name,
        index: link.header.index,
        mac,
        mtu: mtu.unwrap_or(1500),
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
    }))
}

fn from_address(message: &AddressMessage) -> Option<String> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point interface `Address` is the peer and `Local` its own.
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) if address.is_none() => address = Some(*other),
            _ => {}
        }
    }
    match address? {
        // The guest derives it from the same hardware address.
        IpAddr::V6(address) if address.is_unicast_link_local() => None,
        address => Some(cidr(address, message.header.prefix_len)),
    }
}

fn from_route(message: &RouteMessage, index: u32) -> Option<Route> {
    let header = &message.header;
    let table = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let main = table.unwrap_or(u32::from(header.table)) == u32::from(RouteHeader::RT_TABLE_MAIN);
    // The kernel makes the rest itself from the addresses.
    if !main || header.kind != RouteType::Unicast || header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let mut route = Route {
        destination: cidr(any, 0),
        gateway: None,
        source: None,
        scope: header.scope.into(),
        priority: 0,
        onlink: header.flags.contains(RouteFlags::Onlink),
    };
    let mut own = false;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => own = *oif == index,
            RouteAttribute::Destination(address) => {
                route.destination = cidr(ip(address)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = Some(ip(address)?.to_string()),
            RouteAttribute::PrefSource(address) => route.source = Some(ip(address)?.to_string()),
            RouteAttribute::Priority(priority) => route.priority = *priority,
            _ => {}
        }
    }
    own.then_some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

fn from_neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut address = None;
    let mut mac = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(ip.to_string()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(ip.to_string()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac.clone_from(bytes),
            _ => {}
        }
    }
    // Without a hardware address it is the kernel's own entry (multicast, broadcast).
    (mac.len() == 6).then_some(())?;
    Some(Neighbour {
        address: address?,
        mac,
        state: message.header.state.into(),
    })
}
