//! Which protocol a client's HTTP request asks to be upgraded to, and the answer.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::{Response, StatusCode};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{port_forward, remote_command, tunnel, websocket};

const SPDY: &str = "SPDY/3.1";
const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
const SEC_WEBSOCKET_PROTOCOL: HeaderName = HeaderName::from_static("sec-websocket-protocol");
const SEC_WEBSOCKET_KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const SEC_WEBSOCKET_VERSION: HeaderName = HeaderName::from_static("sec-websocket-version");
const SEC_WEBSOCKET_ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");

/// The answer to a request that is not upgraded.
type Refusal = Box<Response<String>>;

/// What is spoken after the upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// Remote command of this version.
    Spdy(u8),
    /// Remote command of this version.
    WebSocket(u8),
    /// Port-forward.
    SpdyPortForward,
    /// Port-forward in a tunnel.
    TunnelPortForward,
}

/// Chooses the protocol for exec and attach, with the headers of the answer.
pub(crate) fn remote_command(headers: &HeaderMap) -> Result<(Protocol, HeaderMap), Refusal> {
    match transport(headers)? {
        Transport::Spdy => {
            let names = remote_command::PROTOCOLS.map(|(name, _)| name);
            let (index, answer) = spdy(headers, &names)?;
            Ok((Protocol::Spdy(remote_command::PROTOCOLS[index].1), answer))
        }
        Transport::WebSocket(key) => {
            let names = websocket::PROTOCOLS.map(|(name, _)| name);
            let (index, answer) = websocket(headers, key, &names)?;
            Ok((Protocol::WebSocket(websocket::PROTOCOLS[index].1), answer))
        }
    }
}

/// Chooses the protocol for port-forward, with the headers of the answer.
pub(crate) fn port_forward(headers: &HeaderMap) -> Result<(Protocol, HeaderMap), Refusal> {
    match transport(headers)? {
        Transport::Spdy => {
            let (_, answer) = spdy(headers, &[port_forward::PROTOCOL])?;
            Ok((Protocol::SpdyPortForward, answer))
        }
        Transport::WebSocket(key) => {
            let (_, answer) = websocket(headers, key, &tunnel::PROTOCOLS)?;
            Ok((Protocol::TunnelPortForward, answer))
        }
    }
}

enum Transport<'a> {
    Spdy,
    WebSocket(&'a HeaderValue),
}

fn transport(headers: &HeaderMap) -> Result<Transport<'_>, Refusal> {
    if !words(headers, &CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade")) {
        return Err(refuse(
            "the request must ask for an upgrade to SPDY/3.1 or to a WebSocket",
        ));
    }
    let wanted: Vec<&str> = words(headers, &UPGRADE).collect();
    if wanted.iter().any(|word| word.eq_ignore_ascii_case(SPDY)) {
        return Ok(Transport::Spdy);
    }
    if !wanted.iter().any(|word| word.eq_ignore_ascii_case("websocket")) {
        return Err(refuse("the only upgrades are SPDY/3.1 and websocket"));
    }
    if headers
        .get(SEC_WEBSOCKET_VERSION)
        .is_none_or(|version| version != "13")
    {
        let mut refusal = refuse("the WebSocket version must be 13");
        refusal
            .headers_mut()
            .insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return Err(refusal);
    }
    // RFC 6455: 16 bytes in base64.
    let key = headers.get(SEC_WEBSOCKET_KEY);
    let good = |key: &&HeaderValue| {
        STANDARD
            .decode(key.as_bytes())
            .is_ok_and(|bytes| bytes.len() == 16)
    };
    key.filter(good)
        .map(Transport::WebSocket)
        .ok_or_else(|| refuse("Sec-WebSocket-Key is missing or malformed"))
}

fn spdy(headers: &HeaderMap, known: &[&'static str]) -> Result<(usize, HeaderMap), Refusal> {
    let wanted: Vec<&str> = words(headers, &STREAM_PROTOCOL).collect();
    if wanted.is_empty() {
        return Err(refuse("unable to upgrade: X-Stream-Protocol-Version is required"));
    }
    let Some(index) = known.iter().position(|name| wanted.contains(name)) else {
        let text = format!("none of the protocols {wanted:?} is known here; known are {known:?}");
        let mut refusal = response(StatusCode::FORBIDDEN, text);
        for name in known {
            refusal
                .headers_mut()
                .append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(name));
        }
        return Err(Box::new(refusal));
    };
    let mut answer = HeaderMap::new();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static(SPDY));
    answer.insert(STREAM_PROTOCOL, HeaderValue::from_static(known[index]));
    Ok((index, answer))
}

fn websocket(
    headers: &HeaderMap,
    key: &HeaderValue,
    known: &[&'static str],
) -> Result<(usize, HeaderMap), Refusal> {
    let wanted: Vec<&str> = words(headers, &SEC_WEBSOCKET_PROTOCOL).collect();
    let Some(index) = known.iter().position(|name| wanted.contains(name)) else {
        return Err(refuse(&format!(
            "none of the WebSocket protocols {wanted:?} is known here; known are {known:?}"
        )));
    };
    let accept = derive_accept_key(key.as_bytes());
    let mut answer = HeaderMap::new();
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(known[index]));
    let accept = HeaderValue::from_str(&accept).map_err(|_| refuse("Sec-WebSocket-Key is malformed"))?;
    answer.insert(SEC_WEBSOCKET_ACCEPT, accept);
    Ok((index, answer))
}

/// The words of a header that may come several times and hold lists.
fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|word| !word.is_empty())
}

fn refuse(text: &str) -> Refusal {
    Box::new(response(StatusCode::BAD_REQUEST, text.to_owned()))
}

pub(crate) fn response(status: StatusCode, text: String) -> Response<String> {
    let mut response = Response::new(text);
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| {
            (
                name.parse::<HeaderName>().expect("name"),
                HeaderValue::from_str(value).expect("value"),
            )
        };
        let mut map = HeaderMap::new();
        for (name, value) in pairs.iter().map(pair) {
            map.append(name, value);
        }
        map
    }

    const KEY: (&str, &str) = ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    const VERSION: (&str, &str) = ("sec-websocket-version", "13");

    #[test]
    fn spdy_versions() {
        let of = |protocols: &[&str]| {
            let mut pairs = vec![("connection", "keep-alive, Upgrade"), ("upgrade", "SPDY/3.1")];
            pairs.extend(protocols.iter().map(|name| ("x-stream-protocol-version", *name)));
            remote_command(&headers(&pairs))
                .map(|(protocol, _)| protocol)
                .map_err(|r| r.status())
        };
        let all = [
            "channel.k8s.io",
            "v3.channel.k8s.io",
            "v4.channel.k8s.io",
            "v5.channel.k8s.io",
        ];
        assert_eq!(of(&all), Ok(Protocol::Spdy(4)));
        assert_eq!(of(&["v2.channel.k8s.io, channel.k8s.io"]), Ok(Protocol::Spdy(2)));
        assert_eq!(of(&["v9.channel.k8s.io"]), Err(StatusCode::FORBIDDEN));
        assert_eq!(of(&[]), Err(StatusCode::BAD_REQUEST));
    }

    #[test]
    fn websockets() {
        let of = |protocols: &str, pairs: &[(&str, &str)]| {
            let mut all = vec![
                ("connection", "Upgrade"),
                ("upgrade", "websocket"),
                ("sec-websocket-protocol", protocols),
            ];
            all.extend_from_slice(pairs);
            remote_command(&headers(&all)).map_err(|r| r.status())
        };
        let (protocol, answer) = of("v4.channel.k8s.io, v5.channel.k8s.io", &[KEY, VERSION]).expect("chosen");
        assert_eq!(protocol, Protocol::WebSocket(5));
        // The example of RFC 6455.
        assert_eq!(answer["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(answer["sec-websocket-protocol"], "v5.channel.k8s.io");
        assert_eq!(
            of("chat", &[KEY, VERSION]).map(|_| ()),
            Err(StatusCode::BAD_REQUEST)
        );
        assert_eq!(
            of("v5.channel.k8s.io", &[VERSION]).map(|_| ()),
            Err(StatusCode::BAD_REQUEST)
        );
        assert_eq!(
            of("v5.channel.k8s.io", &[KEY]).map(|_| ()),
            Err(StatusCode::BAD_REQUEST)
        );
        let bad_key = ("sec-websocket-key", "short");
        assert_eq!(
            of("v5.channel.k8s.io", &[bad_key, VERSION]).map(|_| ()),
            Err(StatusCode::BAD_REQUEST)
        );
    }

    #[test]
    fn port_forwards() {
        let spdy = [
            ("connection", "upgrade"),
            ("upgrade", "spdy/3.1"),
            ("x-stream-protocol-version", "portforward.k8s.io"),
        ];
        assert_eq!(
            port_forward(&headers(&spdy))
                .map(|(p, _)| p)
                .map_err(|r| r.status()),
            Ok(Protocol::SpdyPortForward)
        );
        let tunnel = [
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            KEY,
            VERSION,
            ("sec-websocket-protocol", "SPDY/3.1+portforward.k8s.io"),
        ];
        let chosen = port_forward(&headers(&tunnel))
            .map(|(p, _)| p)
            .map_err(|r| r.status());
        assert_eq!(chosen, Ok(Protocol::TunnelPortForward));
        assert!(port_forward(&HeaderMap::new()).is_err());
        assert!(port_forward(&headers(&[("connection", "upgrade"), ("upgrade", "h2c")])).is_err());
    }
}
