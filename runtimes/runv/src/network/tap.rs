//! A tap beside an interface, with all traffic redirected both ways: tc `u32` filters that match everything, and
//! `mirred` (kernels without matchall and flower have them too).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use futures::TryStreamExt;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::{Handle, LinkUnspec};

use super::NetworkError;
use super::interface::Interface;

/// ETH_P_ALL in network byte order.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();
/// The ingress qdisc's handle, `ffff:`.
const INGRESS: u32 = 0xffff_0000;

nix::ioctl_readwrite_bad!(set_interface, 0x4004_54ca, InterfaceRequest); // TUNSETIFF

/// struct ifreq as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}

/// Makes a tap for `interface` in the calling thread's network namespace, brings it up and joins the two.
pub(super) async fn join(handle: &Handle, interface: &Interface) -> Result<OwnedFd, NetworkError> {
    let name = format!("cattap{}", interface.index);
    let (tap, index) = {
        let tap = open(&name).map_err(|source| NetworkError::Tap {
            name: name.clone(),
            source,
        })?;
        let index = index_of(handle, &name).await?;
        (tap, index)
    };
    let refused = |action, interface: &str| {
        let interface = interface.to_owned();
        move |source| NetworkError::Netlink {
            action,
            interface,
            source,
        }
    };
    // The host's own IPv6 shall not speak into the guest's network card. A host without IPv6 has no such file.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let up = LinkUnspec::new_with_index(index).mtu(interface.mtu).up().build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(refused("bring up", &name))?;
    for (from, to, from_name) in [
        (interface.index, index, &interface.name),
        (index, interface.index, &name),
    ] {
        let from = i32::try_from(from).unwrap_or(i32::MAX);
        match handle.qdisc().add(from).ingress().execute().await {
            // An earlier attempt's; its filters are replaced below.
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::EEXIST => {
                let mut clear = handle.qdisc().del(from);
                clear.message_mut().header.parent = TcHandle::INGRESS;
                clear.message_mut().header.handle = TcHandle::from(INGRESS);
                clear.execute().await.map_err(refused("clear", from_name))?;
                handle
                    .qdisc()
                    .add(from)
                    .ingress()
                    .execute()
                    .await
                    .map_err(refused("redirect", from_name))?;
            }
            other => other.map_err(refused("redirect", from_name))?,
        }
        let filter = handle
            .traffic_filter(from)
            .add()
            .parent(INGRESS)
            .priority(1)
            .protocol(ALL_PROTOCOLS);
        let filter = filter.redirect(to).map_err(refused("redirect", from_name))?;
        filter.execute().await.map_err(refused("redirect", from_name))?;
    }
    Ok(tap)
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32, NetworkError> {
    let found = handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await;
    let refused = |source| NetworkError::Netlink {
        action: "find",
        interface: name.to_owned(),
        source,
    };
    let link = found.map_err(refused)?.ok_or_else(|| {
        let source = std::io::Error::from_raw_os_error(libc::ENODEV);
        NetworkError::Tap {
            name: name.to_owned(),
            source,
        }
    })?;
    debug_assert!(link.attributes.contains(&LinkAttribute::IfName(name.to_owned())));
    Ok(link.header.index)
}

/// A tap with a virtio-net header, so that checksums and segmentation can be left to the other side.
fn open(name: &str) -> std::io::Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|error| std::io::Error::new(error.kind(), format!("/dev/net/tun: {error}")))?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: libc::c_short::try_from(flags).expect("the flags are of 16 bits"),
        padding: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the kernel reads and writes one ifreq, which lives until the call returns.
    unsafe { set_interface(file.as_raw_fd(), &raw mut request) }?;
    Ok(file.into())
}
