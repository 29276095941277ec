//! What one test case works with: the node, its handler, pods that are removed when it ends, and the checks
//! that most cases make.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::node::{Node, Pod};
use crate::process::Output;
use crate::requests::Request;
use crate::suite::Handler;

/// A running case.
pub struct Case<'a> {
    /// The node that all cases of the suite share.
    pub node: &'a Node,
    /// The handler that this run of the case is about.
    pub handler: Handler,
    name: String,
    pods: Mutex<Vec<String>>,
    counter: AtomicUsize,
}

/// How a container ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Container id.
    pub id: String,
    /// CRI ContainerStatus of the end.
    pub status: Value,
    /// Everything in its log.
    pub logs: String,
}

impl Ended {
    /// `exitCode`; the JSON of protobuf leaves 0 out.
    #[must_use]
    pub fn code(&self) -> i64 {
        self.status["exitCode"].as_i64().unwrap_or_default()
    }

    /// `reason`.
    #[must_use]
    pub fn reason(&self) -> &str {
        self.status["reason"].as_str().unwrap_or_default()
    }
}

impl<'a> Case<'a> {
    pub(crate) fn new(node: &'a Node, handler: Handler, name: &str) -> Self {
        let name = name.replace("::", "-").replace('_', "-");
        Self {
            node,
            handler,
            name,
            pods: Mutex::default(),
            counter: AtomicUsize::new(0),
        }
    }

    /// A pod request with a name that no other case has.
    #[must_use]
    pub fn pod_request(&self) -> Request {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        self.node.pod_request(&format!("{}-{number}", self.name))
    }

    /// A directory for the case's files.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn directory(&self) -> Result<std::path::PathBuf> {
        self.node.directory(&self.name)
    }

    /// Runs a pod as requested; it is removed when the case ends.
    ///
    /// # Errors
    /// RunPodSandbox failed.
    pub fn run_pod(&self, request: &Request) -> Result<Pod> {
        self.run_pod_under(self.handler.name(), request)
    }

    /// Runs a pod under a handler that is not the case's.
    ///
    /// # Errors
    /// RunPodSandbox failed.
    pub fn run_pod_under(&self, handler: &str, request: &Request) -> Result<Pod> {
        let pod = self.node.run_pod(handler, request)?;
        self.pods
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(pod.id.clone());
        Ok(pod)
    }

    /// Runs a pod with nothing special about it.
    ///
    /// # Errors
    /// RunPodSandbox failed.
    pub fn pod(&self) -> Result<Pod> {
        self.run_pod(&self.pod_request())
    }

    /// A container request that runs a shell script in busybox.
    #[must_use]
    pub fn script(&self, name: &str, script: &str) -> Request {
        Request::script(name, &self.node.busybox, script)
    }

    /// A container request that only waits for its end, at which it goes at once.
    #[must_use]
    pub fn idle(&self, name: &str) -> Request {
        self.script(name, "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done")
    }

    /// Waits until a container's first process has a handler for SIGTERM: before that, as the first process of
    /// its PID namespace, it would not notice the signal.
    ///
    /// # Errors
    /// It has none within 20 s.
    pub fn wait_for_trap(&self, id: &str) -> Result<()> {
        self.eventually(Duration::from_secs(20), || {
            // SIGTERM is bit 14 of the mask.
            self.shell(id, "grep -q '^SigCgt:.*[4-7c-f]...$' /proc/1/status")
                .map(drop)
        })
    }

    /// Creates and starts a container.
    ///
    /// # Errors
    /// Either failed.
    pub fn start(&self, pod: &Pod, container: &Request) -> Result<String> {
        let id = self.node.create(pod, container)?;
        self.node.crictl.ok(&["start", &id])?;
        Ok(id)
    }

    /// Runs a container to its end.
    ///
    /// # Errors
    /// It was not created or started, or does not end within 60 s.
    pub fn run(&self, pod: &Pod, container: &Request) -> Result<Ended> {
        let id = self.start(pod, container)?;
        self.wait_exited(&id)
    }

    /// Runs a shell script in a container of its own pod to its end and returns the log.
    ///
    /// # Errors
    /// As [`Self::run`], and any exit code but 0.
    pub fn run_script(&self, pod: &Pod, name: &str, script: &str) -> Result<String> {
        let ended = self.run(pod, &self.script(name, script))?;
        if ended.code() != 0 {
            bail!("{script:?} ended with {}: {}", ended.code(), ended.logs);
        }
        Ok(ended.logs)
    }

    /// ContainerStatus (`status` of `crictl inspect`).
    ///
    /// # Errors
    /// The container is not known.
    pub fn status(&self, id: &str) -> Result<Value> {
        Ok(self.node.crictl.json(&["inspect", id])?["status"].clone())
    }

    /// PodSandboxStatus with the verbose info (`crictl inspectp`).
    ///
    /// # Errors
    /// The pod is not known.
    pub fn pod_status(&self, id: &str) -> Result<Value> {
        self.node.crictl.json(&["inspectp", id])
    }

    /// The pod's address.
    ///
    /// # Errors
    /// The pod is not known or has none.
    pub fn address(&self, pod: &Pod) -> Result<String> {
        let status = self.pod_status(&pod.id)?;
        let ip = status["status"]["network"]["ip"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        if ip.is_empty() {
            bail!("the pod has no address: {status}");
        }
        Ok(ip)
    }

    /// Waits until a container has ended.
    ///
    /// # Errors
    /// It does not within 60 s.
    pub fn wait_exited(&self, id: &str) -> Result<Ended> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let status = self.status(id)?;
            if status["state"] == "CONTAINER_EXITED" {
                return Ok(Ended {
                    id: id.to_owned(),
                    status,
                    logs: self.logs(id)?,
                });
            }
            if Instant::now() >= end {
                bail!(
                    "container {id} did not end within 60 s; its log: {}",
                    self.logs(id)?
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Both streams of a container's log.
    ///
    /// # Errors
    /// `crictl logs` failed.
    pub fn logs(&self, id: &str) -> Result<String> {
        let output = self.node.crictl.run(&["logs", id])?;
        if output.code != 0 {
            bail!("crictl logs {id} ended with {}: {}", output.code, output.stderr);
        }
        Ok(output.stdout + &output.stderr)
    }

    /// ExecSync.
    ///
    /// # Errors
    /// crictl cannot be run; how the command ended is in the output.
    pub fn exec(&self, id: &str, command: &[&str]) -> Result<Output> {
        self.node.crictl.run(&[&["exec", "-s", id], command].concat())
    }

    /// ExecSync of a shell script that must succeed; returns its trimmed standard output.
    ///
    /// # Errors
    /// It ended with another code than 0.
    pub fn shell(&self, id: &str, script: &str) -> Result<String> {
        let output = self.exec(id, &["sh", "-c", script])?;
        if output.code != 0 {
            bail!(
                "{script:?} ended with {}: {} {}",
                output.code,
                output.stdout,
                output.stderr
            );
        }
        Ok(output.stdout.trim().to_owned())
    }

    /// Gets `/` over HTTP from inside a container. By `nc`: a static busybox's wget may crash in glibc's name
    /// service code.
    ///
    /// # Errors
    /// Nothing answers there.
    pub fn fetch_inside(&self, id: &str, host: &str, port: u16) -> Result<String> {
        let script = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {host} {port}");
        let answer = self.shell(id, &script)?;
        if !answer.contains("200 OK") {
            bail!("{host}:{port} answers {answer:?}");
        }
        Ok(answer.lines().last().unwrap_or_default().trim().to_owned())
    }

    /// The daemon under test is Catamaran, not the peer that proves the harness.
    #[must_use]
    pub fn ours(&self) -> bool {
        self.node.flavour == crate::daemon::Flavour::Catamaran
    }

    /// Tries until it succeeds or the limit is over.
    ///
    /// # Errors
    /// The last attempt's.
    pub fn eventually<T>(&self, limit: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        let end = Instant::now() + limit;
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(error) if Instant::now() >= end => {
                    return Err(error).with_context(|| format!("not within {limit:?}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Removes the case's pods that it has not removed itself.
    pub(crate) fn clean_up(&self) -> Result<()> {
        let known = self.node.crictl.ok(&["pods", "-q", "--no-trunc"])?;
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let left: Vec<&String> = pods.iter().filter(|id| known.contains(id.as_str())).collect();
        for id in left {
            self.node.remove_pod(id)?;
        }
        Ok(())
    }
}
