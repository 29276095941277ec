//! SPDY/3.1 as far as Kubernetes' clients use it: a connection carries streams with headers, both ways, over
//! any byte transport (an upgraded HTTP connection, a WebSocket tunnel).

mod connection;
mod dictionary;
mod frame;
mod headers;
mod shared;
mod stream;

pub(crate) use connection::{Connection, Limits};
#[cfg(test)]
pub(crate) use frame::{CONTROL_MAX, Control, HEAD, Head};
#[cfg(test)]
pub(crate) use headers::{Deflater, Headers, Inflater};
pub(crate) use stream::Stream;

#[cfg(test)]
mod tests;
