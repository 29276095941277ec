//! What the network must know of a pod. Stored with the attachment, so that DEL has what ADD had.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::bandwidth::Bandwidth;

/// A pod as the network sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// Sandbox id; CNI_CONTAINERID.
    pub id: String,
    /// The pinned namespace; CNI_NETNS.
    pub netns: PathBuf,
    /// The pod's Kubernetes namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's uid.
    pub uid: String,
    /// The pod's annotations, for plugins with the capability `io.kubernetes.cri.pod-annotations`.
    pub annotations: BTreeMap<String, String>,
    /// Host ports, for the capability `portMappings`. Those without a host port are not passed on.
    pub port_mappings: Vec<PortMapping>,
    /// Limits, for the capability `bandwidth`.
    pub bandwidth: Option<Bandwidth>,
    /// The pod's DNS configuration, for the capability `dns`.
    pub dns: DnsConfig,
    /// The pod's cgroup, for the capability `cgroupPath`.
    pub cgroup_path: String,
    /// Wished addresses in CIDR notation, for the capability `ips`.
    #[serde(default)]
    pub ips: Vec<String>,
    /// Wished hardware address, for the capability `mac`.
    #[serde(default)]
    pub mac: Option<String>,
}

/// A port of the host that leads to the pod (CRI PortMapping).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Address of the host to listen on; `None`: all.
    pub host_ip: Option<IpAddr>,
    /// Port of the host; 0: no mapping.
    pub host_port: u16,
    /// Port in the pod.
    pub container_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
}

/// Transport protocol of a port mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// The pod's DNS configuration (CRI DNSConfig).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    /// Name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Resolver options.
    pub options: Vec<String>,
}

impl PodNetwork {
    /// Everything this pod has to offer to plugins, by capability (CNI CONVENTIONS, "Dynamic Plugin specific
    /// fields"; the `io.kubernetes.*` and `cgroupPath` names are containerd's).
    pub(crate) fn capability_args(&self) -> Map<String, Value> {
        let mut args = Map::new();
        let ports: Vec<Value> = self
            .port_mappings
            .iter()
            .filter(|port| port.host_port != 0)
            .map(PortMapping::to_cni)
            .collect();
        if !ports.is_empty() {
            args.insert("portMappings".to_owned(), Value::Array(ports));
        }
        if let Some(bandwidth) = &self.bandwidth {
            args.insert("bandwidth".to_owned(), bandwidth.to_cni());
        }
        if self.dns != DnsConfig::default() {
            let DnsConfig {
                servers,
                searches,
                options,
            } = &self.dns;
            args.insert(
                "dns".to_owned(),
                json!({"servers": servers, "searches": searches, "options": options}),
            );
        }
        if !self.ips.is_empty() {
            args.insert("ips".to_owned(), json!(self.ips));
        }
        if let Some(mac) = &self.mac {
            args.insert("mac".to_owned(), json!(mac));
        }
        if !self.annotations.is_empty() {
            args.insert(
                "io.kubernetes.cri.pod-annotations".to_owned(),
                json!(self.annotations),
            );
        }
        if !self.cgroup_path.is_empty() {
            args.insert("cgroupPath".to_owned(), json!(self.cgroup_path));
        }
        args
    }

    /// CNI_ARGS, in the names that kubelet's plugins know.
    pub(crate) fn cni_args(&self) -> String {
        format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.namespace, self.name, self.id, self.uid
        )
    }
}

impl PortMapping {
    fn to_cni(&self) -> Value {
        let mut entry = json!({
            "hostPort": self.host_port,
            "containerPort": self.container_port,
            "protocol": self.protocol,
        });
        if let Some(ip) = self.host_ip.filter(|ip| !ip.is_unspecified()) {
            entry["hostIP"] = json!(ip);
        }
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_pod_has_is_offered() {
        let mut pod = PodNetwork {
            id: "p".to_owned(),
            ..PodNetwork::default()
        };
        assert!(pod.capability_args().is_empty());
        let port = |host_ip: Option<&str>, host_port| PortMapping {
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port,
            container_port: 80,
            protocol: Protocol::Tcp,
        };
        pod.port_mappings = vec![port(None, 0)];
        assert!(
            pod.capability_args().is_empty(),
            "a container port alone is no mapping"
        );
        pod.port_mappings = vec![port(Some("127.0.0.1"), 8080), port(Some("0.0.0.0"), 81)];
        pod.mac = Some("02:00:00:00:00:01".to_owned());
        pod.cgroup_path = "/kubepods/pod1".to_owned();
        assert_eq!(
            Value::Object(pod.capability_args()),
            json!({
                "portMappings": [
                    {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"},
                    {"hostPort": 81, "containerPort": 80, "protocol": "tcp"},
                ],
                "mac": "02:00:00:00:00:01",
                "cgroupPath": "/kubepods/pod1",
            })
        );
    }
}
