//! The network for a node on which no CNI configuration is installed: a bridge, addresses by host-local, host
//! ports by portmap, limits by bandwidth. The real plugins do the work; their configuration is embedded, and
//! masquerading is ours, see [`crate::masquerade`].

use std::net::IpAddr;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::NetworkConfig;
use crate::conflist::ConfList;
use crate::error::{NetworkError, Result};
use crate::pod::PodNetwork;

/// The newest version that Debian 12's plugins speak.
const VERSION: &str = "1.0.0";
const NAME: &str = "catamaran";

/// The default's full chain.
///
/// # Errors
/// Why there is none: it is switched off, or its settings are no good.
pub(crate) fn list(config: &NetworkConfig) -> std::result::Result<ConfList, String> {
    let bridge = config.default_bridge.as_str();
    if bridge.is_empty() {
        return Err("it is switched off; install a conflist".to_owned());
    }
    // IFNAMSIZ has 16 bytes with the final zero.
    if bridge.len() > 15
        || !bridge
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    {
        return Err(format!(
            "{bridge:?} is no interface name of 1 to 15 letters, digits, - _ ."
        ));
    }
    let mut ranges = Vec::new();
    let mut routes = Vec::new();
    for subnet in subnets(&config.default_subnet) {
        let v6 = is_v6(subnet).ok_or_else(|| {
            format!("{subnet:?} is no subnet for pods in CIDR notation, such as 10.88.0.0/16")
        })?;
        ranges.push(json!([{"subnet": subnet}]));
        routes.push(json!({"dst": if v6 { "::/0" } else { "0.0.0.0/0" }}));
    }
    let plugins = [
        json!({
            "type": "bridge",
            "bridge": bridge,
            "isGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": config.default_ipam_dir,
                "ranges": ranges,
                "routes": routes,
            },
        }),
        json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}),
        json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
    ];
    let object = |plugin| match plugin {
        Value::Object(plugin) => plugin,
        _ => Map::new(),
    };
    Ok(ConfList {
        cni_version: VERSION.to_owned(),
        name: NAME.to_owned(),
        plugins: plugins.into_iter().map(object).collect(),
    })
}

/// The chain for one pod: a plugin that would find nothing to do is not started.
pub(crate) fn for_pod(list: &ConfList, pod: &PodNetwork) -> ConfList {
    let offered = pod.capability_args();
    let useful = |plugin: &&Map<String, Value>| match plugin.get("capabilities") {
        Some(Value::Object(declared)) => declared.keys().any(|capability| offered.contains_key(capability)),
        _ => true,
    };
    ConfList {
        plugins: list.plugins.iter().filter(useful).cloned().collect(),
        ..list.clone()
    }
}

/// Checks for what the plugins of the default start in their turn.
pub(crate) fn find_tools(list: &ConfList) -> Result<()> {
    let path = crate::plugin::search_path();
    let tools = if has_v6(list) {
        &["iptables", "ip6tables"][..]
    } else {
        &["iptables"]
    };
    for tool in tools {
        if !std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()) {
            let reason = format!("the default network needs {tool}, not found on the PATH: install iptables");
            return Err(NetworkError::NotReady(reason));
        }
    }
    Ok(())
}

fn has_v6(list: &ConfList) -> bool {
    let ranges = list
        .plugins
        .iter()
        .filter_map(|plugin| plugin.get("ipam")?.get("ranges")?.as_array());
    ranges
        .flatten()
        .filter_map(|range| range[0]["subnet"].as_str())
        .any(|subnet| is_v6(subnet) == Some(true))
}

/// Switches forwarding on where it is off. The bridge plugin does so for a gateway, but only while it
/// configures a pod; another program may have switched it off since.
pub(crate) fn allow_forwarding(list: &ConfList) -> Result<()> {
    let mut switches = vec!["/proc/sys/net/ipv4/ip_forward"];
    if has_v6(list) {
        switches.push("/proc/sys/net/ipv6/conf/all/forwarding");
    }
    for switch in switches {
        let switch = Path::new(switch);
        let value = std::fs::read_to_string(switch).map_err(NetworkError::io("read", switch))?;
        if value.trim() == "0" {
            std::fs::write(switch, "1").map_err(NetworkError::io("write", switch))?;
            tracing::info!(switch = %switch.display(), "forwarding switched on for the default network");
        }
    }
    Ok(())
}

/// The subnets of the setting.
pub(crate) fn subnets(setting: &str) -> impl Iterator<Item = &str> {
    setting.split(',').map(str::trim)
}

/// The family of a subnet with room for a gateway and pods; `None`: it is no such subnet.
pub(crate) fn is_v6(subnet: &str) -> Option<bool> {
    let (address, length) = subnet.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let length: u32 = length.parse().ok()?;
    let (bits, v6) = match address {
        IpAddr::V4(_) => (32, false),
        IpAddr::V6(_) => (128, true),
    };
    (1..=bits - 2).contains(&length).then_some(v6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(bridge: &str, subnet: &str) -> NetworkConfig {
        NetworkConfig {
            conf_dir: "/nonexistent".into(),
            bin_dirs: vec![],
            netns_dir: "/nonexistent".into(),
            cache_dir: "/nonexistent".into(),
            default_bridge: bridge.to_owned(),
            default_subnet: subnet.to_owned(),
            default_ipam_dir: "/run/x/ipam".into(),
            plugin_timeout: std::time::Duration::from_secs(1),
        }
    }

    #[test]
    fn both_families_and_isolation_keys_are_in_the_list() {
        let list = list(&config("cat7", "10.77.0.0/24, fd00:77::/64")).unwrap();
        let bridge = &list.plugins[0];
        assert_eq!(bridge["bridge"], "cat7");
        assert_eq!(bridge["ipam"]["dataDir"], "/run/x/ipam");
        assert_eq!(
            bridge["ipam"]["ranges"],
            json!([[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd00:77::/64"}]])
        );
        assert_eq!(
            bridge["ipam"]["routes"],
            json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}])
        );
    }

    #[test]
    fn bad_settings_are_refused() {
        for (bridge, subnet, expected) in [
            ("", "10.0.0.0/24", "switched off"),
            ("a/b", "10.0.0.0/24", "no interface name"),
            ("sixteen-letters-", "10.0.0.0/24", "no interface name"),
            ("cat0", "10.0.0.0", "no subnet"),
            ("cat0", "10.0.0.0/31", "no subnet"),
            ("cat0", "10.0.0.0/24,", "no subnet"),
        ] {
            let reason = list(&config(bridge, subnet)).unwrap_err();
            assert!(reason.contains(expected), "{bridge} {subnet}: {reason}");
        }
    }

    #[test]
    fn a_plain_pod_starts_one_plugin() {
        let list = list(&config("cat7", "10.77.0.0/24")).unwrap();
        let mut pod = PodNetwork::default();
        let types = |pod: &PodNetwork| {
            for_pod(&list, pod)
                .plugins
                .iter()
                .map(|p| p["type"].clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(types(&pod), ["bridge"]);
        pod.bandwidth = Some(crate::Bandwidth {
            ingress_rate: 1,
            ..Default::default()
        });
        assert_eq!(types(&pod), ["bridge", "bandwidth"]);
    }
}
