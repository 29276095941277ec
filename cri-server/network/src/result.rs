//! The result of ADD (CNI spec, section 5, "Add Success"), read from versions 0.3 to 1.1, and what the daemon
//! and the shims make of it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::POD_INTERFACE;

/// A pod's place in its network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The pod's addresses in the order of the result; the first is CRI `ip`, the others `additional_ips`.
    pub ips: Vec<IpAddr>,
    /// Interfaces that the plugins made or used, in the pod and on the host.
    pub interfaces: Vec<Interface>,
    /// The pod's routes.
    pub routes: Vec<Route>,
    /// Name resolution that the network brings.
    pub dns: Dns,
    /// The last plugin's result as it was printed.
    pub result: Value,
}

/// An interface of the result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Hardware address, as the plugin writes it.
    pub mac: Option<String>,
    /// Greatest packet; CNI 1.1 only.
    pub mtu: Option<u32>,
    /// Path of the namespace that it is in; `None`: the host's.
    pub sandbox: Option<String>,
    /// Its addresses in CIDR notation.
    pub addresses: Vec<String>,
}

/// A route of the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination in CIDR notation.
    pub dst: String,
    /// Next hop; `None`: the gateway of the address's family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

/// Name resolution of the result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers.
    #[serde(default)]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default)]
    pub domain: Option<String>,
    /// Search domains.
    #[serde(default)]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(default)]
    pub options: Vec<String>,
}

/// The wire form. Absent, null and empty mean the same everywhere, as Go writes any of them.
#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    interfaces: Option<Vec<WireInterface>>,
    #[serde(default)]
    ips: Option<Vec<WireIp>>,
    #[serde(default)]
    routes: Option<Vec<Route>>,
    #[serde(default)]
    dns: Option<Dns>,
}

#[derive(Deserialize)]
struct WireInterface {
    name: String,
    #[serde(default)]
    mac: Option<String>,
    #[serde(default)]
    mtu: Option<u32>,
    #[serde(default)]
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct WireIp {
    address: String,
    #[serde(default)]
    interface: Option<usize>,
}

impl Attachment {
    /// Reads a result.
    ///
    /// # Errors
    /// What is wrong with it, for a message that names the plugin.
    pub(crate) fn parse(result: Value) -> std::result::Result<Self, String> {
        if !result.is_object() {
            return Err("the result is not an object".to_owned());
        }
        let wire: Wire = serde_json::from_value(result.clone()).map_err(|error| error.to_string())?;
        let mut interfaces: Vec<Interface> = wire
            .interfaces
            .unwrap_or_default()
            .into_iter()
            .map(
                |WireInterface {
                     name,
                     mac,
                     mtu,
                     sandbox,
                 }| Interface {
                    name,
                    mac: mac.filter(|mac| !mac.is_empty()),
                    mtu: mtu.filter(|mtu| *mtu > 0),
                    sandbox: sandbox.filter(|sandbox| !sandbox.is_empty()),
                    addresses: Vec::new(),
                },
            )
            .collect();
        let (mut of_pod_interface, mut of_pod) = (Vec::new(), Vec::new());
        for WireIp { address, interface } in wire.ips.unwrap_or_default() {
            let ip = cidr(&address).ok_or_else(|| format!("ips: {address:?} is not in CIDR notation"))?;
            let Some(index) = interface else {
                of_pod_interface.push(ip);
                continue;
            };
            let interface = interfaces
                .get_mut(index)
                .ok_or_else(|| format!("ips: {address} is on interface {index}, which is not in the list"))?;
            interface.addresses.push(address);
            if interface.sandbox.is_some() {
                of_pod.push(ip);
                if interface.name == POD_INTERFACE {
                    of_pod_interface.push(ip);
                }
            }
        }
        // A plugin that leaves the wished name aside still gives the pod its addresses.
        let ips = if of_pod_interface.is_empty() {
            of_pod
        } else {
            of_pod_interface
        };
        let (routes, dns) = (wire.routes.unwrap_or_default(), wire.dns.unwrap_or_default());
        Ok(Self {
            ips,
            interfaces,
            routes,
            dns,
            result,
        })
    }
}

/// Brings a result to the version that the next plugin of the chain was asked for: up to 0.4 an address has
/// its family in `version`, from 1.0 on it has not.
pub(crate) fn in_version(mut result: Value, version: &str) -> Value {
    let Some(object) = result.as_object_mut() else {
        return result;
    };
    if object.get("cniVersion").and_then(Value::as_str) == Some(version) {
        return result;
    }
    object.insert("cniVersion".to_owned(), Value::from(version));
    let old = version.starts_with("0.");
    for entry in object
        .get_mut("ips")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let Some(entry) = entry.as_object_mut() else {
            continue;
        };
        if old {
            let v6 = entry
                .get("address")
                .and_then(Value::as_str)
                .is_some_and(|address| address.contains(':'));
            entry.insert("version".to_owned(), Value::from(if v6 { "6" } else { "4" }));
        } else {
            entry.remove("version");
        }
    }
    result
}

fn cidr(text: &str) -> Option<IpAddr> {
    let (address, length) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let bits = if address.is_ipv4() { 32 } else { 128 };
    length
        .parse::<u32>()
        .is_ok_and(|length| length <= bits)
        .then_some(address)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_bridge_result_is_read() {
        let attachment = Attachment::parse(json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": "cat0", "mac": "aa:aa:aa:aa:aa:aa"},
                {"name": "veth1", "mac": ""},
                {"name": "eth0", "mac": "bb:bb:bb:bb:bb:bb", "mtu": 1400, "sandbox": "/run/netns/x"},
            ],
            "ips": [
                {"interface": 2, "address": "10.1.0.2/16", "gateway": "10.1.0.1"},
                {"interface": 2, "address": "fd00::2/64"},
                {"interface": 0, "address": "10.1.0.1/16"},
            ],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.2.0.0/16", "gw": "10.1.0.9"}],
            "dns": {"nameservers": ["10.1.0.1"], "search": ["a"]},
        }))
        .unwrap();
        assert_eq!(
            attachment.ips,
            ["10.1.0.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]
        );
        assert_eq!(attachment.interfaces[2].addresses, ["10.1.0.2/16", "fd00::2/64"]);
        assert_eq!(attachment.interfaces[2].mtu, Some(1400));
        assert_eq!(attachment.interfaces[1].mac, None);
        assert_eq!(attachment.routes[1].gw, Some("10.1.0.9".parse().unwrap()));
        assert_eq!(attachment.dns.nameservers, ["10.1.0.1"]);
    }

    #[test]
    fn addresses_without_an_interface_are_the_pods() {
        let attachment = Attachment::parse(
            json!({"cniVersion": "0.3.1", "ips": [{"version": "4", "address": "10.0.0.2/8"}],
                                     "dns": null, "routes": null, "interfaces": null}),
        )
        .unwrap();
        assert_eq!(attachment.ips.len(), 1);
        let named = Attachment::parse(json!({
            "interfaces": [{"name": "net1", "sandbox": "/x"}], "ips": [{"address": "10.0.0.3/8", "interface": 0}],
        }))
        .unwrap();
        assert_eq!(named.ips, ["10.0.0.3".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn wrong_results_are_refused() {
        for (result, expected) in [
            (json!([]), "not an object"),
            (json!({"ips": [{"address": "10.0.0.2"}]}), "CIDR"),
            (json!({"ips": [{"address": "10.0.0.2/33"}]}), "CIDR"),
            (
                json!({"ips": [{"address": "10.0.0.2/8", "interface": 3}]}),
                "not in the list",
            ),
            (json!({"interfaces": [{"mac": "x"}]}), "name"),
        ] {
            let reason = Attachment::parse(result.clone()).unwrap_err();
            assert!(reason.contains(expected), "{result}: {reason}");
        }
    }

    #[test]
    fn versions_are_brought_over() {
        let old = json!({"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.0.0.2/8"}]});
        let new = in_version(old.clone(), "1.0.0");
        assert_eq!(
            new,
            json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/8"}]})
        );
        assert_eq!(in_version(new, "0.4.0"), old);
    }

    proptest! {
        #[test]
        fn any_addresses_are_read_or_refused(text in "[0-9a-f:./]{0,45}") {
            let _ = Attachment::parse(json!({"ips": [{"address": text}]}));
        }

        #[test]
        fn good_addresses_are_kept(ip: IpAddr) {
            let attachment = Attachment::parse(json!({"ips": [{"address": format!("{ip}/32")}]})).unwrap();
            prop_assert_eq!(attachment.ips, vec![ip]);
        }
    }
}
