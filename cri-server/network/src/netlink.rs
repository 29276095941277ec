//! The two rtnetlink(7) requests that this crate makes itself, in the calling thread's network namespace.

use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, socket,
};

/// The loopback interface is the first of every network namespace.
const LOOPBACK_INDEX: i32 = 1;

/// Switches the loopback interface on; what the CNI plugin `loopback` does with a process.
pub(crate) fn raise_loopback() -> io::Result<()> {
    let up = u32::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    link_request(libc::RTM_NEWLINK, LOOPBACK_INDEX, up)
}

/// Deletes an interface. Idempotent.
pub(crate) fn delete_interface(name: &str) -> io::Result<()> {
    let outcome = match if_nametoindex(name) {
        Ok(index) => link_request(
            libc::RTM_DELLINK,
            i32::try_from(index).map_err(io::Error::other)?,
            0,
        ),
        Err(errno) => Err(errno.into()),
    };
    match outcome {
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => Ok(()),
        outcome => outcome,
    }
}

/// One request about one interface, and the kernel's acknowledgement. `flags` are set.
fn link_request(kind: u16, index: i32, flags: u32) -> io::Result<()> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let wants = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).map_err(io::Error::other)?;
    let mut request = Vec::with_capacity(32);
    // struct nlmsghdr: length, type, flags, sequence, port.
    request.extend(32u32.to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(wants.to_ne_bytes());
    request.extend(1u32.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    // struct ifinfomsg: family with padding, type, index, flags, which flags to change.
    request.extend([0u8; 2]);
    request.extend(0u16.to_ne_bytes());
    request.extend(index.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    sendto(
        netlink.as_raw_fd(),
        &request,
        &NetlinkAddr::new(0, 0),
        MsgFlags::empty(),
    )?;
    let mut answer = [0u8; 512];
    let count = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // NLMSG_ERROR: the header, then 0 or a negative errno.
    match answer
        .get(16..20)
        .and_then(|code| code.try_into().ok())
        .map(i32::from_ne_bytes)
    {
        Some(0) if count >= 20 => Ok(()),
        Some(code) if count >= 20 && code < 0 => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::Error::other("the kernel's answer is not an acknowledgement")),
    }
}
