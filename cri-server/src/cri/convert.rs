//! From records to the CRI's messages, and the filters of its lists.

use std::collections::HashMap;

use catamaran_images::Image;
use catamaran_sandbox::id::Id;
use serde_json::json;

use super::api;
use crate::node::now_ns;
use crate::pods::record::{ContainerRecord, PodRecord, PodView};
use crate::pods::state::{ContainerState, PodState};

/// State of a pod as the CRI has it.
#[must_use]
pub fn pod_state(state: PodState) -> api::PodSandboxState {
    match state {
        PodState::Ready => api::PodSandboxState::SandboxReady,
        _ => api::PodSandboxState::SandboxNotready,
    }
}

/// State of a container as the CRI has it.
#[must_use]
pub fn container_state(container: &ContainerRecord) -> api::ContainerState {
    match container.state {
        ContainerState::Creating | ContainerState::Created | ContainerState::Starting => {
            api::ContainerState::ContainerCreated
        }
        ContainerState::Running => api::ContainerState::ContainerRunning,
        // One that was never started is not running while it is stopped.
        ContainerState::Stopping if container.started_at_ns == 0 => api::ContainerState::ContainerCreated,
        ContainerState::Stopping => api::ContainerState::ContainerRunning,
        // It is over, and its exit says that nobody saw how. The CRI's UNKNOWN is for one that may still run: the
        // kubelet drops its exit and times for a made-up one.
        ContainerState::Exited | ContainerState::Unknown => api::ContainerState::ContainerExited,
        ContainerState::Removing if container.exit.is_some() || container.started_at_ns == 0 => {
            api::ContainerState::ContainerExited
        }
        ContainerState::Removing => api::ContainerState::ContainerRunning,
    }
}

/// An entry of ListPodSandbox.
#[must_use]
pub fn pod_entry(pod: &PodRecord) -> api::PodSandbox {
    api::PodSandbox {
        id: pod.id.to_string(),
        metadata: pod.config.metadata.clone(),
        state: pod_state(pod.state).into(),
        created_at: pod.created_at_ns,
        labels: pod.config.labels.clone(),
        annotations: pod.config.annotations.clone(),
        runtime_handler: pod.handler.clone(),
    }
}

/// PodSandboxStatus.
#[must_use]
pub fn pod_status(pod: &PodRecord) -> api::PodSandboxStatus {
    let mut ips = pod.ips.iter().map(ToString::to_string);
    let security = pod
        .config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    api::PodSandboxStatus {
        id: pod.id.to_string(),
        metadata: pod.config.metadata.clone(),
        state: pod_state(pod.state).into(),
        created_at: pod.created_at_ns,
        network: Some(api::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| api::PodIp { ip }).collect(),
        }),
        linux: Some(api::LinuxPodSandboxStatus {
            namespaces: Some(api::Namespace {
                options: Some(
                    security
                        .and_then(|s| s.namespace_options.clone())
                        .unwrap_or_default(),
                ),
            }),
        }),
        labels: pod.config.labels.clone(),
        annotations: pod.config.annotations.clone(),
        runtime_handler: pod.handler.clone(),
    }
}

/// Verbose information of a pod: one JSON document under the key `info`, as other runtimes have it.
#[must_use]
pub fn pod_info(view: &PodView) -> HashMap<String, String> {
    let pod = &view.pod;
    let linux = pod.config.linux.as_ref();
    let document = json!({
        "state": pod.state,
        "problem": pod.problem,
        "runtimeHandler": pod.handler,
        "runtimeType": pod.spec.runtime,
        "sandbox": pod.info,
        "networkNamespace": pod.netns(),
        "cgroupParent": pod.cgroup_parent,
        "overhead": linux.and_then(|linux| linux.overhead.as_ref()).map(resources_info),
        "resources": linux.and_then(|linux| linux.resources.as_ref()).map(resources_info),
        "shimAlive": view.shim.is_some(),
    });
    HashMap::from([("info".to_owned(), document.to_string())])
}

fn resources_info(resources: &api::LinuxContainerResources) -> serde_json::Value {
    json!({
        "cpuPeriod": resources.cpu_period,
        "cpuQuota": resources.cpu_quota,
        "cpuShares": resources.cpu_shares,
        "memoryLimitInBytes": resources.memory_limit_in_bytes,
        "memorySwapLimitInBytes": resources.memory_swap_limit_in_bytes,
    })
}

/// Verbose information of a container.
#[must_use]
pub fn container_info(view: &PodView, container: &ContainerRecord) -> HashMap<String, String> {
    let document = json!({
        "sandboxID": container.pod,
        "pid": container.pid,
        "state": container.state,
        "runtimeHandler": view.pod.handler,
        "sandbox": view.pod.info,
        "imageRef": container.image_ref,
    });
    HashMap::from([("info".to_owned(), document.to_string())])
}

/// An entry of ListContainers.
#[must_use]
pub fn container_entry(container: &ContainerRecord) -> api::Container {
    api::Container {
        id: container.id.to_string(),
        pod_sandbox_id: container.pod.to_string(),
        metadata: container.config.metadata.clone(),
        image: container.config.image.clone(),
        image_ref: container.image_ref.clone(),
        state: container_state(container).into(),
        created_at: container.created_at_ns,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        image_id: container.image_id.clone(),
    }
}

/// ContainerStatus.
#[must_use]
pub fn container_status(container: &ContainerRecord) -> api::ContainerStatus {
    let exit = container.exit.clone();
    let image = container.config.image.clone().map(|image| api::ImageSpec {
        image: if image.user_specified_image.is_empty() {
            image.image.clone()
        } else {
            image.user_specified_image.clone()
        },
        ..image
    });
    api::ContainerStatus {
        id: container.id.to_string(),
        metadata: container.config.metadata.clone(),
        state: container_state(container).into(),
        created_at: container.created_at_ns,
        started_at: container.started_at_ns,
        finished_at: exit.as_ref().map_or(0, |exit| exit.at_ns),
        exit_code: exit.as_ref().map_or(0, |exit| exit.code),
        image,
        image_ref: container.image_ref.clone(),
        reason: exit.as_ref().map(|exit| exit.reason.clone()).unwrap_or_default(),
        message: exit.map(|exit| exit.message).unwrap_or_default(),
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        mounts: container.config.mounts.clone(),
        log_path: container.log_path.clone(),
        resources: Some(api::ContainerResources {
            linux: Some(container.resources.clone()),
            windows: None,
        }),
        image_id: container.image_id.clone(),
        user: Some(api::ContainerUser {
            linux: Some(container.user.clone()),
        }),
        stop_signal: i32::from(signal(container.stop_signal)),
    }
}

/// The CRI's name of a signal number.
fn signal(number: u32) -> api::Signal {
    use api::Signal as S;
    match number {
        1 => S::Sighup,
        2 => S::Sigint,
        3 => S::Sigquit,
        4 => S::Sigill,
        5 => S::Sigtrap,
        6 => S::Sigabrt,
        7 => S::Sigbus,
        8 => S::Sigfpe,
        9 => S::Sigkill,
        10 => S::Sigusr1,
        11 => S::Sigsegv,
        12 => S::Sigusr2,
        13 => S::Sigpipe,
        14 => S::Sigalrm,
        15 => S::Sigterm,
        16 => S::Sigstkflt,
        17 => S::Sigchld,
        18 => S::Sigcont,
        19 => S::Sigstop,
        20 => S::Sigtstp,
        21 => S::Sigttin,
        22 => S::Sigttou,
        23 => S::Sigurg,
        24 => S::Sigxcpu,
        25 => S::Sigxfsz,
        26 => S::Sigvtalrm,
        27 => S::Sigprof,
        28 => S::Sigwinch,
        29 => S::Sigio,
        30 => S::Sigpwr,
        31 => S::Sigsys,
        // The enum has SIGRTMIN to SIGRTMAX (34 to 64) in order, from 35 on.
        34..=64 => i32::try_from(number + 1)
            .ok()
            .and_then(|n| S::try_from(n).ok())
            .unwrap_or(S::RuntimeDefault),
        _ => S::RuntimeDefault,
    }
}

/// An image.
#[must_use]
pub fn image(image: &Image) -> api::Image {
    let user = image
        .config
        .config()
        .as_ref()
        .and_then(|config| config.user().clone())
        .unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default();
    let (uid, username) = match user.parse::<i64>() {
        Ok(value) => (Some(api::Int64Value { value }), String::new()),
        Err(_) if user.is_empty() => (Some(api::Int64Value { value: 0 }), String::new()),
        Err(_) => (None, user.to_owned()),
    };
    api::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid,
        username,
        spec: None,
        pinned: image.pinned,
    }
}

/// A container event with the status of its pod, as the kubelet expects it.
#[must_use]
pub fn event(view: &PodView, id: &Id, kind: api::ContainerEventType) -> api::ContainerEventResponse {
    api::ContainerEventResponse {
        container_id: id.to_string(),
        container_event_type: kind.into(),
        created_at: now_ns(),
        pod_sandbox_status: Some(pod_status(&view.pod)),
        containers_statuses: statuses(view),
    }
}

/// The status of every listed container of a pod.
#[must_use]
pub fn statuses(view: &PodView) -> Vec<api::ContainerStatus> {
    let listed = view
        .containers
        .values()
        .filter(|c| c.state != ContainerState::Creating);
    listed.map(|container| container_status(container)).collect()
}

/// CRI label selectors: every pair must be there.
#[must_use]
pub fn labels_match(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Ids in filters may be shortened.
#[must_use]
pub fn id_matches(id: &Id, wanted: &str) -> bool {
    wanted.is_empty() || id.as_str().starts_with(wanted)
}

/// ListPodSandbox's filter.
#[must_use]
pub fn pod_matches(pod: &PodRecord, filter: Option<&api::PodSandboxFilter>) -> bool {
    filter.is_none_or(|filter| {
        id_matches(&pod.id, &filter.id)
            && filter
                .state
                .as_ref()
                .is_none_or(|wanted| wanted.state == i32::from(pod_state(pod.state)))
            && labels_match(&pod.config.labels, &filter.label_selector)
    })
}

/// ListContainers' filter.
#[must_use]
pub fn container_matches(container: &ContainerRecord, filter: Option<&api::ContainerFilter>) -> bool {
    filter.is_none_or(|filter| {
        id_matches(&container.id, &filter.id)
            && id_matches(&container.pod, &filter.pod_sandbox_id)
            && filter
                .state
                .as_ref()
                .is_none_or(|wanted| wanted.state == i32::from(container_state(container)))
            && labels_match(&container.config.labels, &filter.label_selector)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_the_cris_names() {
        assert_eq!(signal(9), api::Signal::Sigkill);
        assert_eq!(signal(15), api::Signal::Sigterm);
        assert_eq!(signal(34), api::Signal::Sigrtmin);
        assert_eq!(signal(64), api::Signal::Sigrtmax);
        assert_eq!(signal(0), api::Signal::RuntimeDefault);
    }

    #[test]
    fn a_selector_needs_all_its_pairs() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        let labels = map(&[("a", "1"), ("b", "2")]);
        assert!(labels_match(&labels, &map(&[])));
        assert!(labels_match(&labels, &map(&[("a", "1")])));
        assert!(!labels_match(&labels, &map(&[("a", "1"), ("c", "3")])));
        assert!(!labels_match(&labels, &map(&[("a", "2")])));
    }
}
