//! What the pod network is told about a pod, from the CRI's messages.

use std::net::IpAddr;
use std::path::PathBuf;

use catamaran_network::{Bandwidth, DnsConfig, PodNetwork, PortMapping, Protocol};

use super::record::PodRecord;
use crate::cri::api::{self, PodSandboxConfig};
use crate::error::{Error, Result};

/// The pod as CNI sees it.
pub(super) fn pod_network(pod: &PodRecord, netns: PathBuf) -> Result<PodNetwork> {
    let config = &pod.config;
    let metadata = config.metadata.clone().unwrap_or_default();
    let dns = config.dns_config.clone().unwrap_or_default();
    Ok(PodNetwork {
        id: pod.id.to_string(),
        netns,
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        annotations: config.annotations.clone().into_iter().collect(),
        port_mappings: port_mappings(config)?,
        bandwidth: bandwidth(config)?,
        dns: DnsConfig {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        },
        cgroup_path: pod.cgroup_parent.clone(),
        ..PodNetwork::default()
    })
}

/// CRI `port_mappings`.
pub(super) fn port_mappings(config: &PodSandboxConfig) -> Result<Vec<PortMapping>> {
    let convert = |(index, mapping): (usize, &api::PortMapping)| {
        let field = |name: &str| format!("config.port_mappings[{index}].{name}");
        let port = |name: &str, value: i32| {
            u16::try_from(value).map_err(|_| Error::invalid(field(name), format!("{value} is not a port")))
        };
        let protocol = match api::Protocol::try_from(mapping.protocol) {
            Ok(api::Protocol::Tcp) => Protocol::Tcp,
            Ok(api::Protocol::Udp) => Protocol::Udp,
            Ok(api::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => {
                return Err(Error::invalid(
                    field("protocol"),
                    format!("{} is unknown", mapping.protocol),
                ));
            }
        };
        let host_ip: Option<IpAddr> =
            match mapping.host_ip.as_str() {
                "" => None,
                text => Some(text.parse().map_err(|_| {
                    Error::invalid(field("host_ip"), format!("{text:?} is not an IP address"))
                })?),
            };
        let container_port = port("container_port", mapping.container_port)?;
        if container_port == 0 {
            return Err(Error::invalid(field("container_port"), "0 is not a port"));
        }
        Ok(PortMapping {
            host_ip,
            host_port: port("host_port", mapping.host_port)?,
            container_port,
            protocol,
        })
    };
    config.port_mappings.iter().enumerate().map(convert).collect()
}

/// The limits that the pod's annotations ask for.
pub(super) fn bandwidth(config: &PodSandboxConfig) -> Result<Option<Bandwidth>> {
    let annotations = config.annotations.clone().into_iter().collect();
    Bandwidth::from_annotations(&annotations).map_err(|e| Error::invalid("config.annotations", e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(mapping: api::PortMapping) -> PodSandboxConfig {
        PodSandboxConfig {
            port_mappings: vec![mapping],
            ..Default::default()
        }
    }

    #[test]
    fn port_mappings_are_converted_and_bad_ones_named() {
        let good = api::PortMapping {
            protocol: 1,
            container_port: 53,
            host_port: 5353,
            host_ip: "127.0.0.1".into(),
        };
        let converted = port_mappings(&with(good.clone())).unwrap();
        assert_eq!(
            (converted[0].protocol, converted[0].host_port),
            (Protocol::Udp, 5353)
        );
        for (mapping, field) in [
            (
                api::PortMapping {
                    host_port: 70_000,
                    ..good.clone()
                },
                "host_port",
            ),
            (
                api::PortMapping {
                    container_port: 0,
                    ..good.clone()
                },
                "container_port",
            ),
            (
                api::PortMapping {
                    protocol: 9,
                    ..good.clone()
                },
                "protocol",
            ),
            (
                api::PortMapping {
                    host_ip: "x".into(),
                    ..good
                },
                "host_ip",
            ),
        ] {
            let error = port_mappings(&with(mapping)).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("config.port_mappings[0].{field}:")),
                "{error}"
            );
        }
    }
}
