//! What is recorded of pods and containers: persisted by the store, published as snapshots to readers. The
//! CRI messages in them are kept as protobuf, whose fields outlive versions.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use catamaran_sandbox::id::Id;
use catamaran_sandbox::pod_spec::PodSpec;
use serde::{Deserialize, Serialize};

use super::state::{ContainerState, PodState};
use crate::cri::api::{ContainerConfig, LinuxContainerResources, LinuxContainerUser, PodSandboxConfig};
use crate::shim::Shim;

/// A pod sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PodRecord {
    /// Its id.
    pub id: Id,
    /// Its state.
    pub state: PodState,
    /// Runtime handler, resolved (never empty).
    pub handler: String,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// As RunPodSandbox had it.
    #[serde(with = "protobuf_text")]
    pub config: PodSandboxConfig,
    /// Parent cgroup of its containers, resolved.
    pub cgroup_parent: String,
    /// `cgroup_parent` was made by the daemon and goes with the pod.
    pub owns_cgroup: bool,
    /// Addresses in the pod network, the primary first.
    pub ips: Vec<IpAddr>,
    /// What the shim said of the sandbox once it was ready (keys: `catamaran_sandbox::pod_spec::info`).
    pub info: BTreeMap<String, String>,
    /// What the shim was told.
    pub spec: PodSpec,
    /// Why it is not ready, for humans.
    pub problem: Option<String>,
}

/// A container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// Its id.
    pub id: Id,
    /// Its pod.
    pub pod: Id,
    /// Its state.
    pub state: ContainerState,
    /// As CreateContainer had it.
    #[serde(with = "protobuf_text")]
    pub config: ContainerConfig,
    /// Id of its image (`sha256:…`).
    pub image_id: String,
    /// How its image can be pulled again: a repository digest where there is one, else the id.
    pub image_ref: String,
    /// Absolute path of its log; empty: none.
    pub log_path: String,
    /// Signal that StopContainer sends, by number.
    pub stop_signal: u32,
    /// Who its first process runs as.
    #[serde(with = "protobuf_text")]
    pub user: LinuxContainerUser,
    /// Limits in force.
    #[serde(with = "protobuf_text")]
    pub resources: LinuxContainerResources,
    /// Process id on the host, 0 where there is none (not started, or in a VM).
    pub pid: u32,
    /// Nanoseconds since the epoch; 0: not yet.
    pub created_at_ns: i64,
    /// Nanoseconds since the epoch; 0: not yet.
    pub started_at_ns: i64,
    /// How it ended.
    pub exit: Option<Exit>,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0 to 255.
    pub code: i32,
    /// Nanoseconds since the epoch.
    pub at_ns: i64,
    /// CRI `reason`: Completed, Error, OOMKilled, StartError, ContainerStatusUnknown.
    pub reason: String,
    /// CRI `message`.
    pub message: String,
}

impl Exit {
    /// From what the shim recorded.
    #[must_use]
    pub fn from_record(record: &catamaran_sandbox::exit::ExitRecord) -> Self {
        let reason = match record.exit_code {
            _ if record.oom_killed => "OOMKilled",
            0 => "Completed",
            _ => "Error",
        };
        Self {
            code: record.exit_code,
            at_ns: record.exited_at_ns,
            reason: reason.to_owned(),
            message: String::new(),
        }
    }

    /// The process could not be started (exit code 128, as containerd has it).
    #[must_use]
    pub fn start_error(message: String, at_ns: i64) -> Self {
        Self {
            code: 128,
            at_ns,
            reason: "StartError".to_owned(),
            message,
        }
    }

    /// It is gone and nobody saw how.
    #[must_use]
    pub fn unknown(message: &str, at_ns: i64) -> Self {
        Self {
            code: 255,
            at_ns,
            reason: "ContainerStatusUnknown".to_owned(),
            message: message.to_owned(),
        }
    }

    /// The record says how it ended, rather than that nobody knows.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.reason != "ContainerStatusUnknown"
    }
}

/// A pod with its containers at one moment. Readers never wait for the pod's owner.
#[derive(Debug, Clone)]
pub struct PodView {
    /// The sandbox.
    pub pod: Arc<PodRecord>,
    /// Its containers by id.
    pub containers: BTreeMap<Id, Arc<ContainerRecord>>,
    /// Its shim, while that lives.
    pub shim: Option<Shim>,
}

/// What a pod is known by besides its id (CRI PodSandboxMetadata): unique on the node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodKey {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Uid.
    pub uid: String,
    /// Attempt.
    pub attempt: u32,
}

/// What a container is known by within its pod (CRI ContainerMetadata).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerKey {
    /// Name.
    pub name: String,
    /// Attempt.
    pub attempt: u32,
}

impl PodRecord {
    /// Its key.
    #[must_use]
    pub fn key(&self) -> PodKey {
        let metadata = self.config.metadata.clone().unwrap_or_default();
        PodKey {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            attempt: metadata.attempt,
        }
    }

    /// Pinned network namespace; `None`: the host's.
    #[must_use]
    pub fn netns(&self) -> Option<&PathBuf> {
        self.spec.namespaces.network.as_ref()
    }
}

impl ContainerRecord {
    /// Its key.
    #[must_use]
    pub fn key(&self) -> ContainerKey {
        let metadata = self.config.metadata.clone().unwrap_or_default();
        ContainerKey {
            name: metadata.name,
            attempt: metadata.attempt,
        }
    }
}

impl std::fmt::Display for PodKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}/{} (uid {}, attempt {})",
            self.namespace, self.name, self.uid, self.attempt
        )
    }
}

impl std::fmt::Display for ContainerKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (attempt {})", self.name, self.attempt)
    }
}

/// Protobuf messages as base64 in JSON.
mod protobuf_text {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<M: prost::Message, S: Serializer>(
        message: &M,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(message.encode_to_vec()))
    }

    pub(super) fn deserialize<'de, M: prost::Message + Default, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<M, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(de::Error::custom)?;
        M::decode(bytes.as_slice()).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::api::ContainerMetadata;

    #[test]
    fn a_record_survives_the_store_with_its_messages() {
        let record = ContainerRecord {
            id: Id::parse("c1").unwrap(),
            pod: Id::parse("p1").unwrap(),
            state: ContainerState::Exited,
            config: ContainerConfig {
                metadata: Some(ContainerMetadata {
                    name: "a".into(),
                    attempt: 3,
                }),
                command: vec!["sh".into()],
                ..Default::default()
            },
            image_id: "sha256:1".into(),
            image_ref: "x@sha256:2".into(),
            log_path: String::new(),
            stop_signal: 15,
            user: LinuxContainerUser {
                uid: 7,
                ..Default::default()
            },
            resources: LinuxContainerResources {
                cpu_shares: 5,
                ..Default::default()
            },
            pid: 9,
            created_at_ns: 1,
            started_at_ns: 2,
            exit: Some(Exit::start_error("no such file".into(), 3)),
        };
        let text = serde_json::to_string(&record).unwrap();
        let read: ContainerRecord = serde_json::from_str(&text).unwrap();
        assert_eq!(read.config, record.config);
        assert_eq!(read.user, record.user);
        assert_eq!(read.resources, record.resources);
        assert_eq!(read.exit, record.exit);
        assert_eq!(
            read.key(),
            ContainerKey {
                name: "a".into(),
                attempt: 3
            }
        );
    }

    #[test]
    fn reasons_follow_the_exit() {
        let exit = |exit_code, oom_killed| {
            let record = catamaran_sandbox::exit::ExitRecord {
                exit_code,
                exited_at_ns: 1,
                oom_killed,
            };
            Exit::from_record(&record).reason
        };
        assert_eq!(exit(0, false), "Completed");
        assert_eq!(exit(3, false), "Error");
        assert_eq!(exit(137, true), "OOMKilled");
    }
}
