//! Pod and container configurations as crictl reads them: CRI messages in JSON, made of defaults that every
//! test wants and of what the test sets by JSON pointer. The namespaces are what a kubelet asks for: network
//! and IPC the pod's (0), PID each container's own (1); the CRI's zero value would share the PID namespace.

use serde_json::{Value, json};

/// A CRI configuration under construction.
#[derive(Debug, Clone)]
pub struct Request(Value);

impl Request {
    /// A PodSandboxConfig.
    #[must_use]
    pub fn pod(name: &str, log_directory: &str, cgroup_parent: &str) -> Self {
        Self(json!({
            "metadata": {"name": name, "namespace": "e2e", "uid": format!("uid-{name}"), "attempt": 0},
            "hostname": name,
            "log_directory": log_directory,
            "labels": {"e2e": name},
            "linux": {"cgroup_parent": cgroup_parent, "security_context": {"namespace_options": {"pid": 1}}},
        }))
    }

    /// A ContainerConfig that runs `command`.
    #[must_use]
    pub fn container(name: &str, image: &str, command: &[&str]) -> Self {
        Self(json!({
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": image},
            "command": command,
            "log_path": format!("{name}.log"),
            "linux": {"resources": {}, "security_context": {"namespace_options": {"pid": 1}}},
        }))
    }

    /// A ContainerConfig that runs a shell script.
    #[must_use]
    pub fn script(name: &str, image: &str, script: &str) -> Self {
        Self::container(name, image, &["sh", "-c", script])
    }

    /// Sets a value by JSON pointer; objects on the way are made.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let mut place = &mut self.0;
        for key in pointer.trim_start_matches('/').split('/') {
            place = &mut place[key.replace("~1", "/").replace("~0", "~")];
        }
        *place = value;
        self
    }

    /// Adds to the container's mounts.
    #[must_use]
    pub fn mount(mut self, host: &std::path::Path, container: &str, more: Value) -> Self {
        let mut mount = json!({"host_path": host, "container_path": container});
        if let (Some(mount), Value::Object(more)) = (mount.as_object_mut(), more) {
            mount.extend(more);
        }
        match &mut self.0["mounts"] {
            Value::Array(mounts) => mounts.push(mount),
            absent => *absent = json!([mount]),
        }
        self
    }

    /// The message.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.0
    }

    /// `metadata.name`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0["metadata"]["name"].as_str().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_set_where_the_pointer_says() {
        let pod =
            Request::pod("a", "/l", "/c").set("/linux/security_context/namespace_options/pid", json!(2));
        assert_eq!(
            pod.json()["linux"]["security_context"]["namespace_options"]["pid"],
            2
        );
        let pod = pod.set("/annotations/a.b~1c", json!("d"));
        assert_eq!(pod.json()["annotations"]["a.b/c"], "d");
    }
}
